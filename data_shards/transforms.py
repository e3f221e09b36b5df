"""Frames to a clip of fixed size: multi-scale crop and flip in training, resize and center crop in evaluation.

Everything stays uint8; normalization belongs on the device. Layout legend: T frames, H height, W width, C = 3 channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data_shards.sampling import draw_below

CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
_MAX_DISTORT = 1
# A crop within two pixels of the wanted size is taken at that size and not resized.
_SNAP_PIXELS = 3
# Places of a crop in quarters of the free space, (x, y): corners, center, edges, and four in between.
_OFFSETS = (
    (0, 0), (4, 0), (0, 4), (4, 4), (2, 2),
    (0, 2), (4, 2), (2, 4), (2, 0),
    (1, 1), (3, 1), (1, 3), (3, 3),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CropBox:
    """A rectangle of a frame, in pixels."""

    top: int
    """First row."""
    left: int
    """First column."""
    height: int
    """Rows."""
    width: int
    """Columns."""


def multi_scale_crop_box(height: int, width: int, *, crop_size: int, generator: np.random.Generator) -> CropBox:
    """A random rectangle of a `height` x `width` frame, to be resized to `crop_size` x `crop_size`.

    Its sides are 1, 0.875, 0.75 or 0.66 of the frame's short side, two neighboring scales at most apart, at one of 13
    fixed places. Source: TSM's `ops/transforms.py`, `GroupMultiScaleCrop(crop_size, [1, .875, .75, .66])`.
    """
    sides = [int(min(height, width) * scale) for scale in CROP_SCALES]
    sides = [crop_size if abs(side - crop_size) < _SNAP_PIXELS else max(side, 1) for side in sides]
    pairs = [(sides[i], sides[j]) for i in range(len(sides)) for j in range(len(sides)) if abs(i - j) <= _MAX_DISTORT]
    crop_width, crop_height = pairs[draw_below(len(pairs), generator)]
    crop_width, crop_height = min(crop_width, width), min(crop_height, height)
    x, y = _OFFSETS[draw_below(len(_OFFSETS), generator)]
    return CropBox(
        top=y * ((height - crop_height) // 4),
        left=x * ((width - crop_width) // 4),
        height=crop_height,
        width=crop_width,
    )


def train_clip(
    frames: torch.Tensor,
    out: torch.Tensor,
    *,
    short_side: int,
    multi_scale_crop: bool,
    horizontal_flip: bool,
    generator: np.random.Generator,
) -> None:
    """Write a random crop of `frames` (uint8 THWC) to `out` (uint8 T, S, S, C, contiguous), flipped half of the time.

    With `multi_scale_crop` the crop is `multi_scale_crop_box`'s, resized; else the short side is resized to
    `short_side` and an S x S crop is taken at a uniform place. One choice holds for all frames of the clip.
    """
    crop_size = out.shape[1]
    if multi_scale_crop:
        box = multi_scale_crop_box(frames.shape[1], frames.shape[2], crop_size=crop_size, generator=generator)
        cropped = resize(crop(frames, box), crop_size, crop_size)
    else:
        frames = resize_short_side(frames, short_side)
        top = draw_below(frames.shape[1] - crop_size + 1, generator)
        left = draw_below(frames.shape[2] - crop_size + 1, generator)
        cropped = crop(frames, CropBox(top=top, left=left, height=crop_size, width=crop_size))
    if horizontal_flip and generator.random() < 0.5:
        cropped = cropped.flip(2)
    out.copy_(cropped)


def evaluation_clip(frames: torch.Tensor, out: torch.Tensor, *, short_side: int) -> None:
    """Write the center crop of `frames` (uint8 THWC) to `out` (uint8 T, S, S, C), short side resized before."""
    crop_size = out.shape[1]
    frames = resize_short_side(frames, short_side)
    top = (frames.shape[1] - crop_size) // 2
    left = (frames.shape[2] - crop_size) // 2
    out.copy_(crop(frames, CropBox(top=top, left=left, height=crop_size, width=crop_size)))


def crop(frames: torch.Tensor, box: CropBox) -> torch.Tensor:
    """The rectangle `box` of each frame: a view (T, H, W, C)."""
    return frames[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize_short_side(frames: torch.Tensor, short_side: int) -> torch.Tensor:
    """`frames` (uint8 THWC) with the shorter of H and W at `short_side`, the other in proportion (rounded down)."""
    height, width = frames.shape[1], frames.shape[2]
    if height <= width:
        return resize(frames, short_side, max(int(short_side * width / height), short_side))
    return resize(frames, max(int(short_side * height / width), short_side), short_side)


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`frames` (uint8 THWC) at another size: bilinear with antialiasing (as PIL's), a view where nothing changes."""
    if frames.shape[1:3] == (height, width):
        return frames
    resized = F.interpolate(
        frames.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1)
