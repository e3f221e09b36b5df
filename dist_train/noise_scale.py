"""The gradient noise scale: how large a batch still pays (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1).

It is measured on the way, from two gradient norms that data-parallel training has anyway: that of one rank's share of
the batch (b clips) and that of the whole batch (B clips). With G the true gradient and S the trace of the covariance of
one clip's gradient, E‖g_b‖² = ‖G‖² + S / b, and the same for B, so that::

    ‖G‖² ~ (B ‖g_B‖² - b ‖g_b‖²) / (B - b)
    S    ~ (‖g_b‖² - ‖g_B‖²) / (1/b - 1/B)
    noise scale = S / ‖G‖²                     in clips

Both are noisy and unbiased; their ratio is taken of averages over many steps, never averaged itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NUM_BLOCKS = 20
_MAX_STEPS_A_BLOCK = 16
_TWO_SIDED_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """An estimate with its uncertainty."""

    clips: float
    """S / ‖G‖² in clips; infinite where the gradient drowns in its noise."""
    low: float
    """Lower end of the 95 % interval, in clips."""
    high: float
    """Upper end; infinite where the gradient's norm is not told from zero."""
    num_steps: int
    """Steps it rests on."""

    def figures(self) -> dict[str, float | int | None]:
        """As JSON, which knows no infinity: None for it."""
        ends = {"clips": self.clips, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in ends.items()} | {
            "num_steps": self.num_steps
        }


class NoiseScaleMeter:
    """Collects the two norms of each step and gives the noise scale of the latest of them.

    Memory: 2 `NUM_BLOCKS` block sums. Neighbouring blocks are merged as steps come in, up to 16 steps a block;
    then the older half is forgotten, for the noise scale grows as training goes on: an estimate rests on the last 320
    to 640 steps measured. The interval is by Fieller's method for a ratio of means over the blocks, which holds where
    steps far apart are independent.
    """

    def __init__(self) -> None:
        self._blocks: list[list[float]] = []  # [steps, sum of S, sum of ‖G‖²]
        self._steps_a_block = 1

    def add(self, *, small_square: float, big_square: float, small_clips: int, big_clips: int) -> None:
        """One step: ‖g_b‖² (the mean over the ranks), ‖g_B‖², b and B.

        Raises:
            ValueError: b is not below B.
        """
        if not 0 < small_clips < big_clips:
            raise ValueError(f"the noise scale needs 0 < small batch < big batch, got {small_clips} and {big_clips}")
        gradient = (big_clips * big_square - small_clips * small_square) / (big_clips - small_clips)
        noise = (small_square - big_square) / (1 / small_clips - 1 / big_clips)
        if not math.isfinite(gradient + noise):
            return
        if not self._blocks or self._blocks[-1][0] >= self._steps_a_block:
            if len(self._blocks) == 2 * NUM_BLOCKS and self._steps_a_block == _MAX_STEPS_A_BLOCK:
                del self._blocks[:NUM_BLOCKS]
            elif len(self._blocks) == 2 * NUM_BLOCKS:
                pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
                self._blocks = [[a + b for a, b in zip(one, other, strict=True)] for one, other in pairs]
                self._steps_a_block *= 2
            self._blocks.append([0.0, 0.0, 0.0])
        for index, value in enumerate((1.0, noise, gradient)):
            self._blocks[-1][index] += value

    def clear(self) -> None:
        """Forgets all steps."""
        self._blocks, self._steps_a_block = [], 1

    def estimate(self) -> NoiseScale | None:
        """The noise scale of the steps so far; None before there are two blocks of them."""
        blocks = [block for block in self._blocks if block[0] == self._steps_a_block]
        if len(blocks) < 2:
            return None
        count = len(blocks)
        noise = [block[1] / block[0] for block in blocks]
        gradient = [block[2] / block[0] for block in blocks]
        mean_noise, mean_gradient = sum(noise) / count, sum(gradient) / count
        scale = 1 / (count * (count - 1))
        var_noise = scale * sum((value - mean_noise) ** 2 for value in noise)
        var_gradient = scale * sum((value - mean_gradient) ** 2 for value in gradient)
        products = ((n - mean_noise) * (g - mean_gradient) for n, g in zip(noise, gradient, strict=True))
        covariance = scale * sum(products)
        low, high = _fieller(mean_noise, mean_gradient, var_noise, var_gradient, covariance)
        return NoiseScale(
            clips=mean_noise / mean_gradient if mean_gradient > 0 else math.inf,
            low=max(low, 0.0),
            high=high,
            num_steps=int(sum(block[0] for block in blocks)),
        )


def _fieller(
    numerator: float, denominator: float, var_numerator: float, var_denominator: float, covariance: float
) -> tuple[float, float]:
    """The 95 % interval of a ratio of two means: all r with |n - r d| within 1.96 of its standard deviation."""
    square = _TWO_SIDED_95**2
    a = denominator**2 - square * var_denominator
    b = numerator * denominator - square * covariance
    c = numerator**2 - square * var_numerator
    root = b**2 - a * c
    if a <= 0 or root < 0 or denominator <= 0:  # the denominator may be zero: no upper end
        bound = (numerator - _TWO_SIDED_95 * math.sqrt(var_numerator)) / (
            abs(denominator) + _TWO_SIDED_95 * math.sqrt(var_denominator) or math.inf
        )
        return max(bound, 0.0), math.inf
    return (b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a
