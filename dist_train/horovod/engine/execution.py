"""The exchange itself: carries out one response on a process group of torch.distributed.

Every member of the process set calls the same function at the same place in the same order. What a rank contributes
that has joined is zeros. Data that is moved and not computed with travels as bytes, which every backend can do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.horovod.engine.entries import Entry
from dist_train.horovod.engine.messages import REDUCE_OPS, Request, Response
from dist_train.reduction.adasum import adasum_

DTYPES = frozenset(("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "bool"))
"""What Horovod takes, and bfloat16."""

_WIDER = {torch.int16: torch.int32, torch.bool: torch.int32}
"""In what a dtype is reduced that the backends cannot reduce."""
_OPS = {
    "Average": dist.ReduceOp.SUM,
    "Sum": dist.ReduceOp.SUM,
    "Min": dist.ReduceOp.MIN,
    "Max": dist.ReduceOp.MAX,
    "Product": dist.ReduceOp.PRODUCT,
}


def execute(
    response: Response,
    entries: Sequence[Entry | None],
    members: Sequence[int],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Carries out a response and sets the entries' outputs.

    Args:
        response: what to do; an exchange of tensors.
        entries: this rank's part in each of the response's requests; None where it has joined.
        members: the ranks of the response's process set.
        group: their process group, in the same order.
        device: where to make the zeros of a rank that has joined, when the others' tensors are on a GPU.
    """
    if response.kind == "allreduce":
        _allreduce(response, entries, group, device)
        return
    present = [entry for entry in entries if entry is not None]
    if response.kind == "broadcast":
        _broadcast(present, members.index(response.requests[0].root), group)
        return
    for entry in present:
        if response.kind == "allgather":
            sizes = zip(entry.inputs, response.first_dims, strict=True)
            entry.outputs = [_allgather(tensor, first_dims, group) for tensor, first_dims in sizes]
        elif response.kind == "alltoall":
            _alltoall(entry, group)
        else:
            entry.outputs = [_reducescatter(tensor, entry.request, group) for tensor in entry.inputs]


def reducescatter_rows(num_rows: int, num_ranks: int) -> list[int]:
    """How many rows each rank gets: as equal as can be, the larger parts first."""
    rows, extra = divmod(num_rows, num_ranks)
    return [rows + (rank < extra) for rank in range(num_ranks)]


def _allreduce(
    response: Response, entries: Sequence[Entry | None], group: dist.ProcessGroup, device: torch.device
) -> None:
    tensors: list[Tensor] = []
    for request, entry in zip(response.requests, entries, strict=True):
        if entry is None:
            tensors += _zeros(request, device)
            continue
        entry.outputs = entry.inputs if entry.in_place else [torch.empty_like(tensor) for tensor in entry.inputs]
        for output, tensor in zip(entry.outputs, entry.inputs, strict=True):
            if output is not tensor:
                output.copy_(tensor)
        tensors += entry.outputs
    first = response.requests[0]
    for _, alike in itertools.groupby(sorted(tensors, key=lambda tensor: str(tensor.dtype)), lambda t: t.dtype):
        _reduce(list(alike), first, group)


def _reduce(tensors: list[Tensor], request: Request, group: dist.ProcessGroup) -> None:
    """In place; all of one dtype."""
    if REDUCE_OPS[request.op] == "Adasum":
        for tensor in tensors:
            _scale(tensor, request.prescale)
        adasum_(tensors, group=group)
        for tensor in tensors:
            _scale(tensor, request.postscale)
        return
    dtype = tensors[0].dtype
    alone = len(tensors) == 1 and dtype not in _WIDER
    flat = tensors[0] if alone else torch.cat([tensor.reshape(-1) for tensor in tensors]).to(_WIDER.get(dtype, dtype))
    _scale(flat, request.prescale)
    if flat.numel():
        dist.all_reduce(flat, _OPS[REDUCE_OPS[request.op]], group=group)
    _finish_scaling(flat, request, group)
    if not alone:
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _finish_scaling(tensor: Tensor, request: Request, group: dist.ProcessGroup) -> None:
    if REDUCE_OPS[request.op] == "Average":
        tensor.div_(group.size(), rounding_mode=None if tensor.is_floating_point() else "trunc")
    _scale(tensor, request.postscale)


def _scale(tensor: Tensor, factor: float) -> None:
    """As Horovod does: integers in float64, cut off; float16 in float32."""
    if factor == 1.0:
        return
    if tensor.is_floating_point():
        tensor.mul_(factor)
    else:
        tensor.copy_(tensor.double().mul_(factor))


def _zeros(request: Request, device: torch.device) -> Iterator[Tensor]:
    for shape, dtype in zip(request.shapes, request.dtypes, strict=True):
        yield torch.zeros(
            shape, dtype=getattr(torch, dtype), device=device if request.device == "cuda" else torch.device("cpu")
        )


def _broadcast(entries: list[Entry], root: int, group: dist.ProcessGroup) -> None:
    for entry in entries:
        entry.outputs = entry.inputs if entry.in_place else [tensor.clone() for tensor in entry.inputs]
    tensors = [output for entry in entries for output in entry.outputs]
    flat = tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
    if flat.numel():
        dist.broadcast(_bytes(flat), group_src=root, group=group)
    if len(tensors) > 1 and group.rank() != root:
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _allgather(tensor: Tensor, first_dims: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    output = tensor.new_empty((sum(first_dims), *tensor.shape[1:]))
    if not output.numel():
        return output
    row = output[:1].numel() * output.element_size()
    longest = max(first_dims) * row
    mine = _bytes(tensor)
    if min(first_dims) == max(first_dims):
        dist.all_gather_single(_bytes(output), mine, group=group)
        return output
    padded = mine.new_zeros(longest)
    padded[: mine.numel()] = mine
    gathered = mine.new_empty(group.size() * longest)
    dist.all_gather_single(gathered, padded, group=group)
    parts = [part[: rows * row] for part, rows in zip(gathered.split(longest), first_dims, strict=True)]
    torch.cat(parts, out=_bytes(output))
    return output


def _alltoall(entry: Entry, group: dist.ProcessGroup) -> None:
    tensor = entry.inputs[0]
    sent = torch.tensor(entry.splits, dtype=torch.int64)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    rows = received.tolist()
    entry.received_splits = received.to(torch.int32)
    output = tensor.new_empty((sum(rows), *tensor.shape[1:]))
    entry.outputs = [output]
    row = tensor.new_empty((1, *tensor.shape[1:])).numel() * tensor.element_size()
    if row:
        dist.all_to_all_single(
            _bytes(output),
            _bytes(tensor)[: sum(entry.splits) * row],
            [count * row for count in rows],
            [count * row for count in entry.splits],
            group=group,
        )


def _reducescatter(tensor: Tensor, request: Request, group: dist.ProcessGroup) -> Tensor:
    rows = reducescatter_rows(tensor.shape[0], group.size())
    wire = tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))
    if rows[0] != rows[-1]:
        parts = [torch.cat([part, part.new_zeros(rows[0] - len(part), *part.shape[1:])]) for part in wire.split(rows)]
        wire = torch.cat(parts)
    elif request.prescale != 1.0 and wire is tensor:
        wire = tensor.clone()
    _scale(wire, request.prescale)
    output = wire.new_empty((rows[0], *tensor.shape[1:]))
    if output.numel():
        dist.reduce_scatter_single(output, wire, _OPS[REDUCE_OPS[request.op]], group=group)
    _finish_scaling(output, request, group)
    return output[: rows[group.rank()]].to(tensor.dtype)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
