"""Horovod-style gradient exchange: hooks on parameters, fusion buckets, all-reduce overlapped with backward.

Nothing wraps the forward pass, so several forwards, several backwards, double backward (R1, path length) and frozen
opponents work. The first exchange of a phase learns the order in which gradients become ready (rank 0's, sent to all);
from then on a bucket is started as soon as its last gradient is there, always in the same order on every rank, while
autograd goes on with the layers below.

Exact in every step, whatever each rank's graph was: with the buckets the ranks exchange which parameters got a gradient
(zeros stand in where only some did; where none did, `grad` stays None) and whether a gradient changed after its
bucket had left (a second backward that the first step did not have), in which case that bucket is exchanged again.
Memory: one flat copy of the phase's gradients; after `finish` the gradients are views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dist_train.collectives import Collectives, Pending
from dist_train.phases import Phase
from dist_train.strategies.base import Replicated, broadcast_modules
from dist_train.strategies.config import ExchangeConfig


def plan_buckets(
    sizes_bytes: Sequence[int], dtypes: Sequence[torch.dtype], order: Sequence[int], bucket_bytes: int
) -> list[list[int]]:
    """Fuses parameters, in readiness `order`, into buckets of one dtype and about `bucket_bytes`.

    Returns lists of indices; every index is in exactly one, and a bucket exceeds `bucket_bytes` only when it holds a
    single parameter that does.
    """
    buckets: list[list[int]] = []
    open_of: dict[torch.dtype, int] = {}
    filled: list[int] = []
    for index in order:
        current = open_of.get(dtypes[index])
        if current is None or filled[current] + sizes_bytes[index] > bucket_bytes:
            open_of[dtypes[index]] = current = len(buckets)
            buckets.append([])
            filled.append(0)
        buckets[current].append(index)
        filled[current] += sizes_bytes[index]
    return buckets


class _Bucket:
    """A flat buffer, and a view in it for each of its parameters with that parameter's own strides."""

    def __init__(self, indices: Sequence[int], parameters: Sequence[nn.Parameter]) -> None:
        self.indices = list(indices)
        members = [parameters[index] for index in indices]
        self.flat = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
        self.views = []
        for parameter, part in zip(members, self.flat.split([p.numel() for p in members]), strict=True):
            dense = parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
            self.views.append(
                part.as_strided(parameter.size(), parameter.stride(), part.storage_offset())
                if dense
                else part.view(parameter.size())
            )
        self.missing = len(self.indices)
        self.pending: Pending | None = None
        self.launched = False
        self.stale = False

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()

    def fill(self, parameters: Sequence[nn.Parameter]) -> None:
        views, gradients = [], []
        for index, view in zip(self.indices, self.views, strict=True):
            gradient = parameters[index].grad
            if gradient is None:
                view.zero_()
            else:
                views.append(view)
                gradients.append(gradient)
        if views:
            torch._foreach_copy_(views, gradients)


class PhaseExchange:
    """The exchange of one phase's gradients; see the module for its contract."""

    def __init__(self, phase: Phase, collectives: Collectives, bucket_bytes: int, channel: Any) -> None:
        self._phase = phase
        # A channel of its own: where ranks have different graphs a bucket may leave before or after another collective
        # of the backward pass (synchronised batch norm), and only the order within a channel has to agree.
        self._channel = channel
        self._parameters = [p for p in phase.parameters() if p.requires_grad]
        self._collectives = collectives
        self._bucket_bytes = bucket_bytes
        self._active = False
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[int, _Bucket] = {}
        self._ready_order: dict[int, int] = {}  # index -> times its gradient was accumulated, in order of the first
        self._expected: list[int] = []
        self._times: list[int] = [0] * len(self._parameters)
        self._next = 0  # first bucket that has not been launched
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(index))

    def begin(self) -> None:
        """From here on gradients are exchanged as they become ready."""
        self._active = True

    def finish(self) -> None:
        """Exchanges what is left, waits, and leaves means in `.grad`."""
        if not self._buckets:
            self._learn_plan()
        self._check_nothing_is_left_out()
        with torch.no_grad():
            self._launch_ready(all_of_them=True)
            self._active = False
            used, stale = self._agree()
            for bucket in self._buckets:
                bucket.wait()
            for bucket, again in zip(self._buckets, stale, strict=True):
                if again:
                    bucket.fill(self._parameters)
                    self._launch(bucket)
                    bucket.wait()
            for bucket in self._buckets:
                for index, view in zip(bucket.indices, bucket.views, strict=True):
                    self._parameters[index].grad = view if used[index] else None
        self._reset()

    def _check_nothing_is_left_out(self) -> None:
        if sum(p.requires_grad for p in self._phase.parameters()) > len(self._parameters):
            raise RuntimeError(
                f"phase {self._phase.name!r}: parameters became trainable after the strategy was prepared, so their "
                "gradients would not be exchanged; prepare with all of them trainable"
            )

    def _hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def gradient_is_ready(_: torch.Tensor) -> None:
            if self._active:
                self._ready(index)

        return gradient_is_ready

    def _ready(self, index: int) -> None:
        self._times[index] += 1
        if not self._buckets:
            self._ready_order[index] = self._times[index]
            return
        bucket = self._bucket_of[index]
        if bucket.launched:
            bucket.stale = True
        elif self._times[index] == self._expected[index]:
            bucket.missing -= 1
            if bucket.missing == 0:
                self._launch_ready()

    def _launch_ready(self, all_of_them: bool = False) -> None:
        """Launches complete buckets in their fixed order: the same sequence of collectives on every rank."""
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if bucket.missing and not all_of_them:
                return
            with torch.no_grad():
                bucket.fill(self._parameters)
            self._launch(bucket)
            self._next += 1

    def _launch(self, bucket: _Bucket) -> None:
        name = f"{self._phase.name} bucket {self._buckets.index(bucket)}"
        bucket.pending = self._collectives.start_mean_(bucket.flat, channel=self._channel, name=name)
        bucket.launched = True

    def _agree(self) -> tuple[list[bool], list[bool]]:
        """Which parameters got a gradient on any rank, and which buckets left too early on any rank.

        Host memory and the host's transport: no device is waited for.
        """
        mine = [p.grad is not None for p in self._parameters] + [bucket.stale for bucket in self._buckets]
        flags = self._collectives.max_(torch.tensor(mine, dtype=torch.uint8)).tolist()
        count = len(self._parameters)
        return [bool(flag) for flag in flags[:count]], [bool(flag) for flag in flags[count:]]

    def _learn_plan(self) -> None:
        first = self._collectives.broadcast_object(list(self._ready_order.items()))
        order = [index for index, _ in first]
        seen = set(order)
        order += [index for index in reversed(range(len(self._parameters))) if index not in seen]
        times = dict(first)
        self._expected = [times.get(index, 1) for index in range(len(self._parameters))]
        sizes = [p.numel() * p.element_size() for p in self._parameters]
        plan = plan_buckets(sizes, [p.dtype for p in self._parameters], order, self._bucket_bytes)
        self._buckets = [_Bucket(indices, self._parameters) for indices in plan]
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.indices}

    def _reset(self) -> None:
        self._next = 0
        self._times = [0] * len(self._parameters)
        for bucket in self._buckets:
            bucket.missing, bucket.pending, bucket.launched, bucket.stale = (
                len(bucket.indices),
                None,
                False,
                False,
            )


class FusedAllreduce(Replicated):
    """The strategy `allreduce`; see the module."""

    name = "allreduce"

    def __init__(self, collectives: Collectives, config: ExchangeConfig) -> None:
        self._collectives = collectives
        self._bucket_bytes = config.bucket_bytes
        self._exchanges: dict[str, PhaseExchange] = {}

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Broadcasts rank 0's modules and hooks every phase's parameters."""
        if self._collectives.world.world_size > 1:
            broadcast_modules(phases, self._collectives)
            channel = self._collectives.new_channel()
            for phase in phases:
                self._exchanges[phase.name] = PhaseExchange(phase, self._collectives, self._bucket_bytes, channel)
        return list(phases)

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool) -> Iterator[None]:
        """Exchanges the gradients that become ready inside, where `synchronize` is true."""
        if synchronize and phase.name in self._exchanges:
            self._exchanges[phase.name].begin()
        yield

    def finish(self, phase: Phase) -> None:
        """Blocks until the phase's gradients are the mean over the ranks."""
        if phase.name in self._exchanges:
            self._exchanges[phase.name].finish()
