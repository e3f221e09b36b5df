"""Optimizers and how parameters are grouped for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """SGD with momentum, PyTorch's convention: the learning rate stays outside the momentum buffer.

    So no momentum correction is needed when the rate changes (Goyal et al. 2017, remark 2).
    """

    base_learning_rate: float = 0.02
    """Peak learning rate at `base_batch_clips`; scaled linearly with the global batch."""
    base_batch_clips: int = 128
    """The global batch for which `base_learning_rate` is meant."""
    momentum: float = 0.9
    """Momentum coefficient."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = 1e-4
    """L2 coefficient; never on biases and normalisation parameters."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if not self.base_learning_rate > 0:
            found.append(f"optimizer.base_learning_rate is {self.base_learning_rate}: use a positive number")
        if self.base_batch_clips < 1:
            found.append(f"optimizer.base_batch_clips is {self.base_batch_clips}: use 1 or more")
        if not 0 <= self.momentum < 1:
            found.append(f"optimizer.momentum is {self.momentum}: use a number from 0 to below 1")
        if self.nesterov and self.momentum == 0:
            found.append("optimizer.nesterov needs a momentum above 0: use --optimizer.no-nesterov with momentum 0")
        if self.weight_decay < 0:
            found.append(f"optimizer.weight_decay is {self.weight_decay}: use 0 or more")
        return found


def is_norm_or_bias(parameter: nn.Parameter) -> bool:
    """True for parameters of one dimension: biases, and scales and shifts of normalisation layers."""
    return parameter.ndim <= 1


def make_sgd(config: SGDConfig, module: nn.Module, *, learning_rate: float) -> torch.optim.SGD:
    """SGD over the module's trainable parameters in two groups: with weight decay, and norm and bias without.

    `learning_rate` is the peak rate; each group keeps it as `initial_lr` for the loop to scale.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if not is_norm_or_bias(p)],
            "weight_decay": config.weight_decay,
            "initial_lr": learning_rate,
        },
        {
            "params": [p for p in trainable if is_norm_or_bias(p)],
            "weight_decay": 0.0,
            "initial_lr": learning_rate,
        },
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        foreach=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group to `initial_lr * factor`; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
