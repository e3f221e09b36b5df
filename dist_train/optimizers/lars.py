"""LARS: layer-wise adaptive rates for large batches (You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from dist_train.optimizers.trust import trust_ratios


class LARS(torch.optim.Optimizer):
    """SGD with momentum in which each tensor's step is proportional to the tensor's own norm.

    For a tensor w with gradient g, learning rate γ, momentum m, weight decay β and trust coefficient η::

        λ = η ‖w‖ / (‖g‖ + β ‖w‖ + ε)          1 where ‖w‖ or ‖g‖ is 0, or where the group has `adapt=False`
        v = m v + γ λ (g + β w)
        w = w - v                              with Nesterov: w - (m v + γ λ (g + β w))

    What implementations disagree on, and what this one does:

    * The learning rate is *inside* the momentum buffer, as in the paper and in MLPerf's reference
      (mlcommons/training, image_classification/tensorflow2/lars_optimizer.py). PyTorch's SGD, timm and apex keep it
      outside; while the rate moves the two differ. `momentum_correction=True` multiplies the buffer by γ_t / γ_{t-1}
      (Goyal et al. 2017, remark 2), which is the outside form.
    * η is 0.001, as in MLPerf; apex's LARC has 0.02 and clips the rate by the global one, so its learning rates cannot
      be used here, nor can SGD's: MLPerf's 10.5 at batch 3,264 goes with η = 0.001.
    * ε is 1e-7. MLPerf's file says 0, but its code runs `epsilon or backend.epsilon()`, which is 1e-7.
    * Norm parameters and biases get neither weight decay nor a trust ratio: give them a group with `weight_decay=0`
      and `adapt=False` (`dist_train.optimizers.parameter_groups`). apex adapts them too, which costs 1.2 to 1.9 points
      of ImageNet accuracy at batches of 2,000 and more (PaddlePaddle/Paddle#26733).
    * Weight decay is part of the adapted gradient (L2), not decoupled.

    Args:
        params: parameters, or groups of them; a group may have its own `adapt`, `weight_decay`, `lr`.
        lr: the global learning rate γ.
        momentum: m, from 0 to below 1.
        weight_decay: β.
        trust_coefficient: η.
        eps: ε.
        nesterov: look ahead by one momentum step.
        momentum_correction: rescale the buffer when the learning rate changes.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-7,
        nesterov: bool = False,
        momentum_correction: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}: use 0 or more")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}: use a number from 0 to below 1")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}: use 0 or more")
        if not trust_coefficient > 0:
            raise ValueError(f"trust_coefficient is {trust_coefficient}: use a positive number (0.001 is usual)")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}: use 0 or more")
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "momentum_correction": momentum_correction,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if members:
                self._update(group, members, [p.grad for p in members])
        return loss

    def _update(self, group: dict[str, Any], weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        rate, decay = float(group["lr"]), group["weight_decay"]
        if group["adapt"]:
            norms, slopes = torch._foreach_norm(weights), torch._foreach_norm(gradients)
            divisors = torch._foreach_add(slopes, norms, alpha=decay)
            torch._foreach_add_(divisors, group["eps"])
            trusts = trust_ratios(norms, divisors, slopes, coefficient=group["trust_coefficient"])
        if decay:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        updates = list(torch._foreach_mul(gradients, rate))
        if group["adapt"]:
            torch._foreach_mul_(updates, trusts)
        if group["momentum"]:
            buffers = [self._buffer(weight, rate) for weight in weights]
            factors = [group["momentum"]] * len(weights)
            if group["momentum_correction"]:
                factors = [group["momentum"] * self._correction(weight, rate) for weight in weights]
            torch._foreach_mul_(buffers, factors)
            torch._foreach_add_(buffers, updates)
            if group["nesterov"]:
                torch._foreach_add_(updates, buffers, alpha=group["momentum"])
            else:
                updates = buffers
        torch._foreach_sub_(weights, updates)

    def _buffer(self, weight: torch.Tensor, rate: float) -> torch.Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"], state["lr"] = torch.zeros_like(weight), rate
        return state["momentum_buffer"]

    def _correction(self, weight: torch.Tensor, rate: float) -> float:
        state = self.state[weight]
        before, state["lr"] = state["lr"], rate
        return rate / before if before else 1.0
