"""Frames in one tar member, behind a table of where each lies: a clip reads and decodes only the frames it shows.

    payload = write_frames_file([jpeg0, jpeg1], codec="jpeg", height=256, width=340, fps=25.0)
    frames = FramesFile(MemoryPayload(payload), "jpeg").decode([1]).frames          # uint8 (1, 256, 340, 3)

The member (KEY.frames), all numbers little-endian:

    36 bytes     magic "RSFRAMES", version u16, codec u16 (1 JPEG, 2 RGB uint8), num_frames u32, height u32, width u32,
                 source_num_frames u32, frames per second f64
    20 a frame   offset u64 from the member's start, size u32, crc32 u32, number u32 of the frame in its source
    4 bytes      crc32 of all the above
    ...          the frames

The size of the table follows from the number of frames, which the manifest has: one read for the table, one for the
frames. Every byte that is used is checked: the table by its crc32, each frame by its own.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_shards.decoding.jpeg import JpegScaling, decode_jpegs
from data_shards.errors import DataError
from data_shards.forms.base import DecodedFrames, Form
from data_shards.forms.payload import SamplePayload
from data_shards.framing import Framing, cuts_first, resize

SUFFIX = ".frames"
"""Ending of the tar member's name."""

Codec = Literal["jpeg", "raw"]

_MAGIC = b"RSFRAMES"
_VERSION = 1
_CODECS: tuple[Codec, ...] = ("jpeg", "raw")  # numbered from 1
_HEADER = struct.Struct("<8sHHIIIId")
_COUNT_AT = 12  # where num_frames is
_ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("number", "<u4")])
_CRC = struct.Struct("<I")
_COPY_AGAIN = "copy the shard again or pack the set again"


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameTable:
    """What the table of a frames file says."""

    codec: Codec
    """How each frame is stored."""
    height: int
    """Rows of each frame, upright."""
    width: int
    """Columns of each frame, upright."""
    fps: float
    """Stored frames per second, so that num_frames / fps is the video's length in seconds; 0 where unknown."""
    source_num_frames: int
    """Frames of the video that these were taken from."""
    rows: np.ndarray[Any, np.dtype[np.void]]
    """One row a stored frame: offset and size in the member, crc32, number of the frame in its source."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def numbers(self) -> np.ndarray[Any, Any]:
        """Number of each stored frame in the video it was taken from; ascending."""
        return self.rows["number"]

    def ranges(self, frame_numbers: Sequence[int]) -> list[tuple[int, int]]:
        """(offset, size) of stored frames within the member, to be read."""
        return [(int(self.rows["offset"][number]), int(self.rows["size"][number])) for number in frame_numbers]


def table_bytes(num_frames: int) -> int:
    """Size of the table of a member with `num_frames` stored frames; the frames lie behind it."""
    return _HEADER.size + num_frames * _ROW.itemsize + _CRC.size


def write_frames_file(
    frames: Sequence[bytes],
    *,
    codec: Codec,
    height: int,
    width: int,
    fps: float,
    numbers: Sequence[int] | None = None,
    source_num_frames: int | None = None,
) -> bytes:
    """The member that holds `frames`, each encoded as `codec` says; `numbers` are those in the source (0, 1, ...)."""
    numbers = range(len(frames)) if numbers is None else numbers
    assert len(numbers) == len(frames) > 0, (len(numbers), len(frames))
    sizes = np.array([len(frame) for frame in frames], dtype=np.uint64)
    rows = np.zeros(len(frames), dtype=_ROW)
    rows["offset"] = table_bytes(len(frames)) + np.cumsum(sizes) - sizes
    rows["size"], rows["number"] = sizes, numbers
    rows["crc32"] = [zlib.crc32(frame) for frame in frames]
    source_num_frames = len(frames) if source_num_frames is None else source_num_frames
    codec_number = _CODECS.index(codec) + 1
    header = _HEADER.pack(_MAGIC, _VERSION, codec_number, len(frames), height, width, source_num_frames, fps)
    table = header + rows.tobytes()
    return b"".join((table, _CRC.pack(zlib.crc32(table)), *frames))


def read_table(content: bytes, *, size: int) -> FrameTable:
    """The table at the beginning of a member of `size` bytes; `content` may go on behind it.

    Raises DataError where it is no such table, is damaged, or names bytes behind the member's end.
    """
    if content[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"it is no frames file (it begins with {content[:8]!r}); pack the set again")
    if len(content) < _HEADER.size:
        raise DataError(f"the frames file ends within its header, after {len(content)} bytes; {_COPY_AGAIN}")
    _, version, codec, num_frames, height, width, source_num_frames, fps = _HEADER.unpack_from(content)
    if version != _VERSION:
        raise DataError(f"the frames file has version {version}, this reelscale reads {_VERSION}; update reelscale")
    end = table_bytes(num_frames) - _CRC.size
    if len(content) < end + _CRC.size:
        raise DataError(
            f"the table of the frames file is cut or damaged: {num_frames} frames need {end + _CRC.size} bytes of it, "
            f"there are {len(content)}; {_COPY_AGAIN}"
        )
    expected = _CRC.unpack_from(content, end)[0]
    found = zlib.crc32(memoryview(content)[:end])
    if found != expected:
        raise DataError(
            f"the table of the frames file is damaged (crc32 {found:08x}, not {expected:08x}); {_COPY_AGAIN}"
        )
    rows = np.frombuffer(content, dtype=_ROW, count=num_frames, offset=_HEADER.size)
    if not 1 <= codec <= len(_CODECS) or not num_frames or not height or not width:
        raise DataError(
            f"the frames file holds {num_frames} frames of {width}x{height}, codec {codec}; pack the set again"
        )
    stop = int(max(rows["offset"].max(), (rows["offset"] + rows["size"]).max()))  # the sum may have wrapped around
    if stop > size:
        raise DataError(f"the frames file is cut: its frames end at byte {stop}, it has {size}; {_COPY_AGAIN}")
    return FrameTable(
        codec=_CODECS[codec - 1],
        height=height,
        width=width,
        fps=fps,
        source_num_frames=source_num_frames,
        rows=rows,
    )


class FramesFile:
    """One sample of stored frames, its table read.

    Raises DataError, without saying which sample, where it is no frames file of that form or its table is damaged.
    """

    def __init__(
        self, payload: SamplePayload, form: Form | None = None, *, jpeg_scaling: JpegScaling = "exact"
    ) -> None:
        self._payload, self._jpeg_scaling = payload, jpeg_scaling
        num_frames = payload.num_frames
        if num_frames is None:
            num_frames = _peek_num_frames(payload)
        content = payload.parts([(0, min(table_bytes(num_frames), payload.size))])[0]
        self.table = read_table(content, size=payload.size)
        if len(self.table) != num_frames:
            raise DataError(
                f"the frames file holds {len(self.table)} frames, the manifest says {num_frames}; pack the set again"
            )
        if form is not None and self.table.codec != form:
            raise DataError(
                f"its frames are stored as {self.table.codec}, the manifest says {form}; pack the set again"
            )

    @property
    def num_frames(self) -> int:
        """Stored frames."""
        return len(self.table)

    def decode(self, frame_numbers: Sequence[int] | np.ndarray, framing: Framing | None = None) -> DecodedFrames:
        """Read and decode stored frames 0 <= number < `num_frames`, in the order given; see `FrameSource.decode`."""
        numbers = [int(number) for number in frame_numbers]
        if not numbers or min(numbers) < 0 or max(numbers) >= self.num_frames:
            raise ValueError(f"frames {numbers} were asked of a sample with frames 0 to {self.num_frames - 1}")
        wanted = sorted(set(numbers))
        contents = self.read(wanted)
        if self.table.codec == "raw":
            frames, framed = self._stack_pixels(contents, wanted, framing)
        else:
            frames, framed = decode_jpegs(contents, framing, scaling=self._jpeg_scaling), framing is not None
        height, width = self.table.height, self.table.width
        if not framed and frames.shape[1:3] != (height, width):
            raise DataError(
                f"its frames are {frames.shape[2]}x{frames.shape[1]}, its table says {width}x{height}; "
                "pack the set again"
            )
        if wanted != numbers:
            frames = frames[np.searchsorted(wanted, numbers)]
        return DecodedFrames(frames=frames, frames_decoded=len(wanted), framed=framed)

    def read(self, frame_numbers: Sequence[int]) -> list[bytes]:
        """The encoded bytes of stored frames, each checked; raises DataError naming the first that is damaged."""
        contents = self._payload.parts(self.table.ranges(frame_numbers))
        for number, content in zip(frame_numbers, contents, strict=True):
            found, expected = zlib.crc32(content), int(self.table.rows["crc32"][number])
            if found != expected:
                raise DataError(
                    f"frame {number} of {self.num_frames} is damaged (crc32 {found:08x}, its table says "
                    f"{expected:08x}); {_COPY_AGAIN}"
                )
        return contents

    def _stack_pixels(
        self, contents: Sequence[bytes], numbers: Sequence[int], framing: Framing | None
    ) -> tuple[np.ndarray, bool]:
        """Whole pictures; or framed ones, where the framing begins with a cut: no more than the box is copied then."""
        height, width = self.table.height, self.table.width
        num_bytes = height * width * 3
        pictures = []
        for content, number in zip(contents, numbers, strict=True):
            if len(content) != num_bytes:
                raise DataError(
                    f"frame {number} of {self.num_frames} has {len(content)} bytes, {width}x{height} RGB pixels have "
                    f"{num_bytes}; pack the set again"
                )
            pictures.append(np.frombuffer(content, dtype=np.uint8).reshape(height, width, 3))
        if framing is None or not cuts_first(framing) or (framing.height, framing.width) != (height, width):
            return np.stack(pictures), False
        import torch

        rows = slice(framing.box.top, framing.box.top + framing.box.height)
        columns = slice(framing.box.left, framing.box.left + framing.box.width)
        boxes = torch.from_numpy(np.stack([picture[rows, columns] for picture in pictures]))
        return resize(boxes, framing.size, framing.size).contiguous().numpy(), True


def _peek_num_frames(payload: SamplePayload) -> int:
    """The number of stored frames as the header has it, unchecked: the table's own checks follow."""
    head = payload.parts([(0, min(_HEADER.size, payload.size))])[0]
    return int.from_bytes(head[_COUNT_AT : _COUNT_AT + 4], "little")
