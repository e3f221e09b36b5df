"""Runs `reelscale` as a user does: a process of its own, its output, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

COMMAND = [sys.executable, "-P", "-m", "launch.entry"]
QUICK = ("--monitor.wandb=off", "--report=off")


def reelscale(*arguments: object, timeout: float = 120, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`reelscale ARGUMENTS` to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
        env=environment(),
    )


def start(*arguments: object) -> subprocess.Popen[str]:
    """`reelscale ARGUMENTS`, running."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,  # as from a terminal: a group of its own, to which a Ctrl-C is sent
    )


def environment() -> dict[str, str]:
    """This environment without what another launcher left, one thread a process: results must not depend on either."""
    launchers = ("RANK", "WORLD_SIZE", "SLURM_", "OMPI_", "PMI", "MASTER_", "REELSCALE_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return {**kept, "OMP_NUM_THREADS": "1"}


def succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """`done`, after an assertion that it ended well."""
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def one_line_of(done: subprocess.CompletedProcess[str], *, exit_code: int = 2) -> str:
    """The one line in which `done` said what was wrong."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == exit_code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert len(lines) == 1, f"not one line:\n{done.stderr}"
    assert lines[0].startswith("reelscale: error: ")
    assert "Traceback" not in done.stdout + done.stderr
    return lines[0]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's model and momentum, by name."""
    name = (run_dir / "checkpoints" / "latest").read_text().strip()
    state = torch.load(run_dir / "checkpoints" / name / "state.pt", weights_only=True)
    momentum = {
        f"momentum.{key}": value["momentum_buffer"] for key, value in state["optimizers"]["classify"]["state"].items()
    }
    return {**state["modules"]["classify"], **momentum}


def assert_same_bits(first: Path, second: Path) -> None:
    """The two runs ended in the same weights, statistics and momentum, bit for bit."""
    one, two = final_state(first), final_state(second)
    assert one.keys() == two.keys()
    different = [name for name, value in one.items() if not torch.equal(value, two[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ: {different[:3]}"
