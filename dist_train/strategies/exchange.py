"""The exchange of one phase's gradients: from hooks on parameters to reduced gradients in `.grad`.

The first exchange of a phase learns the order in which gradients become ready (rank 0's, sent to all); from then on a
bucket is started as soon as its last gradient is there, always in the same order on every rank, while autograd goes on
with the layers below.

Exact in every step, whatever each rank's graph was: with the buckets the ranks exchange which parameters got a gradient
(zeros stand in where only some did; where none did, `grad` stays None) and whether a gradient changed after its
bucket had left (a second backward that the first step did not have), in which case that bucket is exchanged again.
Memory: one flat copy of the phase's gradients; after `finish` the gradients are views of it.

How a bucket is reduced is a `Reducer`'s business (`dist_train.reduction`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dist_train.collectives import Collectives, Pending
from dist_train.phases import Phase
from dist_train.reduction.reducer import Reducer
from dist_train.strategies.buckets import Bucket, plan_buckets, usual_bucket_bytes
from dist_train.strategies.tuning import BucketTuner


class PhaseExchange:
    """The exchange of one phase's gradients; see the module for its contract.

    Args:
        phase: whose parameters to hook.
        collectives: the ranks.
        reducer: how buckets are reduced. Its channel is used by nothing else: where ranks have different graphs a
            bucket may leave before or after another collective of the backward pass (synchronised batch norm), and only
            the order within a channel has to agree.
        bucket_bytes: largest size of the buckets; None: to be measured.
    """

    def __init__(self, phase: Phase, collectives: Collectives, reducer: Reducer, bucket_bytes: int | None) -> None:
        self._phase, self._collectives, self._reducer = phase, collectives, reducer
        self._parameters = [p for p in phase.parameters() if p.requires_grad]
        self._hooked = {id(p) for p in self._parameters}
        self._sizes = [p.numel() * p.element_size() for p in self._parameters]
        self._tuner = BucketTuner(phase.name, sum(self._sizes), collectives) if bucket_bytes is None else None
        hides = collectives.world.num_nodes > 1 or collectives.world.device.type != "cpu"
        self._bucket_bytes = usual_bucket_bytes(sum(self._sizes), bucket_bytes or 0, hides=hides)
        self._active = False
        self._order: list[int] = []  # in which gradients become ready; empty before the first exchange
        self._expected: list[int] = []  # times that each gradient is accumulated before it is ready
        self._buckets: list[Bucket] = []
        self._place_of: list[tuple[Bucket, int]] = []  # each parameter's bucket, and its place there
        self._at_once, self._scale = False, 1.0
        self._ready_order: dict[int, int] = {}  # index -> times accumulated, while there is no plan
        self._times: list[int] = [0] * len(self._parameters)
        self._next = 0  # first bucket that has not been launched
        self._weight: float | None = None
        self._total_weight: tuple[torch.Tensor, Pending | None] | None = None
        self._total = float(collectives.world.world_size)
        self._handles = [p.register_post_accumulate_grad_hook(self._hook(i)) for i, p in enumerate(self._parameters)]

    # -- one step ----------------------------------------------------------------------------------------------

    def begin(self, weight: float | None) -> None:
        """From here on gradients are exchanged as they become ready. With weights, the ranks add them up meanwhile."""
        self._active = True
        self._weight = weight
        self._total = float(self._collectives.world.world_size)
        # Of host memory a gradient is copied when it is ready; a device copies a bucket's in one kernel.
        self._at_once = weight is None and self._collectives.world.device.type == "cpu"
        self._scale = self._reducer.scale(weight, self._total)
        if weight is not None:
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"phase {self._phase.name!r}: a weight of {weight}: use the number of clips, 0 or more"
                )
            total = torch.tensor([weight], dtype=torch.float64)
            self._total_weight = (total, self._collectives.start_sum_(total, name=f"{self._phase.name} weights"))

    def finish(self) -> None:
        """Exchanges what is left, waits, and leaves the reduced gradients in `.grad`."""
        self._check_nothing_is_left_out()
        if not self._parameters:
            return
        if not self._buckets:
            self._learn_plan()
        with torch.no_grad():
            self._active = False
            flags, agreement = self._start_to_agree()
            self._launch_ready(all_of_them=True)
            for bucket in self._buckets:
                bucket.wait()
            if agreement is not None:
                agreement.wait()
            used, stale = flags[: len(self._parameters)].tolist(), flags[len(self._parameters) :].tolist()
            for bucket, again in zip(self._buckets, stale, strict=True):
                if again:
                    self._exchange_again(bucket)
            for bucket in self._buckets:
                for index, view in zip(bucket.indices, bucket.views, strict=True):
                    self._parameters[index].grad = view if used[index] else None
                    if not used[index]:
                        self._reducer.keep(index, view)
        self._reset()
        if self._tuner is not None and self._tuner.exchange_ends():
            self._make_buckets()

    def _check_nothing_is_left_out(self) -> None:
        if any(p.requires_grad and id(p) not in self._hooked for p in self._phase.parameters()):
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
        if self._tuner is not None:
            self._tuner.exchange_begins()
        self._times[index] += 1
        if not self._buckets:
            self._ready_order[index] = self._times[index]
            return
        bucket, place = self._place_of[index]
        if bucket.pending is not None:
            bucket.stale = True
        elif self._times[index] >= self._expected[index]:
            gradient = self._parameters[index].grad
            if self._at_once and gradient is not None:
                bucket.put(place, gradient, self._scale)
            if self._times[index] == self._expected[index]:
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._launch_ready()

    def _launch_ready(self, all_of_them: bool = False) -> None:
        """Launches complete buckets in their fixed order: the same sequence of collectives on every rank."""
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if (bucket.missing or len(bucket.flags)) and not all_of_them:
                return
            self._launch(bucket)
            self._next += 1

    def _launch(self, bucket: Bucket) -> None:
        if self._total_weight is not None:
            total, pending = self._total_weight
            if pending is not None:
                pending.wait()
            self._total = float(total) or 1.0  # nobody has a clip: zeros, however divided
            self._total_weight = None
        with torch.no_grad():
            bucket.fill(self._parameters, self._reducer.scale(self._weight, self._total))
            bucket.pending = self._reducer.start(bucket, weight=self._weight, total=self._total)

    def _exchange_again(self, bucket: Bucket) -> None:
        self._reducer.forget(bucket.indices)
        self._launch(bucket)
        bucket.wait()

    def _start_to_agree(self) -> tuple[torch.Tensor, Pending | None]:
        """How many ranks got a gradient of each parameter, and on how many each bucket left too early.

        On the host they travel in the last bucket, which is complete when the backward pass is, and so costs nothing by
        leaving in `finish`. For a device, and where buckets are not summed, they travel by themselves in host memory
        beside the last buckets: no device is waited for.
        """
        mine = [p.grad is not None for p in self._parameters] + [bucket.stale for bucket in self._buckets]
        if len(self._buckets[-1].flags):
            self._buckets[-1].flags.copy_(torch.tensor(mine))
            return self._buckets[-1].flags, None
        flags = torch.tensor(mine, dtype=torch.int32)
        return flags, self._collectives.start_sum_(flags, name=f"{self._phase.name} parameters used")

    def _reset(self) -> None:
        self._next = 0
        self._times = [0] * len(self._parameters)
        for bucket in self._buckets:
            bucket.reset()

    # -- the plan ----------------------------------------------------------------------------------------------

    def _learn_plan(self) -> None:
        first = self._collectives.broadcast_object(list(self._ready_order.items()))
        order = [index for index, _ in first]
        seen = set(order)
        order += [index for index in reversed(range(len(self._parameters))) if index not in seen]
        times = dict(first)
        self._set_plan(order, [times.get(index, 1) for index in range(len(self._parameters))])

    def _set_plan(self, order: list[int], expected: list[int]) -> None:
        self._order, self._expected = order, expected
        self._make_buckets()

    def _make_buckets(self) -> None:
        """The buckets of the plan at the current size. Between steps only: bits may differ from here on."""
        size = self._bucket_bytes if self._tuner is None else self._tuner.bucket_bytes
        plan = plan_buckets(self._sizes, [p.dtype for p in self._parameters], self._order, size)
        on_host = all(parameter.device.type == "cpu" for parameter in self._parameters)
        num_flags = len(self._parameters) + len(plan) if self._reducer.sums_flags and on_host else 0
        self._buckets = [
            Bucket(
                f"{self._phase.name} bucket {number}",
                indices,
                self._parameters,
                multiple_of=self._reducer.multiple_of,
                num_flags=num_flags if number == len(plan) - 1 else 0,
            )
            for number, indices in enumerate(plan)
        ]
        of = {index: (bucket, place) for bucket in self._buckets for place, index in enumerate(bucket.indices)}
        self._place_of = [of[index] for index in range(len(self._parameters))]

    @property
    def tuned_bytes(self) -> int | None:
        """The size of the buckets that was found by measuring, once it was."""
        return self._tuner.bucket_bytes if self._tuner is not None and self._tuner.settled else None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to do the same: the plan, and the reducer's memory. A collective."""
        if self._tuner is not None and self._tuner.settle() and self._order:
            self._make_buckets()
        return {
            "order": self._order,
            "expected": self._expected,
            "bucket_bytes": self.tuned_bytes,
            "reducer": self._reducer.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave; a plan for other parameters is learnt anew."""
        if self._tuner is not None and state["bucket_bytes"]:
            self._tuner.fix(state["bucket_bytes"])
        if sorted(state["order"]) == list(range(len(self._parameters))):
            self._set_plan(list(state["order"]), list(state["expected"]))
        self._reducer.load_state(state["reducer"], self._parameters)

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
