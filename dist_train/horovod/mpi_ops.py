"""The collectives of `horovod.torch`, with its names, defaults and return values.

Each comes in up to four forms: `op` waits and is differentiable; `op_async` returns a handle for `synchronize` and
`poll`; `op_` and `op_async_` write into their argument. Ranks may ask for named collectives in different orders.
Everything that the ranks must agree on is compared before data moves: a `HorovodInternalError` on every rank says who
differs in what. A ValueError is this rank's own mistake (a name that is under way, a tensor of a type that Horovod does
not take, a process set that it is not in).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.horovod import differentiable
from dist_train.horovod.basics import (
    ccl_built,
    cross_rank,
    cross_size,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rank,
    rocm_built,
    shutdown,
    size,
    start_timeline,
    stop_timeline,
)
from dist_train.horovod.compression import Compression
from dist_train.horovod.exceptions import HorovodInternalError, HostsUpdatedInterrupt
from dist_train.horovod.handles import join, poll, submit, synchronize
from dist_train.horovod.process_sets import ProcessSet, add_process_set, global_process_set, remove_process_set

Average, Sum, Adasum, Min, Max, Product = range(6)

__all__ = [
    "Adasum", "Average", "HorovodInternalError", "HostsUpdatedInterrupt", "Max", "Min", "ProcessSet", "Product", "Sum",
    "add_process_set", "allgather", "allgather_async", "allreduce", "allreduce_", "allreduce_async",
    "allreduce_async_", "alltoall", "alltoall_async", "barrier", "broadcast", "broadcast_", "broadcast_async",
    "broadcast_async_", "ccl_built", "cross_rank", "cross_size", "cuda_built", "ddl_built", "global_process_set",
    "gloo_built", "gloo_enabled", "grouped_allgather", "grouped_allgather_async", "grouped_allreduce",
    "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_", "grouped_reducescatter",
    "grouped_reducescatter_async", "init", "is_homogeneous", "is_initialized", "join", "local_rank", "local_size",
    "mpi_built", "mpi_enabled", "mpi_threads_supported", "nccl_built", "poll", "rank", "reducescatter",
    "reducescatter_async", "remove_process_set", "rocm_built", "shutdown", "size", "sparse_allreduce_async",
    "start_timeline", "stop_timeline", "synchronize",
]  # fmt: skip


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """The ranks' tensors, which have one shape and dtype, reduced with `op`. Differentiable.

    Args:
        tensor: stays as it is.
        average: deprecated: True means op=Average, False op=Sum.
        name: what the ranks' calls are matched by; without one, calls are numbered and must come in the same order.
        compression: of `hvd.Compression`: how the tensor travels.
        op: Average (the default), Sum, Adasum, Min, Max or Product. An average of integers is cut off towards zero.
        prescale_factor: multiplies the tensor before the exchange.
        postscale_factor: multiplies the result.
        process_set: the ranks that take part.
    """
    compressed, context = compression.compress(tensor)
    factors = prescale_factor, postscale_factor
    reduced = differentiable.Allreduce.apply(name, _choose_op(op, average), factors, process_set, compressed)
    return compression.decompress(reduced[0], context)


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts `allreduce`; returns a handle."""
    factors = prescale_factor, postscale_factor
    return submit("allreduce", [tensor], name, process_set, op=_choose_op(op, average), factors=factors)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """`allreduce` into `tensor`, which is returned."""
    handle = allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set)
    return synchronize(handle)


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts `allreduce_`; returns a handle."""
    factors = prescale_factor, postscale_factor
    return submit("allreduce", [tensor], name, process_set, op=_choose_op(op, average), factors=factors, in_place=True)


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """`allreduce` of several tensors under one name, exchanged together. Differentiable."""
    compressed, contexts = zip(*map(compression.compress, tensors), strict=True)
    factors = prescale_factor, postscale_factor
    reduced = differentiable.Allreduce.apply(name, _choose_op(op, average), factors, process_set, *compressed)
    return [compression.decompress(tensor, context) for tensor, context in zip(reduced, contexts, strict=True)]


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts `grouped_allreduce`; returns one handle, for a tuple."""
    factors = prescale_factor, postscale_factor
    return submit("allreduce", tensors, name, process_set, op=_choose_op(op, average), factors=factors, grouped=True)


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> tuple[Tensor, ...]:
    """`grouped_allreduce` into `tensors`, which are returned."""
    handle = grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    return synchronize(handle)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts `grouped_allreduce_`; returns one handle, for a tuple."""
    factors, chosen = (prescale_factor, postscale_factor), _choose_op(op, average)
    return submit("allreduce", tensors, name, process_set, op=chosen, factors=factors, in_place=True, grouped=True)


def sparse_allreduce_async(
    tensor: Tensor, name: str, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Starts a Sum or Average of sparse tensors, as an allgather; returns a function that waits for it."""
    indices = allgather_async(tensor._indices().t().contiguous(), f"{name}.indices", process_set)
    values = allgather_async(tensor._values(), f"{name}.values", process_set)

    def wait() -> Tensor:
        gathered: Tensor = synchronize(values)
        if op == Average:
            gathered = gathered / (process_set.size() or 1)
        return torch.sparse_coo_tensor(synchronize(indices).t(), gathered, tensor.size())

    return wait


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """The ranks' tensors one after the other along the first dimension, in which they may differ. Differentiable."""
    return differentiable.Allgather.apply(name, process_set, tensor)[0]


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Starts `allgather`; returns a handle."""
    return submit("allgather", [tensor], name, process_set)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> tuple[Tensor, ...]:
    """`allgather` of several tensors under one name. Differentiable."""
    return differentiable.Allgather.apply(name, process_set, *tensors)


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Starts `grouped_allgather`; returns one handle, for a tuple."""
    return submit("allgather", tensors, name, process_set, grouped=True)


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """The tensor of `root_rank`, which is a rank in the world also where a process set is given. Differentiable."""
    return differentiable.Broadcast.apply(root_rank, name, process_set, tensor)


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Starts `broadcast`; returns a handle."""
    return submit("broadcast", [tensor], name, process_set, root=root_rank)


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """`broadcast` into `tensor`, which is returned."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Starts `broadcast_`; returns a handle."""
    return submit("broadcast", [tensor], name, process_set, root=root_rank, in_place=True)


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Sends rows of `tensor` to each rank and returns what came, in order of ranks. Differentiable.

    Args:
        tensor: rows for rank 0 first, then for rank 1, and so on.
        splits: how many rows for each, int32; without it, as many for each, and only the rows that came are returned,
            not a pair of them and how many came from each.
        name: as in `allreduce`.
        process_set: as in `allreduce`.
    """
    received = differentiable.Alltoall.apply(splits, name, process_set, tensor)
    return received[0] if splits is None else received


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Starts `alltoall`; returns a handle, always for a pair."""
    return submit("alltoall", [tensor], name, process_set, splits=splits)


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """This rank's part, along the first dimension, of the reduced tensors; the first ranks get the larger parts.

    Arguments are those of `allreduce`; Adasum is an error. Differentiable.
    """
    compressed, context = compression.compress(tensor)
    factors = prescale_factor, postscale_factor
    return compression.decompress(
        differentiable.Reducescatter.apply(name, op, factors, process_set, compressed)[0], context
    )


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Starts `reducescatter`; returns a handle."""
    return submit("reducescatter", [tensor], name, process_set, op=op, factors=(prescale_factor, postscale_factor))


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """`reducescatter` of several tensors under one name. Differentiable."""
    compressed, contexts = zip(*map(compression.compress, tensors), strict=True)
    factors = prescale_factor, postscale_factor
    parts = differentiable.Reducescatter.apply(name, op, factors, process_set, *compressed)
    return [compression.decompress(part, context) for part, context in zip(parts, contexts, strict=True)]


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Starts `grouped_reducescatter`; returns one handle, for a tuple."""
    factors = prescale_factor, postscale_factor
    return submit("reducescatter", tensors, name, process_set, op=op, factors=factors, grouped=True)


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Returns when all ranks of the set have come here, and all that they all had asked for before is done."""
    synchronize(submit("barrier", [], None, process_set))


def _choose_op(op: int | None, average: bool | None) -> int:
    if average is None:
        return Average if op is None else op
    if op is not None:
        raise ValueError("The op parameter supersedes average. Please provide only one of them.")
    warnings.warn(
        "Parameter `average` has been replaced with `op` and will be removed in v1.0", DeprecationWarning, stacklevel=3
    )
    return Average if average else Sum
