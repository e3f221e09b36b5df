"""The one piece of global state: what `init` has set up, until `shutdown`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_train.horovod.engine.coordinator import Coordinator
from dist_train.horovod.engine.engine import Engine
from dist_train.horovod.engine.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Context:
    """An initialised Horovod world, seen from this process."""

    engine: Engine
    coordinator: Coordinator | None
    """On rank 0."""
    timeline: Timeline
    rank: int
    nodes: Sequence[str]
    """The node of each rank."""
    local_ranks: Sequence[int]
    """The number of each rank on its node."""
    device: torch.device
    """This rank's GPU, or the CPU."""

    @property
    def size(self) -> int:
        """Ranks in the world."""
        return len(self.nodes)

    @property
    def neighbours(self) -> list[int]:
        """The ranks on this node, in order."""
        return [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank]]

    @property
    def counterparts(self) -> list[int]:
        """The ranks that have this rank's local rank, one per node that is large enough, in order of rank."""
        mine = self.local_ranks[self.rank]
        return [rank for rank, local_rank in enumerate(self.local_ranks) if local_rank == mine]


class _Holder:
    context: Context | None = None


def current() -> Context | None:
    """The context, where there is one."""
    return _Holder.context


def required() -> Context:
    """The context.

    Raises:
        ValueError: Horovod has not been initialised.
    """
    if _Holder.context is None:
        raise ValueError("Horovod has not been initialized; use hvd.init().")
    return _Holder.context


def set_current(context: Context | None) -> None:
    """For `init` and `shutdown`."""
    _Holder.context = context
