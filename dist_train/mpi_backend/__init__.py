"""The backend "mpi4py" of torch.distributed: its collectives and messages over any MPI that mpi4py can load.

PyTorch's wheels have no MPI. This package needs nothing else of Reelscale, so any PyTorch program may use it:

    import dist_train.mpi_backend                       # on every rank, before the next line
    torch.distributed.init_process_group("mpi4py")      # under mpirun, with no further setting

    mpirun -n 4 python program.py

**Rendezvous.** PyTorch wants a key-value store beside the ranks. The import sets those of `env://`'s variables (rank,
world size, rank 0's address and a free port there) that are missing, from MPI itself; a variable that is set stays.
`init_method="mpi4py://"` does the same without the environment, and keeps the port from the moment it is chosen.

**Devices.** PyTorch makes a group with a Python process group in it of that one alone, so "mpi4py" carries the tensors
of all devices; "cpu:mpi4py,cuda:nccl" is not to be had, but a second group of NCCL is. CUDA tensors go to MPI as they
are where the MPI says that it is CUDA-aware (REELSCALE_MPI_CUDA=0 or 1 overrules it), else through pinned host memory.

**Semantics.** As Gloo's, and: reductions of float16 and bfloat16 run in MPI with an operation of ours, which rounds to
the type after each addition as Gloo does, and so moves half the bytes that staging in float32 would; reductions of bool
are logical; AVG is SUM and a division; BAND, BOR and BXOR take integers and bool; a message of another size than the
tensor that receives it is an error. Collectives of one group are posted in the order in which they are called, under a
lock, from however many threads; as with every backend that order must be the same on every rank.

**Time-outs.** A collective or message that does not complete in the group's time-out raises RuntimeError and breaks
its group. `Work.wait(timeout)` raises earlier and breaks nothing. MPI's own errors are RuntimeErrors with MPI's words.

**Exit.** A process that leaves for a good reason waits for its peers in MPI_Finalize, as every MPI program does. One
that leaves on an uncaught exception, after `ProcessGroup.abort()`, or with a collective that never completed, gives its
peers `exits.GRACE_SECONDS` to leave as well, then calls MPI_Abort, which ends the job: nobody waits for the dead.
"""

from __future__ import annotations

from dist_train.mpi_backend.group import MPIGroup, register
from dist_train.mpi_backend.library import MPI
from dist_train.mpi_backend.rendezvous import offer_rendezvous

__all__ = ["MPI", "MPIGroup"]

register()
offer_rendezvous()
