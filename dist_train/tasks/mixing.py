"""Mixup and CutMix of clips on the device: each clip with its neighbour, and the target with the neighbour's.

Positions 2k and 2k + 1 of the stream are a pair, which a shuffled order makes a random one. How a pair is mixed is
drawn from (seed, k) alone. So a clip is mixed with the same clip in the same way at any number of ranks and
micro-batches, and after a resume, as long as micro-batches hold an even number of clips.

Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019), the
box in all frames alike.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How training clips are mixed two by two."""

    mixup_alpha: float = 0.0
    """Mixup: a weighted mean of two clips, the weight from Beta(alpha, alpha); 0: none. 0.2 to 0.8 are usual."""
    cutmix_alpha: float = 0.0
    """CutMix: a box of one clip in the other, its share of the picture from Beta(alpha, alpha); 0: none. 1 is usual.
    With mixup as well, half of the pairs get either."""
    probability: float = 1.0
    """Share of pairs that are mixed at all."""

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"mix.{name} is {getattr(self, name)}: use a finite number, 0 or more")
        if not 0 <= self.probability <= 1:
            found.append(f"mix.probability is {self.probability}: use a number from 0 to 1")
        return found


class Mixing(NamedTuple):
    """How each clip of a micro-batch is mixed with its partner, on the host; both clips of a pair alike."""

    weights: torch.Tensor
    """float32 `[B]`: the clip's own weight outside of the box; the partner has the rest."""
    boxes: torch.Tensor
    """int64 `[B, 4]`: top, bottom, left, right (exclusive) of what is the partner's alone; empty for mixup."""
    shares: torch.Tensor
    """float32 `[B]`: the clip's own share of the target."""


def draw_mixing(positions: torch.Tensor, config: MixConfig, *, seed: int, height: int, width: int) -> Mixing:
    """How the clips at `positions` (int64 `[B]`, on the host) are mixed: a function of seed and position.

    Raises:
        ValueError: a clip's partner is not next to it.
    """
    pairs = positions.view(-1, 2) if len(positions) % 2 == 0 else None
    if pairs is None or (pairs % 2 != torch.tensor([0, 1])).any() or (pairs[:, 0] + 1 != pairs[:, 1]).any():
        raise ValueError(
            f"a micro-batch of {len(positions)} clips from position {int(positions[0])} is not made of whole pairs: "
            "mixup and CutMix need an even number of clips in each micro-batch"
        )
    rows = [_draw_pair(number, config, seed, height, width) for number in (pairs[:, 0] // 2).tolist()]
    weights, boxes, shares = zip(*rows, strict=True)
    return Mixing(
        weights=torch.tensor(weights, dtype=torch.float32).repeat_interleave(2),
        boxes=torch.tensor(boxes).repeat_interleave(2, dim=0),
        shares=torch.tensor(shares, dtype=torch.float32).repeat_interleave(2),
    )


def mix(clips: torch.Tensor, mixing: Mixing, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips `[B, T, C, H, W]` (float) mixed, and each one's own share of its target `[B]`, on the clips' device.

    `counted` (bool `[B]`): a clip that does not count is not mixed, nor is its partner.
    """
    device = clips.device
    weights, boxes, shares = (part.to(device, non_blocking=True) for part in mixing)
    rows, columns = torch.arange(clips.shape[3], device=device), torch.arange(clips.shape[4], device=device)
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    outside = ~(inside_rows[:, :, None] & inside_columns[:, None, :])
    together = counted & partners(counted)
    own = torch.where(together[:, None, None], weights[:, None, None] * outside, 1.0)
    mixed = torch.lerp(partners(clips), clips, own[:, None, None])
    return mixed, torch.where(together, shares, 1.0)


def partners(values: torch.Tensor) -> torch.Tensor:
    """`values` `[B, ...]`, with the two of each pair exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _draw_pair(
    number: int, config: MixConfig, seed: int, height: int, width: int
) -> tuple[float, tuple[int, int, int, int], float]:
    """Weight, box and share of pair `number` (see `Mixing`)."""
    key = np.array([seed % 2**64, zlib.crc32(b"mixing")], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, number, 0]))
    happens, kind, across, down = generator.random(4).tolist()
    nothing = (0, 0, 0, 0)
    if happens >= config.probability:
        return 1.0, nothing, 1.0
    cuts = config.cutmix_alpha > 0 and (config.mixup_alpha == 0 or kind < 0.5)
    alpha = config.cutmix_alpha if cuts else config.mixup_alpha
    share = float(generator.beta(alpha, alpha))
    if not cuts:
        return share, nothing, share
    top, bottom = _cut(height, down, math.sqrt(1 - share))
    left, right = _cut(width, across, math.sqrt(1 - share))
    return 1.0, (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)


def _cut(size: int, center: float, share: float) -> tuple[int, int]:
    """First and last (exclusive) of `share` of `size` pixels around `center` (0 to 1), as far as they are there."""
    middle, length = int(center * size), int(share * size)
    return max(middle - length // 2, 0), min(middle - length // 2 + length, size)
