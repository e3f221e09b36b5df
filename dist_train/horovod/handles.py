"""Handles: from the arguments of a collective to a request under way, and from there to its result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.horovod.context import Context, required
from dist_train.horovod.engine.entries import Entry
from dist_train.horovod.engine.execution import DTYPES
from dist_train.horovod.engine.messages import REDUCE_OPS, Request
from dist_train.horovod.process_sets import ProcessSet

_handles: dict[int, tuple[Entry, Any]] = {}
"""What is under way or not fetched yet, and in what form its result is wanted."""
_numbers = itertools.count()


def submit(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    *,
    op: int = -1,
    root: int = -1,
    factors: tuple[float, float] = (1.0, 1.0),
    splits: Tensor | Sequence[int] | None = None,
    in_place: bool = False,
    grouped: bool = False,
) -> int:
    """Asks for a collective and returns a handle.

    Raises:
        ValueError: Horovod is not initialised, or this rank's arguments are wrong. Where the other ranks would wait for
            this one, they get an error too.
        NotImplementedError: an Adasum that Horovod does not have either.
        HorovodInternalError: Horovod is shut down.
    """
    context = required()
    members = _members(kind, process_set, context)
    devices = sorted({tensor.device.type for tensor in tensors})
    request = Request(
        kind=kind,
        name=name or "",
        process_set=process_set.process_set_id or 0,
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        op=op,
        root=root,
        prescale=float(factors[0]),
        postscale=float(factors[1]),
        device=devices[0] if devices else "cpu",
    )
    entry = Entry(request=request, inputs=[tensor.detach() for tensor in tensors], in_place=in_place)
    problem = _unusable(request, tensors, devices, members)
    if kind == "reducescatter" and REDUCE_OPS[op] == "Adasum":
        raise NotImplementedError("reducescatter has no Adasum: use hvd.Sum or hvd.Average")
    if kind == "alltoall" and not problem:
        entry.splits, problem = _rows_for_each(tensors[0], splits, len(members))
    if problem:
        context.engine.submit(Entry(request=request._replace(problem=problem)))
        raise ValueError(f"{kind} {name or ''}: {problem}")
    if devices == ["cuda"]:
        entry.inputs_ready = torch.cuda.current_stream().record_event()
    context.engine.submit(entry)
    handle = next(_numbers)
    _handles[handle] = entry, tuple if grouped else splits
    return handle


def poll(handle: int) -> bool:
    """Whether `synchronize` would return at once."""
    entry, _ = _handles[handle]
    return entry.done.is_set()


def synchronize(handle: int) -> Any:
    """Waits for a collective and returns its result; None for a handle that has been fetched before.

    Raises:
        HorovodInternalError: it failed.
    """
    if handle not in _handles:
        return None
    entry, form = _handles.pop(handle)
    if not entry.done.is_set():
        required().engine.flush()
    entry.wait()
    if form is tuple:
        return tuple(entry.outputs)
    if entry.received_splits is not None and isinstance(form, Tensor):
        return entry.outputs[0], entry.received_splits.to(form.device)
    return entry.result()


def join(device: int = -1) -> int:
    """Says that this rank has no more data, takes part in the others' all-reduces with zeros, waits for all to join.

    Args:
        device: the GPU to make zeros on when the others exchange tensors on GPUs; -1: the current one at `init`.

    Returns:
        The rank that joined last.

    Raises:
        HorovodInternalError: a rank is gone, or Horovod is shut down.
    """
    on_gpu = device >= 0 and torch.cuda.is_available()
    entry = required().engine.join(torch.device("cuda", device) if on_gpu else None)
    entry.wait()
    return entry.value


def _members(kind: str, process_set: ProcessSet, context: Context) -> tuple[int, ...]:
    number = process_set.process_set_id
    members = None if number is None else context.engine.members.get(number)
    if members is None:
        raise ValueError(f"{kind}: Process set provided does not exist, or has not been registered: {process_set}")
    if context.rank not in members:
        raise ValueError(f"{kind}: Rank {context.rank} is not a member of the provided process set {list(members)}.")
    return members


def _unusable(request: Request, tensors: Sequence[Tensor], devices: Sequence[str], members: Sequence[int]) -> str:
    for tensor, dtype in zip(tensors, request.dtypes, strict=True):
        if dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
            return f"Tensor type {tensor.type()} is not supported."
        if not tensor.is_contiguous():
            return f"Tensor is required to be contiguous, not of strides {tensor.stride()} for {list(tensor.shape)}."
    if len(devices) > 1:
        return f"the tensors of one group are on {' and '.join(devices)}"
    if request.kind == "broadcast" and request.root not in members:
        return f"root rank {request.root} is not in the process set {list(members)}"
    reduces = request.kind in ("allreduce", "reducescatter")
    if reduces and not 0 <= request.op < len(REDUCE_OPS):
        return f"{request.op!r} is no reduce op: give hvd.{', hvd.'.join(REDUCE_OPS)}"
    if reduces and REDUCE_OPS[request.op] == "Adasum" and not all(tensor.is_floating_point() for tensor in tensors):
        return f"Adasum takes floating-point tensors, not {', '.join(sorted(set(request.dtypes)))}"
    return ""


def _rows_for_each(tensor: Tensor, splits: Any, num_ranks: int) -> tuple[list[int], str]:
    """How many rows an alltoall sends to each rank, or what is wrong."""
    if tensor.dim() == 0:
        return [], "alltoall needs a tensor with a first dimension to divide"
    rows = tensor.shape[0]
    if splits is None or len(splits) == 0:
        if rows % num_ranks:
            return [], (
                "splits not provided, but first dimension of tensor is not an even multiple of the number of workers: "
                f"{rows} rows, {num_ranks} ranks."
            )
        return [rows // num_ranks] * num_ranks, ""
    if isinstance(splits, Tensor) and (splits.dtype != torch.int32 or splits.dim() != 1):
        return [], f"alltoall expects 1D splits of 32-bit integer elements, not {splits.dim()}D of {splits.dtype}."
    counts = [int(count) for count in splits]
    if len(counts) != num_ranks:
        return [], f"Number of entries in splits ({len(counts)}) does not equal number of workers ({num_ranks})."
    if sum(counts) > rows or min(counts) < 0:
        return [], (
            "Sum of splits entries is greater than the first dimension of tensor, or one is negative: "
            f"{counts}, {rows} rows."
        )
    return counts, ""
