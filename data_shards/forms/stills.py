"""Still pictures, from files of any kind to RGB pixels of the size that is stored, and to JPEG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from data_shards.decoding.jpeg import decode_jpeg
from data_shards.errors import DataError
from data_shards.forms.source_frames import stored_size

_EXIF_ORIENTATION = 0x0112
_MAX_JPEG_SIDE = 65500  # libjpeg's own limit


@contextmanager
def _opened(content: bytes) -> Iterator[PIL.Image.Image]:
    """The picture file, its pixels not decoded yet; what fails here or in the block is a DataError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(content)) as image:
                yield image
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"not packed: the picture claims too many pixels ({error})") from None
    except PIL.UnidentifiedImageError:
        raise DataError(f"not a picture: no format that is known (it begins with {content[:8]!r})") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"damaged: the picture does not decode ({error})") from None


def still_picture(content: bytes) -> PIL.Image.Image:
    """A picture file of any kind that PIL reads as 8-bit RGB, upright; an alpha channel is dropped.

    Raises DataError where it is none, is cut, or claims more pixels than a picture has.
    """
    with _opened(content) as image:
        upright = PIL.ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return PIL.Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
        return (upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB")


def scaled_still(picture: PIL.Image.Image, short_side: int | None) -> np.ndarray[Any, Any]:
    """A picture as RGB uint8 (H, W, 3), scaled by `stored_size`."""
    height, width = stored_size(picture.height, picture.width, short_side)
    if (height, width) != (picture.height, picture.width):
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.asarray(picture)


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that shows its pixels as they are stored; None for any other bytes.

    Not plain: other colours than grey and YCbCr, and a picture that a viewer would turn (EXIF).
    Raises DataError where the file is JPEG and does not decode.
    """
    if content[:2] != b"\xff\xd8":
        return None
    with _opened(content) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        plain = image.format == "JPEG" and image.mode in ("L", "RGB") and orientation == 1
    if not plain:
        return None
    height, width = decode_jpeg(content).shape[:2]
    return height, width


def encode_jpeg(picture: np.ndarray[Any, Any], quality: int) -> bytes:
    """RGB uint8 (H, W, 3) as baseline JPEG with 4:2:0 chroma, by simplejpeg where it imports, else by PIL.

    Raises DataError where a side is too long for JPEG.
    """
    height, width = picture.shape[:2]
    if max(height, width) > _MAX_JPEG_SIDE:
        raise DataError(f"too large: {width}x{height} pixels, a side of a JPEG picture may have {_MAX_JPEG_SIDE}")
    simplejpeg = _import_simplejpeg()
    if simplejpeg is not None:
        return simplejpeg.encode_jpeg(
            np.ascontiguousarray(picture), quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False
        )
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


@cache
def _import_simplejpeg() -> Any | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
