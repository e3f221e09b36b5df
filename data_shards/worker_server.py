"""What the fork server of the loader's workers preloads (`data_shards.worker_process` names it); imported nowhere else.

It imports what a worker needs, and shields the server from signals meant for the training process: SLURM sends a step's
signal to every process of it, and workers cannot outlive their server.
"""

import os
import signal
from types import FrameType

import data_shards.worker_process
import data_shards.workers.process

_SERVER_PID = os.getpid()


def _ignore_in_server(number: int, _frame: FrameType | None) -> None:
    """Do nothing in the server; act as if there were no handler in a process forked from it, which inherits this."""
    if os.getpid() != _SERVER_PID:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


for _number in data_shards.worker_process.SHIELDED_SIGNALS:
    signal.signal(_number, _ignore_in_server)
