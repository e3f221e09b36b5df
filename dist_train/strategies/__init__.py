"""Strategies: how the ranks come to the same gradient. All sit behind `Strategy`.

`allreduce` is Horovod-style and hangs on each phase's parameters; `ddp` is PyTorch's wrapper around each phase's
module. `fsdp2` and DeepSpeed's `zero1`, `zero2`, `zero3` give each rank a part of the state; they are imported when
they are made (DeepSpeed is an extra).
"""

from __future__ import annotations

from collections.abc import Callable

from dist_train.collectives import Collectives
from dist_train.strategies.allreduce import FusedAllreduce
from dist_train.strategies.base import Strategy
from dist_train.strategies.config import ExchangeConfig, StrategyName
from dist_train.strategies.ddp import DistributedDataParallelStrategy
from dist_train.strategies.local_sgd import PostLocalSGD


def _fsdp2(collectives: Collectives, config: ExchangeConfig) -> Strategy:
    from dist_train.strategies.fsdp2 import FullyShardedStrategy

    return FullyShardedStrategy(collectives, config)


def _zero(collectives: Collectives, config: ExchangeConfig) -> Strategy:
    from dist_train.strategies.deepspeed import ZeroStrategy

    return ZeroStrategy(collectives, config)


STRATEGIES: dict[str, Callable[[Collectives, ExchangeConfig], Strategy]] = {
    "allreduce": FusedAllreduce,
    "ddp": DistributedDataParallelStrategy,
    "fsdp2": _fsdp2,
    "zero1": _zero,
    "zero2": _zero,
    "zero3": _zero,
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
    strategy = STRATEGIES[config.strategy](collectives, config)
    return strategy if config.average_every_steps == 1 else PostLocalSGD(strategy, collectives, config)


__all__ = ["STRATEGIES", "ExchangeConfig", "Strategy", "StrategyName", "make_strategy"]
