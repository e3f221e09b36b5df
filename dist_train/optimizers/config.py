"""Which optimizer, at which rate: one configuration for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["sgd", "lars", "lamb"]
LearningRateRule = Literal["linear", "sqrt", "none"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of every parameter of a phase.

    SGD is PyTorch's: the learning rate stays outside the momentum buffer, so that no momentum correction is needed when
    the rate changes (Goyal et al. 2017, remark 2). `LARS` and `LAMB` say in their docstrings what they do.
    """

    name: OptimizerName = "sgd"
    """`sgd` with momentum, `lars` or `lamb` (layer-wise rates for large batches)."""
    base_learning_rate: float = 0.02
    """Peak learning rate at `base_batch_clips`."""
    base_batch_clips: int = 128
    """The global batch for which `base_learning_rate` is meant."""
    learning_rate_rule: LearningRateRule = "linear"
    """How the rate grows with the batch: `linear` (Goyal et al. 2017), `sqrt` (usual for LAMB), or `none`."""
    momentum: float = 0.9
    """Momentum coefficient of SGD and LARS."""
    nesterov: bool = True
    """Nesterov's form of momentum (SGD and LARS)."""
    weight_decay: float = 1e-4
    """L2 coefficient of SGD and LARS, decoupled decay of LAMB."""
    decay_norm_and_bias: bool = False
    """Decay (and, in LARS and LAMB, adapt) biases and normalisation parameters too."""
    bias_learning_rate_factor: float = 1.0
    """Biases of convolutions and linear layers learn at this multiple of the rate (2 in the TSM repository)."""
    head_learning_rate_factor: float = 1.0
    """The classifier learns at this multiple of the rate (5 in the TSM repository; its bias then at 5 x 2)."""
    trust_coefficient: float = 0.001
    """LARS: the trust coefficient (MLPerf's 0.001; learning rates of other coefficients are not comparable)."""
    momentum_correction: bool = False
    """LARS: rescale the momentum buffer when the rate changes (Goyal et al. 2017, remark 2)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """LAMB: decay of the two moments."""
    max_gradient_norm: float = 1.0
    """LAMB: the global gradient norm is first clipped to this (NVLAMB); 0: not."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if not self.base_learning_rate > 0:
            found.append(f"optimizer.base_learning_rate is {self.base_learning_rate}: use a positive number")
        if self.base_batch_clips < 1:
            found.append(f"optimizer.base_batch_clips is {self.base_batch_clips}: use 1 or more")
        if not 0 <= self.momentum < 1:
            found.append(f"optimizer.momentum is {self.momentum}: use a number from 0 to below 1")
        if self.name != "lamb" and self.nesterov and self.momentum == 0:
            found.append("optimizer.nesterov needs a momentum above 0: use --optimizer.no-nesterov with momentum 0")
        for name in ("weight_decay", "max_gradient_norm"):
            if getattr(self, name) < 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}: use 0 or more")
        for name in ("bias_learning_rate_factor", "head_learning_rate_factor", "trust_coefficient"):
            if not getattr(self, name) > 0:
                found.append(f"optimizer.{name} is {getattr(self, name)}: use a positive number")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optimizer.betas are {self.betas}: use two numbers from 0 to below 1")
        if self.momentum_correction and self.name != "lars":
            found.append(
                f"optimizer.momentum_correction is for lars, whose momentum holds the rate; {self.name} needs none"
            )
        return found

    def peak_learning_rate(self, batch_clips: int) -> float:
        """The rate at the global batch `batch_clips`, by `learning_rate_rule`."""
        ratio = batch_clips / self.base_batch_clips
        factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.learning_rate_rule]
        return self.base_learning_rate * factor
