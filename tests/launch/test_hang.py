"""A rank that hangs ends the whole job in bounded time, in one line that says which rank and what it was doing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.commands import COMMAND, QUICK, environment

TIMEOUT = "--exchange.timeout-seconds=8"
FLAGS = (TIMEOUT, "--nproc=2", "--training.log-every-steps=1", "--training.epochs=100", *QUICK)

HANGING_MODEL = """
import os
import time

import torch

from users_code import FrameDifference


class Hanging(FrameDifference):
    calls = 0

    def forward(self, clips):
        self.calls += 1
        if self.calls == 5 and {condition}:
            {fault}
        return super().forward(clips)


def hanging(num_classes, num_segments):
    return Hanging(num_classes, num_segments)
"""


def _start(tmp_path: Path, motion_shards: Path, *flags: str, fault: str = "pass") -> subprocess.Popen[str]:
    """A run of two ranks with a user's model in which rank 1 does `fault` in its fifth forward pass."""
    code = HANGING_MODEL.format(condition="os.environ['RANK'] == '1'", fault=fault)
    (tmp_path / "hanging_model.py").write_text(code)
    (tmp_path / "users_code.py").write_text(Path(__file__).with_name("users_code.py").read_text())
    command = [*COMMAND, "train", "users_code:my_experiment", "--model.name=hanging_model:hanging", *FLAGS, *flags]
    return subprocess.Popen(
        [*command, f"--data.root={motion_shards}", f"--run-dir={tmp_path / 'run'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
    )


def _ended(process: subprocess.Popen[str], *, exit_code: int = 1) -> str:
    """The one line of the error, after all processes have gone."""
    ranks = _ranks_of(process)
    _, said = process.communicate(timeout=60)
    assert process.returncode == exit_code, said
    lines = [line for line in said.splitlines() if line.startswith("reelscale: error: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank is still running"
        time.sleep(0.05)
    return lines[0]


def _ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(ranks := [int(pid) for pid in children.read_text().split()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ranks


def _wait_for_steps(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


NO_WORKERS = "--data.loader.num-workers=0"


@pytest.mark.thorough
def test_a_rank_that_hangs_in_the_users_code_is_named_with_the_line(tmp_path, motion_shards):
    line = _ended(_start(tmp_path, motion_shards, NO_WORKERS, fault="time.sleep(600)"))
    assert "step 4, phase classify, " in line
    assert ": rank 1 did not come within 8 s: rank 1 (host " in line
    assert "has been in forward of step 4, phase classify (at hanging_model.py:16 in forward) for " in line
    assert "rank 0 waits" in line


@pytest.mark.thorough
def test_a_killed_rank_is_named_with_what_it_did_last(tmp_path, motion_shards):
    fault = "time.sleep(1.5); os.kill(os.getpid(), 9)"
    line = _ended(_start(tmp_path, motion_shards, NO_WORKERS, fault=fault), exit_code=137)
    assert "rank 1 was killed by SIGKILL (out of memory?): step 4, phase classify, " in line
    assert "last heard of " in line


@pytest.mark.thorough
def test_a_stopped_rank_is_named_and_not_left_behind(tmp_path, motion_shards):
    process = _start(tmp_path, motion_shards, NO_WORKERS)
    _wait_for_steps(tmp_path, process)
    os.kill(sorted(_ranks_of(process))[0], signal.SIGSTOP)  # rank 0 keeps the store: the others cannot read it now
    line = _ended(process)
    assert ": rank 0 did not come within 8 s: rank 0 (host " in line
    assert "its process is stopped (SIGSTOP, or a debugger); last heard of " in line
