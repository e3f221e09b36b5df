"""LAMB: layer-wise adaptive moments for large batches (You et al. 2020, arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dist_train.optimizers.trust import trust_ratios


class LAMB(torch.optim.Optimizer):
    """Adam whose update of each tensor is scaled to the tensor's own norm.

    For a tensor w with gradient g at step t, after the clipping below::

        m = β₁ m + (1 - β₁) g           v = β₂ v + (1 - β₂) g²
        u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε) + λ w
        w = w - γ (‖w‖ / ‖u‖) u         the ratio is 1 where ‖w‖ or ‖u‖ is 0, or where the group has `adapt=False`

    What implementations disagree on, and what this one does:

    * The paper bounds ‖w‖ by a function φ; its own code, NVIDIA's and timm's take φ(z) = z, and so does this.
    * Gradients are first divided by max(1, global norm / `max_gradient_norm`), as in NVIDIA's NVLAMB and timm; the norm
      is over all parameters of the optimizer. 0 switches it off, as in the paper.
    * The weight decay is inside the update that the ratio scales, outside the moments (decoupled from them).
    * Both moments are corrected for their bias, as in NVLAMB and timm; the paper's own code leaves this out, which acts
      like a warm-up of some 1 / (1 - β₂) steps.
    * Norm parameters and biases: `weight_decay=0` and `adapt=False` in their group
      (`dist_train.optimizers.parameter_groups`), as timm does for groups without decay.

    Args:
        params: parameters, or groups of them; a group may have its own `adapt`, `weight_decay`, `lr`.
        lr: the global learning rate γ.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        max_gradient_norm: bound of the global gradient norm; 0: none.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_gradient_norm: float = 1.0,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr is {lr}: use 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}: use two numbers from 0 to below 1")
        for name, value in (("eps", eps), ("weight_decay", weight_decay), ("max_gradient_norm", max_gradient_norm)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}: use 0 or more")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, defaults)
        self.max_gradient_norm = max_gradient_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip = self._clip_factor()
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if members:
                self._update(group, members, [p.grad for p in members], clip)
        return loss

    def _clip_factor(self) -> torch.Tensor | None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not self.max_gradient_norm or not gradients:
            return None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return 1 / (norm / self.max_gradient_norm).clamp(min=1)

    def _update(
        self,
        group: dict[str, Any],
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        clip: torch.Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        if clip is not None:
            gradients = list(torch._foreach_mul(gradients, clip))
        states = [self._state(weight) for weight in weights]
        first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, roots)
        torch._foreach_div_(updates, [1 - beta1 ** state["step"] for state in states])
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            norms, lengths = torch._foreach_norm(weights), torch._foreach_norm(updates)
            torch._foreach_mul_(updates, trust_ratios(norms, lengths, lengths))
        torch._foreach_sub_(weights, updates, alpha=float(group["lr"]))

    def _state(self, weight: torch.Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        return state
