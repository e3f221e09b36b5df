"""The interface of a strategy, and what all strategies share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.collectives import Collectives
from dist_train.phases import Phase


class Strategy(Protocol):
    """How the ranks come to the same gradient.

    The loop calls, at each step and phase::

        for each micro-batch:
            with strategy.micro_batch(phase, synchronize=is_last):
                loss = ...            # forward, any number of times
                loss.backward()       # or several backwards
        strategy.finish(phase)        # now every parameter's .grad is the mean over the ranks, the same bits on each
        phase.optimizer.step()

    A parameter that no rank used keeps `grad=None`; one that some ranks used counts as zero on the others.
    """

    name: str

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Makes the ranks' parameters and buffers equal to rank 0's and returns the phases to train with."""

    def micro_batch(self, phase: Phase, *, synchronize: bool) -> AbstractContextManager[Any]:
        """Wraps forward and backward of one micro-batch; gradients are exchanged where `synchronize` is true."""

    def finish(self, phase: Phase) -> None:
        """Blocks until the phase's gradients are the mean over the ranks."""


def broadcast_modules(phases: Sequence[Phase], collectives: Collectives) -> None:
    """Overwrites parameters and buffers of every phase's module with those of rank 0."""
    if collectives.world.world_size == 1:
        return
    seen: set[int] = set()
    with torch.no_grad():
        for phase in phases:
            for tensor in [*phase.module.parameters(), *phase.module.buffers()]:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensor.copy_(collectives.broadcast_(tensor.detach().contiguous()))


class BufferAverage:
    """Keeps the running statistics of batch norm equal on all ranks.

    Each rank normalises by its own micro-batch and moves its own running statistics; after each step they are averaged.
    Running statistics are linear in the batch's statistics, so this equals averaging once before evaluation, and it
    makes every step a point at which a checkpoint of one rank is a checkpoint of all. The all-reduce is started before
    the backward pass and waited for after it: a few hundred kilobytes, hidden behind the gradients.
    """

    def __init__(self, phases: Sequence[Phase], collectives: Collectives) -> None:
        layers = {id(m): m for phase in phases for m in phase.module.modules() if isinstance(m, _BatchNorm)}
        statistics = [s for layer in layers.values() for s in (layer.running_mean, layer.running_var)]
        self._buffers = [buffer for buffer in statistics if buffer is not None]
        self._collectives = collectives
        self._flat: torch.Tensor | None = None
        self._pending: Any = None

    def start(self) -> None:
        """Starts to average what the buffers hold now."""
        if self._collectives.world.world_size == 1 or not self._buffers:
            return
        with torch.no_grad():
            self._flat = torch.cat([buffer.reshape(-1).float() for buffer in self._buffers])
        self._pending = self._collectives.start_mean_(self._flat)

    def finish(self) -> None:
        """Writes the averages back; nothing to do if nothing was started."""
        if self._pending is None or self._flat is None:
            return
        self._pending.wait()
        sizes = [buffer.numel() for buffer in self._buffers]
        with torch.no_grad():
            for buffer, mean in zip(self._buffers, self._flat.split(sizes), strict=True):
                buffer.copy_(mean.view_as(buffer))
        self._pending = self._flat = None
