"""Whole states and Python objects from rank to rank."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_train.horovod.mpi_ops import (
    ProcessSet,
    allgather,
    broadcast_,
    broadcast_async_,
    global_process_set,
    rank,
    synchronize,
)


def broadcast_parameters(
    params: dict[str, Any] | list[Any], root_rank: int, process_set: ProcessSet = global_process_set
) -> None:
    """Overwrites tensors with those of `root_rank`, in place.

    Args:
        params: a `state_dict()`, or a list of tensors or of (name, tensor). Entries that are None are left out.
        root_rank: the rank in the whole job to copy from.
        process_set: the ranks that take part.

    Raises:
        ValueError: `params` is something else.
    """
    if isinstance(params, dict):
        named = sorted(params.items())
    elif isinstance(params, list):
        named = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    else:
        raise ValueError(
            f"broadcast_parameters: invalid params of type {type(params)}; pass model.state_dict() or a list"
        )
    whole = [(name, tensor, tensor.detach().contiguous()) for name, tensor in named if tensor is not None]
    handles = [broadcast_async_(sent, root_rank, name, process_set=process_set) for name, _, sent in whole]
    for handle, (_, tensor, received) in zip(handles, whole, strict=True):
        synchronize(handle)
        if not tensor.is_contiguous():  # of a channels-last model
            tensor.detach().copy_(received)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: torch.nn.Module | None = None,  # noqa: ARG001
    process_set: ProcessSet = global_process_set,
) -> None:
    """Makes every rank's optimizer state and options (learning rates, ...) those of `root_rank`.

    The structure travels as an object and the tensors by themselves, so a rank whose state is still empty takes part
    like any other and no step is simulated. Parameters without a gradient get one of zeros where the optimizer has no
    state, as under Horovod.

    Args:
        optimizer: any of `torch.optim` but LBFGS, wrapped in `DistributedOptimizer` or not.
        root_rank: the rank in the whole job to copy from.
        model: not needed; accepted as Horovod accepts it.
        process_set: the ranks that take part.

    Raises:
        ValueError: the optimizer is an LBFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("cannot broadcast torch.optim.LBFGS state: use broadcast_object(optimizer.state_dict())")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not optimizer.state:
        for parameter in parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    tensors: list[torch.Tensor] = []

    def describe(tensor: torch.Tensor) -> _Form:
        tensors.append(tensor)
        return _Form(shape=tensor.shape, dtype=tensor.dtype, device_type=tensor.device.type)

    def allocate(form: _Form) -> torch.Tensor:
        device = next((p.device for p in parameters if p.device.type == form.device_type), form.device_type)
        tensors.append(torch.empty(form.shape, dtype=form.dtype, device=device))
        return tensors[-1]

    is_root = rank() == root_rank
    skeleton = _replace(optimizer.state_dict(), torch.Tensor, describe) if is_root else None
    skeleton = broadcast_object(skeleton, root_rank, "optimizer_state", process_set)
    state = None if is_root else _replace(skeleton, _Form, allocate)
    named = [(f"optimizer_state.{index}", tensor) for index, tensor in enumerate(tensors)]
    broadcast_parameters(named, root_rank, process_set)
    if state is not None:
        optimizer.load_state_dict(state)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Stands for a tensor in the object that describes a state."""

    shape: torch.Size
    dtype: torch.dtype
    device_type: str


def _replace(value: Any, kind: type, new: Callable[[Any], Any]) -> Any:
    """`value` with everything of type `kind` in its dicts, lists and tuples replaced."""
    if isinstance(value, kind):
        return new(value)
    if isinstance(value, dict):
        return {key: _replace(item, kind, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_replace(item, kind, new) for item in value])
    return value


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """The `obj` of `root_rank`, on every rank of the set.

    It travels by cloudpickle where that is installed, else by pickle: a lambda or a class of `__main__`'s functions
    needs cloudpickle. `name` tells apart the calls of several threads.
    """
    name = f"broadcast_object.{name or 'unnamed'}"
    is_root = rank() == root_rank
    content = _dump(obj) if is_root else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([content.numel()])
    broadcast_(length, root_rank, f"{name}.length", process_set=process_set)
    if not is_root:
        content = torch.empty(int(length), dtype=torch.uint8)
    broadcast_(content, root_rank, f"{name}.content", process_set=process_set)
    return obj if is_root else _load(content)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """Every rank's `obj`, in rank order, on every rank of the set. Pickled as `broadcast_object` does."""
    name = f"allgather_object.{name or 'unnamed'}"
    content = _dump(obj)
    lengths = allgather(torch.tensor([content.numel()]), name=f"{name}.length", process_set=process_set)
    contents = allgather(content, name=f"{name}.content", process_set=process_set)
    return [_load(part) for part in contents.split(lengths.tolist())]


def _dump(obj: Any) -> torch.Tensor:
    try:
        import cloudpickle as pickler  # type: ignore[import-not-found]
    except ImportError:
        pickler = pickle
    return torch.frombuffer(bytearray(pickler.dumps(obj)), dtype=torch.uint8)


def _load(content: torch.Tensor) -> Any:
    return pickle.load(io.BytesIO(content.numpy().tobytes()))
