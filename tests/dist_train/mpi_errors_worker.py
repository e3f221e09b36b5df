"""What the ranks of the tests of MPI's errors run: `mpirun -n N python -P -m tests.dist_train.mpi_errors_worker WHAT`.

It uses the backend as any PyTorch program does: one import, one call.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import dist_train.mpi_backend  # noqa: F401


def late() -> None:
    """Rank 1 does not come to a collective: the others get errors, of a wait and of the group, and the job ends."""
    work = dist.all_reduce(torch.ones(3), async_op=True) if dist.group.WORLD.rank() == 0 else None
    if work is None:
        time.sleep(30)
        return
    try:
        work.wait(timedelta(seconds=0.2))
    except RuntimeError as error:
        sys.stderr.write(f"WAIT: {error}\n")
    assert not work.is_completed()
    try:
        work.wait()
    except RuntimeError as error:
        sys.stderr.write(f"GROUP: {error}\n")
    assert work.is_completed()
    assert not work.is_success()
    assert work.exception() is not None
    try:
        dist.barrier()
    except RuntimeError as error:
        sys.stderr.write(f"AFTER: {error}\n")


def sizes() -> None:
    """A message longer than the tensor that receives it, and one that is shorter; each breaks its group alone."""
    for length in (4, 2):
        group = dist.new_group(backend="mpi4py", timeout=timedelta(seconds=60))
        if group.rank() == 0:
            dist.send(torch.ones(length), 1, group)
            continue
        try:
            dist.recv(torch.zeros(3), 0, group)
        except RuntimeError as error:
            sys.stderr.write(f"SIZES: {error}\n")
    dist.barrier()


def crash() -> None:
    """Rank 1 raises while the others wait for it."""
    if dist.group.WORLD.rank() == 1:
        raise KeyError("this rank's own mistake")
    dist.all_reduce(torch.ones(3))


def leave() -> None:
    """All is well, and no rank destroys its group or waits for its last operation."""
    dist.all_reduce(torch.ones(3))
    time.sleep(0.3 * dist.group.WORLD.rank())
    dist.all_reduce(torch.ones(3), async_op=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    timeout = timedelta(seconds=2 if sys.argv[1] == "late" else 60)
    dist.init_process_group("mpi4py", timeout=timeout, init_method=sys.argv[2] if len(sys.argv) > 2 else None)
    {"late": late, "sizes": sizes, "crash": crash, "leave": leave}[sys.argv[1]]()
