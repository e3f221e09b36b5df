"""Optimizers, how parameters are grouped for them, and how their rate follows the batch."""

from __future__ import annotations

import torch
from torch import nn

from dist_train.optimizers.config import OptimizerConfig
from dist_train.optimizers.groups import is_norm_or_bias, parameter_groups
from dist_train.optimizers.lamb import LAMB
from dist_train.optimizers.lars import LARS

__all__ = [
    "LAMB",
    "LARS",
    "OptimizerConfig",
    "is_norm_or_bias",
    "make_optimizer",
    "parameter_groups",
    "set_learning_rate",
]


def make_optimizer(config: OptimizerConfig, module: nn.Module, *, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer that `config` names over the module's trainable parameters; `learning_rate` is the peak rate."""
    groups = parameter_groups(module, config, learning_rate=learning_rate)
    if config.name == "lars":
        return LARS(
            groups,
            lr=learning_rate,
            momentum=config.momentum,
            trust_coefficient=config.trust_coefficient,
            nesterov=config.nesterov,
            momentum_correction=config.momentum_correction,
        )
    if config.name == "lamb":
        return LAMB(groups, lr=learning_rate, betas=config.betas, max_gradient_norm=config.max_gradient_norm)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum, nesterov=config.nesterov, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group to `initial_lr * factor`; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
