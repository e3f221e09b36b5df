"""FSDP2's own collectives, told to the ledger: one name for each unit and direction.

FSDP2 takes custom communication objects (`FSDPModule.set_custom_all_gather`); these do what its default ones do. Where
a call blocks the host (Gloo, MPI) the wait is split into waiting for peers and wire, as for every collective. On CUDA
the calls run on FSDP2's streams: bytes, arrival and wire time are known, and what the compute stream waits stays in its
rows `forward` and `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from dist_train.collectives import Collectives


def account_units(units: Sequence[FSDPModule], phase_name: str, collectives: Collectives) -> None:
    """Has every unit's all-gathers and reduce-scatters told to the ledger of `collectives`."""
    for number, unit in enumerate(units):
        unit.set_custom_all_gather(_AccountedAllGather(collectives, f"{phase_name} unit {number} all-gather"))
        unit.set_custom_reduce_scatter(
            _AccountedReduceScatter(collectives, f"{phase_name} unit {number} reduce-scatter")
        )


class _Accounted:
    def __init__(self, collectives: Collectives, name: str) -> None:
        self._collectives, self._name = collectives, name

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As FSDP2 does."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _run(self, op: str, whole: torch.Tensor, async_op: bool, start: Callable[[], Any]) -> Any:
        """Starts the collective whose whole array is `whole`, and accounts it."""
        collectives, device = self._collectives, whole.device
        flight = collectives.account(self._name, op=op, num_bytes=whole.nbytes, device=device)
        if flight is None:
            return start()
        if async_op or device.type == "cuda":
            work = start()
            if work is None:
                flight.finished = collectives.ledger.stamp()
            else:
                collectives.note_completion(work, flight, device)
            flight.settled = True  # FSDP2 waits for it in this step
            return work
        with collectives.ledger.waiting(flight), collectives.watch.blocking(self._name):
            return start()


class _AccountedAllGather(_Accounted, AllGather):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """See the module."""
        return self._run(
            "all_gather",
            output_tensor,
            async_op,
            lambda: dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op),
        )


class _AccountedReduceScatter(_Accounted, ReduceScatter):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """See the module."""
        return self._run(
            "reduce_scatter",
            input_tensor,
            async_op,
            lambda: dist.reduce_scatter_single(output_tensor, input_tensor, group=group, op=op, async_op=async_op),
        )
