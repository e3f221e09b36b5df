"""How worker processes start and end: in milliseconds, and never later than the process that they work for.

Workers come from a fork server, a process that has imported what a worker needs and nothing else. Forking the training
process itself is unsafe once it has run OpenMP or Gloo threads; importing PyTorch in each worker takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_shards.workers.process import Worker

# Signals that a cluster sends to all processes of a job step, to be heard by the training process only.
SHIELDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_CHECK_SECONDS = 1.0


def worker_context() -> ForkServerContext:
    """The multiprocessing context of the workers; its server starts with the first worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_shards.worker_server"])
    return context


def start_worker_server() -> None:
    """Start the fork server now, in the background: its imports then overlap with what the caller does next.

    Optional, and best called before PyTorch is imported (this module does not). One server serves all loaders of a
    process; calling it again does nothing.
    """
    worker_context()
    forkserver.ensure_running()


def run_worker(worker: Worker) -> None:
    """The main function of a worker process: guards the process, then works."""
    import torch

    guard_process()
    torch.set_num_threads(1)  # the workers are the parallelism
    sys.exit(worker.work())


def guard_process(_worker_id: int = 0) -> None:
    """Make this process end with the training process, however that one dies, and deaf to signals.

    All but a SIGTERM from the training process itself. Called once, in the main thread of a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
    threading.Thread(target=_guard, name="guard", daemon=True).start()


def _guard() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive():
        if not hasattr(signal, "sigtimedwait"):
            connection.wait([parent.sentinel], timeout=_CHECK_SECONDS)
            continue
        received = signal.sigtimedwait(SHIELDED_SIGNALS, _CHECK_SECONDS)
        if received is not None and (received.si_signo, received.si_pid) == (signal.SIGTERM, parent.pid):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)
