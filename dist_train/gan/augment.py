"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv 2006.10738), for small data sets.

    policy = ("color", "translation", "cutout")
    logits = discriminator(augment(images, policy, torch.rand(len(images), NUM_DRAWS)))

The same policy goes to reals and fakes, in the discriminator's step and in the generator's, with draws of its own each
time; gradients flow through it to the generator. A penalty on the discriminator's slope is taken at images that were
not augmented. The random numbers are an argument, so that a sample can be given its own whichever rank it is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Augmentation = Literal["color", "translation", "cutout"]
NUM_DRAWS = 7
"""Random numbers that an image takes: three for its color, two each for translation and cutout."""
TRANSLATION, CUTOUT = 0.125, 0.5


def augment(images: Tensor, policy: Sequence[Augmentation], draws: Tensor) -> Tensor:
    """Images `[B, C, H, W]` augmented, each by draws of its own, in the order of the policy's paper.

    `color`: brightness + U(-0.5, 0.5), saturation x U(0, 2), contrast x U(0.5, 1.5). `translation`: by up to an eighth
    of the side in both directions, zeros behind. `cutout`: a square of half the side set to zero.

    Args:
        images: in [-1, 1].
        policy: any of the three.
        draws: uniform in [0, 1), `[B, NUM_DRAWS]`.

    Raises:
        ValueError: an unknown name in the policy.
    """
    for name in policy:
        if name not in ("color", "translation", "cutout"):
            raise ValueError(f"augmentation {name!r} is unknown: use color, translation, cutout")
    draws = draws.to(device=images.device, dtype=images.dtype)
    if "color" in policy:
        images = _color(images, draws[:, 0:3])
    if "translation" in policy:
        images = _translate(images, draws[:, 3:5])
    if "cutout" in policy:
        images = _cut_out(images, draws[:, 5:7])
    return images


def _integers(draws: Tensor, low: int, high: int) -> Tensor:
    """An integer from `low` to `high` for each draw, `[B, 1]`."""
    return low + (draws[:, None] * (high - low + 1)).long().clamp(max=high - low)


def _color(images: Tensor, draws: Tensor) -> Tensor:
    brightness, saturation, contrast = (column[:, None, None, None] for column in draws.unbind(1))
    images = images + brightness - 0.5
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def _translate(images: Tensor, draws: Tensor) -> Tensor:
    height, width = images.shape[2:]
    down, right = int(height * TRANSLATION + 0.5), int(width * TRANSLATION + 0.5)
    padded = F.pad(images, (right, right, down, down))
    rows = torch.arange(height, device=images.device) + down + _integers(draws[:, 0], -down, down)
    columns = torch.arange(width, device=images.device) + right + _integers(draws[:, 1], -right, right)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded.movedim(1, -1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)


def _cut_out(images: Tensor, draws: Tensor) -> Tensor:
    inside = []
    for size, draw in zip(images.shape[2:], draws.unbind(1), strict=True):
        side = int(size * CUTOUT + 0.5)
        first = _integers(draw, -(side // 2), size - (side + 1) // 2)  # the square's centre is on the image
        places = torch.arange(size, device=images.device)
        inside.append((places >= first) & (places < first + side))
    kept = ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return images * kept
