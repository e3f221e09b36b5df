"""Which part of a picture a clip shows: multi-scale crop in training; one, three or ten crops in evaluation.

Drawn before anything is decoded, so that a decoder need not make more than that part.
"""

from collections.abc import Sequence

import numpy as np

from data_shards.framing import CropBox, Framing, short_side_size
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


def multi_scale_crop_box(
    height: int,
    width: int,
    *,
    crop_size: int,
    generator: np.random.Generator,
    scales: Sequence[float] = CROP_SCALES,
) -> CropBox:
    """A random rectangle of a `height` x `width` frame, to be resized to `crop_size` x `crop_size`.

    Its sides are `scales` of the frame's short side, two neighboring ones at most apart, at one of 13 fixed places.
    Source: TSM's `ops/transforms.py`, `GroupMultiScaleCrop(crop_size, [1, .875, .75, .66])`.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
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


def training_framing(
    height: int,
    width: int,
    *,
    crop_size: int,
    short_side: int,
    multi_scale_crop: bool,
    generator: np.random.Generator,
    scales: Sequence[float] = CROP_SCALES,
) -> Framing:
    """A random crop of a `height` x `width` picture.

    With `multi_scale_crop` the crop is `multi_scale_crop_box`'s, scaled; else the short side is scaled to `short_side`
    and a square is cut at a uniform place.
    """
    if multi_scale_crop:
        box = multi_scale_crop_box(height, width, crop_size=crop_size, generator=generator, scales=scales)
        return Framing(height=height, width=width, scaled_height=height, scaled_width=width, box=box, size=crop_size)
    scaled_height, scaled_width = short_side_size(height, width, short_side)
    top = draw_below(scaled_height - crop_size + 1, generator)
    left = draw_below(scaled_width - crop_size + 1, generator)
    return _square((height, width), (scaled_height, scaled_width), top=top, left=left, size=crop_size)


def evaluation_framings(height: int, width: int, *, crop_size: int, short_side: int, num_crops: int) -> list[Framing]:
    """Squares of a `height` x `width` picture, its short side scaled to `short_side` before.

    1: the center. 3: both ends of the long side and its center (Feichtenhofer et al., "SlowFast Networks for Video
    Recognition", ICCV 2019, section 4). 5: the corners and the center, half of TSN's ten; the other half is mirrored.
    """
    scaled_height, scaled_width = short_side_size(height, width, short_side)
    down, right = scaled_height - crop_size, scaled_width - crop_size
    center = (down // 2, right // 2)
    ends = [(0, right // 2), (down, right // 2)] if height > width else [(down // 2, 0), (down // 2, right)]
    corners = [(0, 0), (0, right), (down, 0), (down, right)]
    places = {1: [center], 3: [ends[0], center, ends[1]], 5: [*corners, center]}[num_crops]
    return [
        _square((height, width), (scaled_height, scaled_width), top=top, left=left, size=crop_size)
        for top, left in places
    ]


def _square(picture: tuple[int, int], scaled: tuple[int, int], *, top: int, left: int, size: int) -> Framing:
    """The picture (height, width) brought to the scaled size, and a square cut out of that."""
    return Framing(
        height=picture[0],
        width=picture[1],
        scaled_height=scaled[0],
        scaled_width=scaled[1],
        box=CropBox(top=top, left=left, height=size, width=size),
        size=size,
    )
