"""Starts an elastic run on this machine: `python -m dist_train.horovod.elastic -np 4 --min-np 2 train.py --lr 0.1`.

Unlike torchrun and mpirun, it leaves the other workers alone when one dies; `--restarts` starts others in their place,
which join the run. It ends when all workers have: with 0 if the last world finished, with 1 otherwise. For several
machines, `srun --no-kill --wait=0` leaves survivors alone too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

POLL_SECONDS = 0.05


def main() -> int:
    """Runs the job that the command line asks for, and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dist_train.horovod.elastic", description=__doc__)
    parser.add_argument("-np", "--num-proc", type=int, required=True, help="workers to start with")
    parser.add_argument("--min-np", "--min-num-proc", type=int, help="go on with no fewer (default: all)")
    parser.add_argument("--max-np", "--max-num-proc", type=int, help="admit no more (default: --num-proc)")
    parser.add_argument("--restarts", type=int, default=0, help="workers to start in place of those that died")
    parser.add_argument("script", help="a Python script; what follows are its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    min_np, max_np = args.min_np or args.num_proc, args.max_np or args.num_proc
    if not 1 <= min_np <= args.num_proc <= max_np:
        parser.error(f"need 1 <= --min-np ({min_np}) <= --num-proc ({args.num_proc}) <= --max-np ({max_np})")
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory(prefix="horovod-elastic-") as folder:
        doors = Path(folder) / "doors.json"
        shared = {
            "WORLD_SIZE": str(args.num_proc),
            "LOCAL_WORLD_SIZE": str(args.num_proc),
            "HOROVOD_ELASTIC_FILE": str(doors),
            "HOROVOD_ELASTIC_MIN_NP": str(min_np),
            "HOROVOD_ELASTIC_MAX_NP": str(max_np),
        }

        def start(rank: int) -> subprocess.Popen[bytes]:
            environ = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return subprocess.Popen([sys.executable, args.script, *args.arguments], env=environ)

        workers = {rank: start(rank) for rank in range(args.num_proc)}
        try:
            return _supervise(workers, start, min_np, args.restarts, doors)
        finally:
            for worker in workers.values():
                worker.kill()
                worker.wait()


def _supervise(
    workers: dict[int, subprocess.Popen[bytes]],
    start: Callable[[int], subprocess.Popen[bytes]],
    min_np: int,
    restarts: int,
    doors: Path,
) -> int:
    finished = False
    while workers:
        for rank, worker in list(workers.items()):
            status = worker.poll()
            if status is None:
                continue
            del workers[rank]
            finished = finished or status == 0
            if status != 0:
                _say(f"worker {rank} (pid {worker.pid}) ended with status {status}")
            if status != 0 and restarts > 0 and not finished and doors.exists():
                restarts -= 1
                workers[rank] = start(rank)
        if not finished and len(workers) < min_np:
            _say(f"{len(workers)} workers are left, fewer than --min-np {min_np}: ending")
            return 1
        time.sleep(POLL_SECONDS)
    return 0 if finished else 1


def _say(message: str) -> None:
    print(f"horovod.elastic: {message}", file=sys.stderr, flush=True)  # noqa: T201


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
