"""Strategies: how the ranks come to the same gradient. All sit behind `Strategy`.

`allreduce` is Horovod-style and hangs on each phase's parameters; `ddp` is PyTorch's wrapper around each phase's
module.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_train.collectives import Collectives
from dist_train.strategies.allreduce import FusedAllreduce
from dist_train.strategies.base import Strategy
from dist_train.strategies.config import ExchangeConfig, StrategyName
from dist_train.strategies.ddp import DistributedDataParallelStrategy

STRATEGIES: dict[str, Callable[[Collectives, ExchangeConfig], Strategy]] = {
    "allreduce": FusedAllreduce,
    "ddp": DistributedDataParallelStrategy,
}


def make_strategy(config: ExchangeConfig, collectives: Collectives) -> Strategy:
    """The strategy that `config` names, talking through `collectives`.

    Raises:
        ValueError: unknown name, or values that do not fit together.
    """
    if config.strategy not in STRATEGIES:
        raise ValueError(f"exchange.strategy is {config.strategy!r}: use one of {', '.join(STRATEGIES)}")
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return STRATEGIES[config.strategy](collectives, config)


__all__ = ["STRATEGIES", "ExchangeConfig", "Strategy", "StrategyName", "make_strategy"]
