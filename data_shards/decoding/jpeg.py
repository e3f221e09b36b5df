"""JPEG pictures to RGB, by libjpeg-turbo: through simplejpeg where it imports, else through PIL.

    picture = decode_jpeg(payload)                # uint8 (H, W, 3)
    clip = decode_jpegs(payloads, framing)        # uint8 (T, size, size, 3)

Both libraries give the same pixels (accurate integer DCT, smooth chroma upsampling); simplejpeg is three times as fast.
libjpeg-turbo's shortcuts for both are not used: 3 to 6 % of the time for errors of up to 9 and 51 of 255. Damage that
leaves a picture readable is an error with simplejpeg and goes unseen with PIL; frames files have checksums besides.
An orientation that a camera notes in EXIF is not applied: packing stores pictures upright.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import PIL.Image

from data_shards.errors import DataError
from data_shards.framing import CropBox, Framing, apply_framing, cuts_first

JpegScaling = Literal["exact", "fast"]
"""How a framing that makes pictures smaller is done: "exact" decodes them whole and scales; "fast" leaves out of the
decoding what halves, quarters or eighths of the size do not need, and cuts boxes at the nearest of those pixels."""

_REDUCTIONS = (8, 4, 2)  # by these the inverse DCT gets cheaper; others that libjpeg-turbo has do not


def decode_jpeg(payload: bytes | memoryview, framing: Framing | None = None) -> np.ndarray:
    """One picture: RGB uint8 (H, W, 3), or (size, size, 3) of what `framing` shows of it.

    Raises DataError, without saying which picture, where the bytes are not a whole JPEG file.
    """
    return decode_jpegs([payload], framing)[0]


def decode_jpegs(
    payloads: Sequence[bytes | memoryview], framing: Framing | None = None, *, scaling: JpegScaling = "exact"
) -> np.ndarray:
    """Pictures of one size: RGB uint8 (T, H, W, 3), or (T, size, size, 3) with `framing`; C-contiguous.

    Raises DataError as `decode_jpeg` does, and where the sizes differ from each other or from the framing's.
    """
    if framing is None:
        return _decode(payloads)
    import torch

    reduction = _reduction(framing) if scaling == "fast" and _simplejpeg() is not None else 1
    pictures = torch.from_numpy(_decode(payloads, reduction))
    if reduction > 1:
        framing = _reduce(framing, reduction)
    return np.ascontiguousarray(apply_framing(pictures, framing))


def _decode(payloads: Sequence[bytes | memoryview], reduction: int = 1) -> np.ndarray:
    """Whole pictures, `1 / reduction` of their size."""
    simplejpeg = _simplejpeg()
    decode = _decode_by_pil if simplejpeg is None else partial(_decode_by_simplejpeg, simplejpeg)
    clip: np.ndarray | None = None
    for place, payload in enumerate(payloads):
        height, width = (-(-side // reduction) for side in _picture_size(payload))
        if clip is None:
            clip = np.empty((len(payloads), height, width, 3), dtype=np.uint8)
        if clip.shape[1:3] != (height, width):
            raise DataError(
                f"the frame size changes within the sample, from {clip.shape[2]}x{clip.shape[1]} to {width}x{height}"
            )
        decode(payload, clip[place])
    assert clip is not None, "no pictures"
    return clip


def _picture_size(payload: bytes | memoryview) -> tuple[int, int]:
    """(height, width) as the header has them."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        with _open_by_pil(payload) as image:
            return image.height, image.width
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError as error:
        raise _damaged(error) from None
    return height, width


def _decode_by_simplejpeg(simplejpeg: Any, payload: bytes | memoryview, target: np.ndarray) -> None:
    """A picture into `target`, which is as large as it, or smaller by a reduction."""
    height, width, color, _ = simplejpeg.decode_jpeg_header(payload)
    if color in ("CMYK", "YCCK"):  # four inks, which libjpeg-turbo does not turn to RGB
        _decode_by_pil(payload, target)
        return
    whole = (height, width) == target.shape[:2]
    least = {} if whole else {"min_height": target.shape[0], "min_width": target.shape[1]}
    try:
        decoded = simplejpeg.decode_jpeg(payload, "RGB", buffer=target, **least)
    except ValueError as error:
        raise _damaged(error) from None
    assert decoded.shape == target.shape, (decoded.shape, target.shape)


def _decode_by_pil(payload: bytes | memoryview, target: np.ndarray) -> None:
    with _open_by_pil(payload) as image:
        try:
            rgb = image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise _damaged(error) from None
    if (rgb.height, rgb.width) != target.shape[:2]:
        rgb = rgb.resize((target.shape[1], target.shape[0]), PIL.Image.Resampling.BOX)
    target[...] = rgb


def _open_by_pil(payload: bytes | memoryview) -> PIL.Image.Image:
    try:
        return PIL.Image.open(io.BytesIO(payload), formats=("JPEG",))
    except (OSError, ValueError, SyntaxError) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> DataError:
    return DataError(f"the picture is damaged, or no JPEG file ({error})")


def _reduction(framing: Framing) -> int:
    """The largest reduction that leaves pictures at least as large as the framing shows them."""
    shrinks = (
        framing.height / framing.scaled_height * framing.box.height / framing.size,
        framing.width / framing.scaled_width * framing.box.width / framing.size,
    )
    return next((reduction for reduction in _REDUCTIONS if min(shrinks) >= reduction), 1)


def _reduce(framing: Framing, reduction: int) -> Framing:
    """The framing for pictures that were made smaller."""
    height, width = -(-framing.height // reduction), -(-framing.width // reduction)
    if not cuts_first(framing):
        return replace(framing, height=height, width=width)
    box = framing.box
    top, bottom = round(box.top / reduction), round((box.top + box.height) / reduction)
    left, right = round(box.left / reduction), round((box.left + box.width) / reduction)
    smaller = CropBox(top=top, left=left, height=bottom - top, width=right - left)
    return replace(framing, height=height, width=width, scaled_height=height, scaled_width=width, box=smaller)


@cache
def _simplejpeg() -> Any | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
