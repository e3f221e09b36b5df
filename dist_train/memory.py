"""What a training step needs of a process's memory: counted from the model, not tried out.

Activations are measured by running forward and backward on the `meta` device, where tensors have shapes and no data,
and adding up what is alive; the rest is arithmetic on the parameters. Not counted: what PyTorch and its libraries take
for themselves (CUDA's context, cuDNN's workspaces, the allocator's gaps), the loader's workers, and an evaluation, in
which `fsdp2` and `zero3` hold the whole weights for a while.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.blocks import repeated_blocks
from dist_train.phases import Task
from dist_train.strategies import StrategyName


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a process holds whatever the micro-batch."""

    weights: float
    """Parameters and buffers, the pieces' own copies, and what is gathered at a time."""
    gradients: float
    """Of the trainable parameters."""
    optimizer: float
    """Momenta and their like."""
    exchange: float
    """Buckets."""
    average: float
    """The weight average (EMA)."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Bytes of a model's parts."""

    trainable: int
    """Parameters that are trained."""
    fixed: int
    """Frozen parameters, and buffers."""
    unit: int
    """The largest unit that `fsdp2` and `zero3` gather at a time: a repeated block, or all that is outside of them."""

    @classmethod
    def of(cls, module: nn.Module) -> ModelSize:
        """The sizes of `module`, which may be on `meta`."""
        parameters = list(module.parameters())
        trainable = _bytes([p for p in parameters if p.requires_grad])
        blocks = [_bytes(list(block.parameters())) for block in repeated_blocks(module)]
        outside = _bytes(parameters) - sum(blocks)
        return cls(
            trainable=trainable,
            fixed=_bytes([*parameters, *module.buffers()]) - trainable,
            unit=max([outside, *blocks]),
        )


def footprint(
    strategy: StrategyName,
    size: ModelSize,
    *,
    world_size: int,
    bucket_bytes: int,
    optimizer_copies: int = 1,
    with_average: bool = False,
) -> Footprint:
    """What `strategy` keeps on each of `world_size` processes.

    Args:
        strategy: a key of `dist_train.strategies.STRATEGIES`; in a world of one process all keep the same.
        size: of the model.
        world_size: processes.
        bucket_bytes: size of a bucket.
        optimizer_copies: tensors of a parameter's size that the optimizer keeps (SGD's momentum: 1, Adam: 2).
        with_average: a weight average is kept.
    """
    whole, part = float(size.trainable), size.trainable / world_size
    bucket = min(bucket_bytes, size.trainable)
    weights, gradients, state, exchange, average = whole + size.fixed, whole, whole, 0.0, whole
    if world_size > 1 and strategy == "allreduce":
        exchange = whole  # buckets are a copy of the gradients
    elif world_size > 1 and strategy == "fsdp2":
        weights = (size.trainable + size.fixed) / world_size + 2 * size.unit  # one in use, the next one on its way
        gradients, state, average, exchange = part + size.unit, part, part, size.unit
    elif world_size > 1 and strategy == "zero3":
        weights = (size.trainable + size.fixed) / world_size + part + size.unit + bucket
        gradients, state, average, exchange = part + size.unit, part, part, bucket
    elif world_size > 1 and strategy in ("zero1", "zero2"):
        weights, state, exchange = weights + part, part, bucket  # the optimizer works on copies of the pieces
        gradients = whole + part if strategy == "zero1" else 2 * part + bucket
    return Footprint(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer_copies * state,
        exchange=exchange,
        average=average if with_average else 0.0,
    )


def activation_bytes(task: Task, batch: Any) -> int:
    """The most bytes alive at any time in forward and backward of one micro-batch, parameters and gradients left out.

    Runs on whatever device `task` and `batch` are on; `meta` costs no memory. The modules must be in training mode.
    """
    peak = 0
    for phase in task.phases:
        handles = [p.register_post_accumulate_grad_hook(_forget_gradient) for p in phase.parameters()]
        modules = [each.module for each in task.phases]
        known = [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
        try:
            with PeakMemory(ignored=known) as memory:
                torch.stack(list(task.losses(phase, batch).values())).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        peak = max(peak, memory.peak)
    return peak


class PeakMemory(TorchDispatchMode):
    """A `with` block that counts the bytes of the tensors made inside it: `now`, and `peak`."""

    def __init__(self, ignored: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._ignored = list(ignored)
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in ignored}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

        def freed(_: object) -> None:
            self.now -= num_bytes
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
