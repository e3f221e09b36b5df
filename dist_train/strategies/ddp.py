"""PyTorch's DistributedDataParallel around each phase's module.

Buffers are not broadcast at each forward (which breaks a second forward, and hides a rank's statistics): the engine
averages them once a step, as for every strategy.

What DDP cannot do: a step in which a parameter of the module gets no gradient on some rank (R1 leaves the last bias
out, sub-networks). Its own backward returns with gradients that were not averaged, and only the next forward complains.
Here each rank sees at once that its last bucket has not left, and raises before the optimizer steps; ranks whose own
graph was whole wait for it inside their backward and end with it. No wrong gradient is used. Use `allreduce` there.
"""

# No `from __future__ import annotations` here: DDP checks the annotations of its communication hook as objects.

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dist_train.collectives import Collectives
from dist_train.ledger.flights import Flight
from dist_train.phases import Phase
from dist_train.strategies.base import Replicated, check_owners, check_whole_calls
from dist_train.strategies.config import ExchangeConfig


@dataclass
class _Exchange:
    """What a wrapped module's communication hook has seen in this step."""

    phase_name: str
    complete: bool = False


class DistributedDataParallelStrategy(Replicated):
    """See the module. `bucket_megabytes` is DDP's bucket cap."""

    name = "ddp"

    def __init__(self, collectives: Collectives, config: ExchangeConfig) -> None:
        self._collectives = collectives
        self._bucket_bytes = config.bucket_bytes
        self._exchanges: dict[str, _Exchange] = {}
        self._synchronizing = False
        self._exposed: Any = None  # the ledger's row from the last bucket's launch to the end of backward
        self._flights: list[Flight] = []

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Wraps each phase's module; DDP broadcasts rank 0's parameters and buffers.

        Raises:
            ValueError: a phase calls its module by parts, or its optimizer holds parameters of another.
        """
        check_owners(phases, strategy=self.name)
        check_whole_calls(phases, strategy=self.name)
        if self._collectives.world.world_size == 1:
            return list(phases)
        return [replace(phase, module=self._wrap(phase)) for phase in phases]

    def _wrap(self, phase: Phase) -> DistributedDataParallel:
        device = self._collectives.world.device
        copied = sum(tensor.nbytes for tensor in [*phase.module.parameters(), *phase.module.buffers()])
        self._collectives.count(f"{phase.name} copied to all ranks", op="broadcast", num_bytes=copied, device=device)
        wrapped = DistributedDataParallel(
            phase.module,
            device_ids=[device.index] if device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self._bucket_bytes / 2**20,
        )
        exchange = self._exchanges[phase.name] = _Exchange(phase.name)
        wrapped.register_comm_hook(exchange, self._exchange)
        return wrapped

    def _exchange(self, state: _Exchange, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's own all-reduce hook, told to the ledger."""
        collectives, tensor = self._collectives, bucket.buffer()
        tensor.div_(collectives.world.world_size)
        name = f"{state.phase_name} bucket {bucket.index()}"
        flight = collectives.account(name, op="all_reduce", num_bytes=tensor.nbytes, device=tensor.device)
        work = dist.all_reduce(tensor, async_op=True)
        collectives.note_completion(work, flight, tensor.device)
        if flight is not None:
            self._flights.append(flight)
        state.complete = bucket.is_last()  # they leave in order
        if bucket.is_last():  # the rest of backward() is DDP waiting for its buckets
            self._close_exposed()
            self._exposed = collectives.ledger.waiting(flight)
            self._exposed.__enter__()
        return work.get_future().then(lambda future: future.value()[0])

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool) -> Iterator[None]:
        """`no_sync` around forward *and* backward where gradients are only accumulated."""
        if not isinstance(phase.module, DistributedDataParallel):
            yield
            return
        self._synchronizing = synchronize
        with nullcontext() if synchronize else phase.module.no_sync():
            try:
                yield
            finally:
                self._close_exposed()

    def backward(self, phase: Phase, loss: torch.Tensor) -> None:
        """`loss.backward()`.

        Raises:
            RuntimeError: it left a parameter without a gradient.
        """
        if phase.name in self._exchanges and self._synchronizing:
            self._exchanges[phase.name].complete = False
            loss.backward()
            self._check_complete(phase)
        else:
            loss.backward()

    def finish(self, phase: Phase) -> None:
        """Nothing but a check: DDP's backward returned with the gradients averaged.

        Raises:
            RuntimeError: it did not, because a parameter got no gradient.
        """
        if phase.name in self._exchanges:
            self._check_complete(phase)
            self._exchanges[phase.name].complete = False

    def _check_complete(self, phase: Phase) -> None:
        if not self._exchanges[phase.name].complete:
            raise RuntimeError(
                f"phase {phase.name!r}: a parameter got no gradient on rank {self._collectives.world.rank}, so DDP has "
                "not averaged this step's gradients: use --exchange.strategy allreduce, which is exact in such a step"
            )

    def _close_exposed(self) -> None:
        if self._exposed is not None:
            self._exposed.__exit__(None, None, None)
            self._exposed = None
        for flight in self._flights:  # backward() has returned: DDP has waited for all of them
            flight.settled = True
        self._flights = []
