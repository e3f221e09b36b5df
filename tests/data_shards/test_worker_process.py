"""Workers start in a process that has run Gloo and OpenMP, are deaf to its signals, and die with it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_shards.packed import make_split
from tests.data_shards.videos import encode

TRAINING = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from multiprocessing import forkserver

def main(folder, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1, timeout=timedelta(seconds=60))
    dist.all_reduce(torch.ones(1000))
    torch.set_num_threads(2)
    (torch.rand(600, 600) @ torch.rand(600, 600)).sum()

    from data_shards.clips import ClipConfig
    from data_shards.loader import ClipLoader, LoaderConfig
    from data_shards.manifest import open_manifest
    clip = ClipConfig(num_segments=2, crop_size=24, short_side=32)
    loader = ClipLoader(open_manifest(folder), clip=clip, loader=LoaderConfig(num_workers=2), training=True,
                        global_batch_clips=2)
    for batch in loader.batches(0, 10**9):
        pids = [account.pid for account in loader.accounts]
        print(forkserver._forkserver._forkserver_pid, *pids, flush=True)
        if not sys.stdin.readline():
            break

if __name__ == "__main__":
    main(*sys.argv[1:])
"""

UNGUARDED = """
import sys
from data_shards.clips import ClipConfig
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import open_manifest
clip = ClipConfig(num_segments=2, crop_size=24, short_side=32)
loader = ClipLoader(open_manifest(sys.argv[1]), clip=clip, loader=LoaderConfig(num_workers=1), training=True,
                    global_batch_clips=1)
list(loader.batches(0, 10))
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that prints the pids of its fork server and workers with each batch, and waits for a line."""
    make_split(tmp_path / "train", {f"clip_{n}": encode(4, width=40, height=32) for n in range(4)})
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    command = [sys.executable, str(script), str(tmp_path / "train"), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


@pytest.mark.thorough
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    make_split(tmp_path / "train", {"clip": encode(4, width=40, height=32)})
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "train")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert re.search(r'RuntimeError: data worker 0 \(pid \d+\) .* needs `if __name__ == "__main__":`', result.stderr)


def pids_of(training: subprocess.Popen[str]) -> list[int]:
    assert training.stdout is not None
    return [int(pid) for pid in training.stdout.readline().split()]


def go_on(training: subprocess.Popen[str]) -> None:
    assert training.stdin is not None
    training.stdin.write("\n")
    training.stdin.flush()


def wait_until_gone(pids: list[int], *, seconds: float) -> list[int]:
    """Those of `pids` that still run after `seconds`."""
    deadline = time.monotonic() + seconds
    alive = pids
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [pid for pid in alive if is_running(pid)]
    return alive


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_workers_and_their_server_die_with_a_training_process_that_is_killed(training):
    pids = pids_of(training)
    assert len(pids) == 3
    assert all(is_running(pid) for pid in pids)
    training.kill()
    assert wait_until_gone(pids, seconds=20) == []


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="this system cannot tell who sent a signal")
def test_signals_to_all_processes_of_a_job_step_reach_the_training_process_only(training):
    pids = pids_of(training)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        for pid in pids:
            os.kill(pid, number)
    time.sleep(1.5)
    for _ in range(12):  # more than were made ahead
        go_on(training)
        assert pids_of(training) == pids
    assert training.stdin is not None
    training.stdin.close()
    assert training.wait(timeout=60) == 0
    assert wait_until_gone(pids, seconds=20) == []
