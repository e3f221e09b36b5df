"""How worker processes start and end: in milliseconds, and never later than the process that they work for.

Workers come from a fork server, a process that has imported what a worker needs and nothing else. Forking the training
process itself is unsafe once it has run OpenMP or Gloo threads; importing PyTorch in each worker takes seconds.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext

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


def start_worker(_worker_id: int) -> None:
    """First call in a worker (DataLoader's `worker_init_fn`): guard the process, start the clock of its costs.

    From here on the worker ends with the training process, however that one dies, and is deaf to signals but for a
    SIGTERM from the training process itself.
    """
    from torch.utils.data import get_worker_info

    from data_shards.worker import BatchMaker

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED_SIGNALS)
    threading.Thread(target=_guard, name="guard", daemon=True).start()
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, BatchMaker)
    info.dataset.start()


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
