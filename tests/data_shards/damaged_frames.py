"""Damaged and odd frames files, made by code: `STORED` by name, as they may lie in a shard of form jpeg or raw."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_shards.forms.base import Form
from data_shards.forms.frames_file import table_bytes, write_frames_file
from tests.data_shards.videos import encode, pictures

FRAMES, HEIGHT, WIDTH = 4, 48, 64
PIXELS = pictures(FRAMES, HEIGHT, WIDTH)
# The header: magic 0, version 8, codec 10, num_frames 12, height 16, width 20, source_num_frames 24, fps 28; a row of
# 20 bytes for each frame from 36: offset, size, crc32, number.
ROWS, ROW = 36, 20


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One frames file."""

    form: Form
    """Form of the split that it lies in."""
    make: Callable[[], bytes]
    """Its bytes."""
    words: str = ""
    """Part of the line that names it; "" for one that is to be read right."""


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT), **options: object) -> bytes:
    """The third frame as a file."""
    file = io.BytesIO()
    Image.fromarray(PIXELS[2]).resize(size).convert(mode).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def jpeg() -> bytes:
    """A good file of JPEG frames."""
    return with_third(picture("JPEG", quality=95))


@functools.cache
def raw() -> bytes:
    """A good file of pixels."""
    frames = [frame.tobytes() for frame in PIXELS]
    return write_frames_file(frames, codec="raw", height=HEIGHT, width=WIDTH, fps=25.0)


def with_third(content: bytes) -> bytes:
    """Good JPEG frames but for the third, which is `content` with a checksum that agrees: it was stored like that."""
    frames = []
    for number in range(FRAMES):
        file = io.BytesIO()
        Image.fromarray(PIXELS[number]).save(file, "JPEG", quality=95)
        frames.append(content if number == 2 else file.getvalue())
    return write_frames_file(frames, codec="jpeg", height=HEIGHT, width=WIDTH, fps=25.0)


def put(payload: bytes, offset: int, content: bytes) -> bytes:
    """Other bytes at `offset`."""
    return payload[:offset] + content + payload[offset + len(content) :]


def forged(payload: bytes, offset: int, content: bytes) -> bytes:
    """Other bytes in the table, whose checksum agrees with them."""
    changed, end = put(payload, offset, content), table_bytes(FRAMES) - 4
    return put(changed, end, struct.pack("<I", zlib.crc32(changed[:end])))


def flipped(payload: bytes, offset: int) -> bytes:
    """One byte changed."""
    return put(payload, offset, bytes([payload[offset] ^ 0x41]))


def huge_jpeg() -> bytes:
    """A JPEG that claims 65,500 x 65,500 pixels."""
    real = struct.pack(">BHH", 8, HEIGHT, WIDTH)
    content = picture("JPEG", quality=95)
    assert real in content
    return content.replace(real, struct.pack(">BHH", 8, 65500, 65500))


def cut_picture(share: float) -> bytes:
    """The beginning of a JPEG."""
    content = picture(quality=95)
    return content[: int(len(content) * share)]


TABLE = table_bytes(FRAMES)
STORED: dict[str, Stored] = {
    # -- cut, overwritten ------------------------------------------------------------------------------
    "empty": Stored(form="jpeg", make=lambda: b"", words="no frames file"),
    "zeros": Stored(form="jpeg", make=lambda: bytes(len(jpeg())), words="no frames file"),
    "noise": Stored(form="raw", make=lambda: np.random.default_rng(0).bytes(5000), words="no frames file"),
    "cut-in-the-header": Stored(form="jpeg", make=lambda: jpeg()[:20], words="ends within its header"),
    "cut-in-the-table": Stored(form="jpeg", make=lambda: jpeg()[:80], words="cut"),
    "cut-behind-the-table": Stored(form="jpeg", make=lambda: jpeg()[:TABLE], words="cut"),
    "cut-in-the-frames": Stored(form="jpeg", make=lambda: jpeg()[: len(jpeg()) * 2 // 3], words="cut"),
    "cut-last-byte": Stored(form="raw", make=lambda: raw()[:-1], words="cut"),
    "bytes-behind-the-end": Stored(form="raw", make=lambda: raw() + bytes(100)),
    "a-video": Stored(form="jpeg", make=lambda: encode(4), words="no frames file"),
    "a-picture": Stored(form="jpeg", make=picture, words="no frames file"),
    "pixels-among-jpegs": Stored(form="jpeg", make=raw, words="stored as raw, the manifest says jpeg"),
    "jpegs-among-pixels": Stored(form="raw", make=jpeg, words="stored as jpeg, the manifest says raw"),
    # -- a byte of each field of the table ---------------------------------------------------------------
    "magic": Stored(form="jpeg", make=lambda: flipped(jpeg(), 3), words="no frames file"),
    "version": Stored(form="jpeg", make=lambda: flipped(jpeg(), 8), words="version"),
    "codec": Stored(form="jpeg", make=lambda: flipped(jpeg(), 10), words="table of the frames file is damaged"),
    "num-frames": Stored(form="jpeg", make=lambda: flipped(jpeg(), 12), words="frames"),
    "height": Stored(form="jpeg", make=lambda: flipped(jpeg(), 16), words="table of the frames file is damaged"),
    "rate": Stored(form="raw", make=lambda: flipped(raw(), 30), words="table of the frames file is damaged"),
    "offset": Stored(form="raw", make=lambda: flipped(raw(), ROWS + ROW), words="table of the frames file is damaged"),
    "size": Stored(
        form="raw", make=lambda: flipped(raw(), ROWS + ROW + 8), words="table of the frames file is damaged"
    ),
    "crc32": Stored(
        form="raw", make=lambda: flipped(raw(), ROWS + ROW + 12), words="table of the frames file is damaged"
    ),
    "table-crc32": Stored(
        form="raw", make=lambda: flipped(raw(), TABLE - 1), words="table of the frames file is damaged"
    ),
    # -- frames --------------------------------------------------------------------------------------------
    "frame-of-jpeg": Stored(form="jpeg", make=lambda: flipped(jpeg(), TABLE + 700), words="frame 0 of 4 is damaged"),
    "frame-of-pixels": Stored(form="raw", make=lambda: flipped(raw(), len(raw()) - 9), words="frame 3 of 4 is damaged"),
    "zeros-in-the-frames": Stored(
        form="raw", make=lambda: put(raw(), TABLE + 2 * 48 * 64 * 3, bytes(999)), words="frame 2 of 4 is damaged"
    ),
    # -- a table that lies --------------------------------------------------------------------------------
    "no-frames": Stored(form="jpeg", make=lambda: put(jpeg(), 12, bytes(4)), words="frames"),
    "four-billion-frames": Stored(form="jpeg", make=lambda: put(jpeg(), 12, b"\xff" * 4), words="frames"),
    "codec-unknown": Stored(form="jpeg", make=lambda: forged(jpeg(), 10, b"\x09"), words="codec 9"),
    "height-zero": Stored(form="raw", make=lambda: forged(raw(), 16, bytes(4)), words="64x0"),
    "height-huge": Stored(form="raw", make=lambda: forged(raw(), 16, b"\xff" * 4), words="4294967295"),
    "other-height": Stored(form="raw", make=lambda: forged(raw(), 16, b"\x40"), words="64x64"),
    "offset-behind-the-end": Stored(
        form="raw", make=lambda: forged(raw(), ROWS, struct.pack("<Q", 1 << 40)), words="cut"
    ),
    "offset-that-overflows": Stored(
        form="raw", make=lambda: forged(raw(), ROWS, struct.pack("<QI", (1 << 64) - 16, 32)), words="cut"
    ),
    "size-zero": Stored(form="jpeg", make=lambda: forged(jpeg(), ROWS + 8, bytes(8)), words="JPEG"),
    # -- pictures ------------------------------------------------------------------------------------------
    "jpeg-is-text": Stored(form="jpeg", make=lambda: with_third(b"no picture at all " * 9), words="JPEG"),
    "jpeg-is-empty": Stored(form="jpeg", make=lambda: with_third(b""), words="JPEG"),
    "jpeg-is-cut": Stored(form="jpeg", make=lambda: with_third(cut_picture(0.5)), words="JPEG"),
    "jpeg-is-cut-at-the-end": Stored(form="jpeg", make=lambda: with_third(cut_picture(0.95)), words="JPEG"),
    "jpeg-claims-huge-size": Stored(form="jpeg", make=lambda: with_third(huge_jpeg()), words="65500"),
    "jpeg-of-another-size": Stored(form="jpeg", make=lambda: with_third(picture(size=(40, 40))), words="40x40"),
    "jpeg-is-png": Stored(form="jpeg", make=lambda: with_third(picture("PNG")), words="JPEG"),
    "jpeg-progressive": Stored(form="jpeg", make=lambda: with_third(picture(progressive=True, quality=95))),
    "jpeg-gray": Stored(form="jpeg", make=lambda: with_third(picture(mode="L", quality=95))),
    "jpeg-without-subsampling": Stored(form="jpeg", make=lambda: with_third(picture(subsampling=0, quality=95))),
}
