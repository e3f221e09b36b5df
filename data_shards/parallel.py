"""A map over worker processes that keeps the order, reports progress, and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

__all__ = ["Progress", "num_usable_cpus", "ordered_map", "start_worker"]

Progress = Callable[[int, int], None]
"""Called as progress(done, total) in the process that asked for the work."""

Task = TypeVar("Task")
Result = TypeVar("Result")

_CHUNKS_IN_FLIGHT = 4  # per worker: enough to keep it busy, few enough to stop soon


def num_usable_cpus() -> int:
    """Processors that this process may run on (a SLURM job may see fewer than the node has)."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    chunk: int = 1,
    progress: Progress | None = None,
) -> Generator[Result, None, None]:
    """Yield function(task) for each task, in order; up to `workers` processes work ahead.

    `workers` = 0 takes one a usable processor; 1 works in this process. `function` and the tasks must be
    picklable, for the processes are started by a fork server (a fork of a process with threads is unsafe).

    Raises:
        RuntimeError: a worker process died; whatever `function` raises comes through as it is.
    """
    total = len(tasks)
    workers = min(workers or num_usable_cpus(), -(-total // chunk))
    if workers <= 1:
        for done, task in enumerate(tasks, 1):
            yield function(task)
            if progress:
                progress(done, total)
        return
    chunks = iter([tasks[start : start + chunk] for start in range(0, total, chunk)])
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"), initializer=start_worker)
    pending: deque[Future[list[Result]]] = deque()
    done = 0
    try:
        while True:
            while len(pending) < workers * _CHUNKS_IN_FLIGHT and (part := next(chunks, None)) is not None:
                pending.append(pool.submit(_run_chunk, function, part))
            if not pending:
                return
            for result in pending.popleft().result():
                yield result
                done += 1
                if progress:
                    progress(done, total)
    except BrokenProcessPool:
        raise RuntimeError(
            f"a worker process died after {done} of {total} items (killed, or out of memory?); "
            "try again with fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_chunk(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [function(task) for task in tasks]


def start_worker() -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent cannot shut its pool down: without this its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
