"""How a picture of any size becomes a square of a clip: scaled, cut, scaled again; decided before it is decoded.

Layout legend: T frames, H height, W width, C = 3 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_shards.errors import DataError

if TYPE_CHECKING:
    import torch


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """A picture of `height` x `width` is scaled to `scaled_height` x `scaled_width`; the `box` of that becomes `size`².

    At most one of the two scalings changes anything: either the picture is scaled and a box of the final size cut, or
    a box is cut and scaled. A decoder may do all of it at once.
    """

    height: int
    """Rows of the upright picture, as the manifest has them."""
    width: int
    """Columns of it."""
    scaled_height: int
    """Rows after the first scaling."""
    scaled_width: int
    """Columns after it."""
    box: CropBox
    """What is cut out of the scaled picture."""
    size: int
    """Height and width in the end."""


def apply_framing(frames: torch.Tensor, framing: Framing) -> torch.Tensor:
    """Whole pictures (uint8 THWC) to squares (uint8 T, size, size, C).

    Raises DataError where the pictures do not have the size that the framing was made for.
    """
    if tuple(frames.shape[1:3]) != (framing.height, framing.width):
        raise DataError(
            f"its pictures are {frames.shape[2]}x{frames.shape[1]}, the manifest says {framing.width}x"
            f"{framing.height}; pack the set again"
        )
    scaled = resize(frames, framing.scaled_height, framing.scaled_width)
    return resize(crop(scaled, framing.box), framing.size, framing.size)


def cuts_first(framing: Framing) -> bool:
    """True where the box is cut out of pictures at their own size, so that nothing else of them need be made."""
    return (framing.height, framing.width) == (framing.scaled_height, framing.scaled_width)


def crop(frames: torch.Tensor, box: CropBox) -> torch.Tensor:
    """The rectangle `box` of each frame: a view (T, H, W, C)."""
    return frames[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`frames` (uint8 THWC) at another size: bilinear with antialiasing (as PIL's), a view where nothing changes."""
    if frames.shape[1:3] == (height, width):
        return frames
    from torch.nn.functional import interpolate  # here, as in `decoding`: packing does without PyTorch's seconds

    resized = interpolate(
        frames.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter of both at `short_side`, the other in proportion (rounded down)."""
    if height <= width:
        return short_side, max(int(short_side * width / height), short_side)
    return max(int(short_side * height / width), short_side), short_side
