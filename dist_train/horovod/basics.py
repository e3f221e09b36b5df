"""init, shutdown, and where this process stands."""

from __future__ import annotations

import atexit
import importlib.util
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from dist_train.horovod import process_sets as sets
from dist_train.horovod.bootstrap import Groups, chosen_ranks, connect, find_nodes, join_default_group
from dist_train.horovod.context import Context, current, required, set_current
from dist_train.horovod.engine.engine import Engine
from dist_train.horovod.engine.timeline import Timeline
from dist_train.horovod.settings import read_settings


class _Groups:
    """What outlives `shutdown`, so that `init` can be called again: the process groups."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As before the first `init`."""
        self.stack = ExitStack()
        self.by_world: dict[tuple[int, ...], Groups] = {}
        self.default: dist.ProcessGroup | None = None
        self.broken = False
        self.made_default = False

    def of_world(self, ranks: Sequence[int]) -> Groups:
        if self.default is not dist.group.WORLD:  # the program has made a new one
            self.default, self.by_world = dist.group.WORLD, {}
        return self.by_world.setdefault(tuple(ranks), Groups(ranks))


_groups = _Groups()


def init(comm: Any = None, process_sets: Sequence[sets.ProcessSet] | str | None = None) -> None:
    """Finds the other ranks and connects to them; nothing where that has been done.

    The world is that of the default process group where the program has made one, otherwise what the launcher says
    (mpirun, torchrun, srun, reelscale; alone without one).

    Args:
        comm: which ranks of it; a list of ranks or an mpi4py communicator. All, where it is None or empty.
        process_sets: sets to make usable, the same on every rank; or "dynamic", which means none and is not needed.

    Raises:
        ValueError: `comm` or `process_sets` are wrong, or a HOROVOD_ variable is.
        HorovodInternalError: the ranks gave different process sets.
        RuntimeError: the ranks did not find each other in time.
    """
    if current() is not None:
        return
    settings = read_settings(os.environ)
    if isinstance(process_sets, str) and process_sets.lower() != "dynamic":
        raise ValueError(f'hvd.init(process_sets={process_sets!r}): give a list of ProcessSet, or "dynamic"')
    _groups.made_default = join_default_group(_groups.stack) or _groups.made_default
    ranks = chosen_ranks(comm)
    groups = _groups.of_world(ranks)
    members = tuple(range(len(ranks)))
    group = groups.of(members)
    nodes, local_ranks = find_nodes(group)
    channel, coordinator = connect(group, nodes, settings)
    timeline = Timeline()
    if settings.timeline and group.rank() == 0:
        timeline.start(settings.timeline, settings.mark_cycles)
    on_gpu = torch.cuda.is_available() and "cuda" in str(dist.get_backend_config(group))
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    engine = Engine(channel, group.size(), settings=settings, timeline=timeline, group_of=groups.of, device=device)
    set_current(
        Context(
            engine=engine,
            coordinator=coordinator,
            timeline=timeline,
            rank=group.rank(),
            nodes=nodes,
            local_ranks=local_ranks,
            device=device,
        )
    )
    atexit.unregister(leave_world)
    atexit.register(leave_world)
    try:
        sets.set_up([] if process_sets is None or isinstance(process_sets, str) else process_sets)
    except (ValueError, RuntimeError):
        shutdown()
        raise


def shutdown() -> None:
    """Leaves the other ranks, which may go on among themselves; nothing where there is nothing to leave.

    Collectives of this rank that are under way fail, and those of others that need this rank. Rank 0, which carries the
    coordination, waits until all others have left too. The default process group stays, so that `init` can follow.
    """
    context = current()
    if context is None:
        return
    context.engine.close()
    if context.coordinator is not None:
        context.coordinator.join()
    context.timeline.stop()
    _groups.broken = _groups.broken or context.engine.stuck
    set_current(None)
    sets.global_process_set.ranks = None


def leave_world() -> None:
    """`shutdown`, and ends the default process group if `init` made it: the next `init` looks for the ranks anew."""
    shutdown()
    if not _groups.broken:
        _groups.stack.close()
    _groups.forget()


def owns_world() -> bool:
    """Whether `init` made the default process group, so that `leave_world` ends it."""
    return _groups.made_default


def is_initialized() -> bool:
    """Whether `init` has been called, and `shutdown` not since."""
    return current() is not None


def rank() -> int:
    """Number of this process in the world. Raises ValueError before `init`, as all that follow."""
    return required().rank


def size() -> int:
    """Number of processes in the world."""
    return required().size


def local_rank() -> int:
    """Number of this process on its node."""
    return required().local_ranks[required().rank]


def local_size() -> int:
    """Number of processes on this node."""
    return len(required().neighbours)


def cross_rank() -> int:
    """Number of this node among those that have a process of this local rank."""
    return required().counterparts.index(required().rank)


def cross_size() -> int:
    """Number of nodes that have a process of this local rank."""
    return len(required().counterparts)


def is_homogeneous() -> bool:
    """Whether every node has the same number of processes."""
    nodes = required().nodes
    return len({nodes.count(node) for node in set(nodes)}) == 1


def start_timeline(file_path: str, mark_cycles: bool = False) -> None:
    """Begins a Chrome trace of this rank's collectives; in Horovod's way only rank 0 writes one."""
    context = required()
    if context.rank == 0:
        context.timeline.start(file_path, mark_cycles)


def stop_timeline() -> None:
    """Completes the trace."""
    required().timeline.stop()


def mpi_built() -> bool:
    """Whether collectives can run on MPI: mpi4py is installed."""
    return importlib.util.find_spec("mpi4py") is not None


def mpi_enabled() -> bool:
    """Whether they do."""
    return dist.is_initialized() and "mpi" in str(dist.get_backend_config(dist.group.WORLD))


def mpi_threads_supported() -> bool:
    """Whether MPI may be called from several threads.

    Raises:
        ValueError: collectives do not run on MPI, so the question has no answer.
    """
    if not mpi_enabled():
        raise ValueError("Horovod MPI is not enabled: collectives run on Gloo or NCCL here")
    from mpi4py import MPI

    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def gloo_built() -> bool:
    """Whether PyTorch has Gloo."""
    return bool(dist.is_gloo_available())


def gloo_enabled() -> bool:
    """Whether Gloo carries the host's tensors."""
    return gloo_built() and not mpi_enabled()


def nccl_built() -> int:
    """NCCL's version as a number such as 22703; 0 where PyTorch has none."""
    if not dist.is_nccl_available():
        return 0
    major, minor, patch = torch.cuda.nccl.version()[:3]
    return int(major * 10000 + minor * 100 + patch)


def cuda_built() -> bool:
    """Whether PyTorch has CUDA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether PyTorch has ROCm."""
    return torch.version.hip is not None


def ddl_built() -> bool:
    """False: IBM's DDL has no place here."""
    return False


def ccl_built() -> bool:
    """False: oneCCL has no place here."""
    return False
