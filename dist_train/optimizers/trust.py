"""The trust ratio that LARS and LAMB share."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def trust_ratios(
    norms: Sequence[torch.Tensor],
    divisors: Sequence[torch.Tensor],
    slopes: Sequence[torch.Tensor],
    *,
    coefficient: float = 1.0,
) -> list[torch.Tensor]:
    """`coefficient * norm / divisor` for each tensor, 1 where its norm or its slope is 0; no device is waited for.

    Args:
        norms: ‖w‖ of each weight, scalars.
        divisors: what to divide by, scalars.
        slopes: norm of each gradient (LARS) or update (LAMB), scalars.
        coefficient: factor on every ratio.

    Returns:
        Scalars on the weights' device.
    """
    norm, divisor, slope = torch.stack(list(norms)), torch.stack(list(divisors)), torch.stack(list(slopes))
    ratio = coefficient * norm / divisor
    usable = (norm > 0) & (slope > 0)
    return list(torch.where(usable, ratio, torch.ones_like(ratio)).unbind())
