"""Horovod-style gradient exchange: hooks on parameters, fusion buckets, reductions overlapped with backward.

Nothing wraps the forward pass, so several forwards, several backwards, double backward (R1, path length) and frozen
opponents work. How the exchange goes is in `exchange`, what becomes of a bucket in `dist_train.reduction`; here the
parts are chosen and put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dist_train.collectives import Collectives
from dist_train.phases import Phase
from dist_train.reduction.adasum import AdasumReducer
from dist_train.reduction.lane import Lane
from dist_train.reduction.powersgd import PowerSGDReducer
from dist_train.reduction.reducer import Reducer
from dist_train.reduction.sums import DenseReducer, Nodes, OneCollective, Route, ThroughNodes
from dist_train.strategies.base import Replicated, broadcast_modules, check_owners
from dist_train.strategies.config import ExchangeConfig
from dist_train.strategies.exchange import PhaseExchange


class FusedAllreduce(Replicated):
    """The strategy `allreduce`; see the module."""

    name = "allreduce"

    def __init__(self, collectives: Collectives, config: ExchangeConfig) -> None:
        self._collectives, self._config = collectives, config
        self.averages_gradients = config.reduction == "average"
        self._exchanges: dict[str, PhaseExchange] = {}
        self._lane: Lane | None = None

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Broadcasts rank 0's modules and hooks every phase's parameters.

        Raises:
            ValueError: the ranks do not form the hierarchy that `exchange.hierarchical on` asks for, or an optimizer
                holds parameters that are not its phase's module's.
        """
        check_owners(phases, strategy=self.name)
        if self._collectives.world.world_size > 1:
            broadcast_modules(phases, self._collectives)
            channel = self._collectives.new_channel()
            self._lane = Lane(self._collectives.world.device)
            route = self._route(channel, self._lane)
            size = None if self._config.bucket_megabytes == "auto" else self._config.bucket_bytes
            for phase in phases:
                reducer = self._reducer(channel, self._lane, route)
                self._exchanges[phase.name] = PhaseExchange(phase, self._collectives, reducer, size)
        return list(phases)

    def _route(self, channel: Any, lane: Lane) -> Route:
        """How sums travel. `auto` leaves CUDA to NCCL, which knows the nodes by itself."""
        wanted, flat = self._config.hierarchical, OneCollective(self._collectives, channel)
        if wanted == "off" or (wanted == "auto" and self._collectives.world.device.type == "cuda"):
            return flat
        nodes = Nodes(self._collectives)
        problem = nodes.problem()
        if problem is None:
            return ThroughNodes(self._collectives, nodes, lane)
        if wanted == "on":
            raise ValueError(f"exchange.hierarchical on: {problem}, so there is no hierarchy to use; use auto or off")
        return flat

    def _reducer(self, channel: Any, lane: Lane, route: Route) -> Reducer:
        config, average = self._config, self._config.reduction == "average"
        if config.reduction == "adasum":
            return AdasumReducer(self._collectives, channel, lane)
        if config.compression == "powersgd":
            return PowerSGDReducer(self._collectives, channel, lane, rank=config.powersgd_rank, average=average)
        wire_dtype = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.compression]
        return DenseReducer(route, average=average, wire_dtype=wire_dtype)

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool, weight: float | None = None) -> Iterator[None]:
        """Exchanges the gradients that become ready inside, where `synchronize` is true.

        `weight` is the number of clips that this rank's gradient is a mean over, in all its micro-batches; 0 where it
        has none (`dist_train.strategies.uneven`). Then the result is the mean over all clips of all ranks. Every rank
        gives one, or none does; it is read where `synchronize` is true.
        """
        if synchronize and phase.name in self._exchanges:
            self._exchanges[phase.name].begin(weight)
        yield

    def finish(self, phase: Phase) -> None:
        """Blocks until the phase's gradients are the mean over the ranks."""
        if phase.name in self._exchanges:
            self._exchanges[phase.name].finish()

    def figures(self) -> dict[str, float]:
        """Sizes of the buckets that were found by measuring, in megabytes."""
        tuned = {name: exchange.tuned_bytes for name, exchange in self._exchanges.items()}
        return {f"bucket_megabytes/{name}": size / 1e6 for name, size in tuned.items() if size is not None}

    def state(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Every rank has all of it, and the exchange's own under `exchange`."""
        exchanges = {name: exchange.state() for name, exchange in self._exchanges.items()}
        return {**super().state(phases), "exchange": exchanges}

    def load_state(self, phases: Sequence[Phase], state: Mapping[str, Any]) -> None:
        """Every rank takes all of it; a checkpoint of another strategy has nothing for the exchange."""
        super().load_state(phases, state)
        for name, own in state.get("exchange", {}).items():
            if name in self._exchanges:
                self._exchanges[name].load_state(own)

    def close(self) -> None:
        """Takes off the hooks and ends the lane."""
        for exchange in self._exchanges.values():
            exchange.close()
        if self._lane is not None:
            self._lane.close()
