"""Strategies: how the ranks come to the same gradient. All sit behind `Strategy`.

`allreduce` is Horovod-style and hangs on each phase's parameters; `ddp` is PyTorch's wrapper around each phase's
module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dist_train.collectives import Collectives
from dist_train.strategies.allreduce import FusedAllreduce
from dist_train.strategies.base import Strategy
from dist_train.strategies.ddp import DistributedDataParallelStrategy

StrategyName = Literal["allreduce", "ddp"]

STRATEGIES: dict[str, Callable[..., Strategy]] = {"allreduce": FusedAllreduce, "ddp": DistributedDataParallelStrategy}


def make_strategy(name: StrategyName, collectives: Collectives, *, bucket_megabytes: float = 25.0) -> Strategy:
    """The strategy called `name`.

    Args:
        name: a key of `STRATEGIES`.
        collectives: what the ranks talk through.
        bucket_megabytes: gradients are exchanged in buckets of about this size (10^6 bytes).

    Raises:
        ValueError: unknown name, or a bucket size that is not positive.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy {name!r} is unknown: use one of {', '.join(STRATEGIES)}")
    if bucket_megabytes <= 0:
        raise ValueError(f"bucket_megabytes is {bucket_megabytes}: use a positive number (25 is usual)")
    return STRATEGIES[name](collectives, bucket_bytes=int(bucket_megabytes * 1e6))


__all__ = ["STRATEGIES", "Strategy", "StrategyName", "make_strategy"]
