"""The interface of a reduction: how a bucket of gradients becomes the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dist_train.collectives import Pending

if TYPE_CHECKING:  # strategies use reductions, not the other way round
    from dist_train.strategies.buckets import Bucket


class Reducer(Protocol):
    """How a bucket of gradients becomes the same on all ranks."""

    multiple_of: int
    """Buckets' lengths have to be a multiple of this."""
    sums_flags: bool
    """A bucket's `flags` come out as sums over the ranks, 0 only where they were 0 on all."""

    def scale(self, weight: float | None, total: float) -> float:
        """What the gradients are multiplied by on their way into the bucket; the arguments are those of `start`."""

    def start(self, bucket: Bucket, *, weight: float | None, total: float) -> Pending:
        """Starts to reduce what `bucket` holds, in place; every rank, the same buckets in the same order.

        Args:
            bucket: filled with gradients times `scale`, and not touched until the wait is over.
            weight: this rank's weight; None: all ranks count alike.
            total: the sum of the ranks' weights; the world size where they count alike.
        """

    def forget(self, indices: Sequence[int]) -> None:
        """These parameters' bucket is going to be reduced a second time in one step."""

    def keep(self, index: int, sent: torch.Tensor) -> None:
        """What was `sent` for a parameter is not used: no rank had a gradient of it."""

    def state(self) -> dict[str, Any]:
        """What the next step needs of this one, for a checkpoint, the same on every rank. A collective."""

    def load_state(self, state: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """Takes what `state` gave, here or under another reduction, for the phase's `parameters`."""


class Unscaled:
    """What the reductions that take the gradients as they are have in common."""

    def scale(self, weight: float | None, total: float) -> float:  # noqa: ARG002
        """As they are."""
        return 1.0


class Stateless:
    """What the reductions without a memory have in common."""

    def forget(self, indices: Sequence[int]) -> None:
        """Nothing is remembered."""

    def keep(self, index: int, sent: torch.Tensor) -> None:
        """Nothing is remembered."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """Takes nothing."""
