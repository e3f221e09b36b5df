"""PyTorch's DistributedDataParallel around each phase's module.

Buffers are not broadcast at each forward (which breaks a second forward, and hides a rank's statistics): the engine
averages them once a step, as for every strategy. What DDP cannot do: a step in which a parameter gets no gradient on
some rank ends in its own error at the next forward; use `allreduce` there.
"""

# No `from __future__ import annotations` here: DDP checks the annotations of its communication hook as objects.

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_train.collectives import Collectives
from dist_train.ledger.rows import WIRE
from dist_train.phases import Phase
from dist_train.strategies.base import Replicated
from dist_train.strategies.config import ExchangeConfig


class DistributedDataParallelStrategy(Replicated):
    """See the module. `bucket_megabytes` is DDP's bucket cap."""

    name = "ddp"

    def __init__(self, collectives: Collectives, config: ExchangeConfig) -> None:
        self._collectives = collectives
        self._bucket_bytes = config.bucket_bytes
        self._exposed: Any = None  # the ledger's row from the last bucket's launch to the end of backward

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Wraps each phase's module; DDP broadcasts rank 0's parameters and buffers."""
        if self._collectives.world.world_size == 1:
            return list(phases)
        return [replace(phase, module=self._wrap(phase.module)) for phase in phases]

    def _wrap(self, module: torch.nn.Module) -> DistributedDataParallel:
        device = self._collectives.world.device
        wrapped = DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self._bucket_bytes / 2**20,
        )
        wrapped.register_comm_hook(None, self._exchange)
        return wrapped

    def _exchange(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # noqa: ARG002
        """DDP's own all-reduce hook, told to the ledger."""
        ledger, tensor = self._collectives.ledger, bucket.buffer()
        tensor.div_(self._collectives.world.world_size)
        ledger.add_bytes(WIRE, tensor.numel() * tensor.element_size())
        launched = ledger.stamp()
        work = dist.all_reduce(tensor, async_op=True)
        if bucket.is_last():  # the rest of backward() is DDP waiting for its buckets
            self._close_exposed()
            self._exposed = ledger.waiting(launched)
            self._exposed.__enter__()
        return work.get_future().then(lambda future: future.value()[0])

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool) -> Iterator[None]:
        """`no_sync` around forward *and* backward where gradients are only accumulated."""
        if synchronize or not isinstance(phase.module, DistributedDataParallel):
            try:
                yield
            finally:
                self._close_exposed()
            return
        with phase.module.no_sync():
            yield

    def finish(self, phase: Phase) -> None:
        """Nothing: DDP's backward returned with the gradients averaged."""

    def _close_exposed(self) -> None:
        if self._exposed is not None:
            self._exposed.__exit__(None, None, None)
            self._exposed = None
