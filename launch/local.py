"""`--nproc N`: N processes of this command on this machine, supervised by the one that the user started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from launch.errors import EXIT_STOPPED, Failure, read_failures

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FAILURES_FOLDER, SUPERVISOR = "REELSCALE_FAILURES", "REELSCALE_SUPERVISOR"
GRACE_SECONDS = 10.0


def run_local(arguments: Sequence[str], *, num_processes: int, logs: Path) -> Failure | None:
    """Runs `reelscale ARGUMENTS` as `num_processes` ranks and waits for all of them.

    Rank 0 writes to this terminal, every other rank to `logs/rank_00001.log`. When one fails, the others get
    `GRACE_SECONDS` to end by themselves and are then killed; nothing is left running.

    Returns:
        None when all ended well, else the failure that came first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    key = uuid.uuid4().hex
    processes: list[subprocess.Popen[bytes]] = []
    with TemporaryDirectory(prefix="reelscale-") as failures, _signals_forwarded_to(processes):
        try:
            for rank in range(num_processes):
                processes.append(_start(arguments, rank, _environment(rank, num_processes, key, failures), logs))
            first = _wait(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if first is None:
            return None
        return _earliest(Path(failures), first, processes[first].returncode, logs)


def _start(arguments: Sequence[str], rank: int, environ: dict[str, str], logs: Path) -> subprocess.Popen[bytes]:
    with ExitStack() as files:
        output = files.enter_context((logs / f"rank_{rank:05d}.log").open("ab")) if rank else None
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launch.entry", *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            process_group=0,  # a Ctrl-C reaches the ranks once, forwarded, not twice
        )


def die_with_parent() -> None:
    """Asks the kernel to end this process when the supervising one dies, or ends it if that is so already (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.environ.get(SUPERVISOR) not in (None, str(os.getppid())):
        sys.exit(EXIT_STOPPED)


def _environment(rank: int, num_processes: int, key: str, failures: str) -> dict[str, str]:
    threads = max((os.cpu_count() or 1) // num_processes, 1)
    foreign = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")  # of a launcher around this one
    return {
        "OMP_NUM_THREADS": str(threads),
        **{key: value for key, value in os.environ.items() if key not in foreign},
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "REELSCALE_LAUNCHER": "local",
        "REELSCALE_JOB_KEY": key,
        SUPERVISOR: str(os.getpid()),
        FAILURES_FOLDER: failures,
    }


@contextmanager
def _signals_forwarded_to(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside this block the signals that end a job go to the ranks; the old handlers are back after it."""

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all; the index of the first that failed, or None."""
    first: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        failed = [index for index, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed and first is None:
            killed = [index for index in failed if processes[index].returncode < 0]
            first, deadline = (killed or failed)[0], time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.02)
    if first is None:
        first = next((index for index, process in enumerate(processes) if process.returncode), None)
    return first


def _earliest(folder: Path, rank: int, code: int, logs: Path) -> Failure:
    """What went wrong first: a rank's own words where it left any, else how it died."""
    told = read_failures(folder)
    seen = next((f": {failure.message}" for failure in told if failure.consequence and failure.of_all), "")
    if code < 0:  # killed: it left no words, and what the others say is a consequence
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        log = f"; see {logs / f'rank_{rank:05d}.log'}" if rank else ""
        return Failure(exit_code=128 - code, message=f"rank {rank} was killed by {name}{hint}{seen}{log}")
    for failure in told:
        if not failure.consequence:
            return failure
    if any(failure.rank == rank for failure in told):
        return replace(told[0], message=f"{told[0].message}; see {logs}")
    return Failure(exit_code=code, message=f"rank {rank} ended with exit code {code}{seen}; see {logs}", rank=rank)
