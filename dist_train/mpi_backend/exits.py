"""How a process with a group of this backend ends: with its peers, or, when something went wrong, without them."""

from __future__ import annotations

import atexit
import os
import sys
import time
from typing import Any

from dist_train.mpi_backend.library import MPI
from dist_train.mpi_backend.operation import abandoned
from dist_train.mpi_backend.progress import mpi_calls, progress

GRACE_SECONDS = 5.0
"""How long a process that ends on an error waits for its peers to end as well."""

problems: list[str] = []
"""What went wrong in groups of this process."""

_farewell: Any = None  # a communicator of all processes of the job
_process = os.getpid()


def take_part(comm: Any) -> None:
    """Called by every member of a new group: the first of all processes carries the last barrier."""
    global _farewell
    if _farewell is None and comm.Get_size() == MPI.COMM_WORLD.Get_size():
        with mpi_calls:
            _farewell = comm.Dup()
        atexit.register(_leave)


def _leave() -> None:
    """At exit: waits for the peers, when all is well for ever, else for the grace; then MPI_Finalize or MPI_Abort."""
    if os.getpid() != _process or MPI.Is_finalized():
        return
    crashed = getattr(sys, "last_value", None) is not None
    progress.stop()
    request = _farewell.Ibarrier()
    deadline = time.monotonic() + GRACE_SECONDS
    pause = 1e-4
    while True:
        outstanding = progress.poll()  # what nobody has waited for may complete now
        all_leave = request.Test()
        if all_leave and not outstanding:
            break
        if (crashed or problems or outstanding) and time.monotonic() > deadline:
            _abort("operations never completed" if all_leave else "its peers do not end")
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    if abandoned:
        _abort("operations never completed")
    MPI.Finalize()


def _abort(why: str) -> None:
    rank = MPI.COMM_WORLD.Get_rank()
    sys.stdout.flush()
    sys.stderr.write(f"mpi4py: rank {rank} ended on an error and {why}: ending the job\n")
    sys.stderr.flush()
    MPI.COMM_WORLD.Abort(1)
