"""Decoded pictures (YUV, in FFmpeg's frames) to RGB arrays: all of each picture, or no more than a framing shows.

Where a framing cuts a box out of pictures at their own size, only the box is converted. It equals the box of the
converted picture, bit for bit: a pixel of 4:2:0 becomes RGB from itself and the chroma sample of its two by two block,
so a box that begins and ends between such blocks needs nothing around it. The scaling is `data_shards.framing`'s;
swscale's own, in one pass with the conversion, was slower, and up to 49 of 255 away from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_shards.errors import DataError
from data_shards.framing import CropBox, Framing, cuts_first, resize

# 8 bits, 4:2:0; the second one states full range in its name.
_BOX_FORMATS = ("yuv420p", "yuvj420p")


class RgbFrames:
    """The wanted frames of one video, each converted as the decoder puts it out, while the processor has it cached."""

    def __init__(self, numbers: Sequence[int], framing: Framing | None) -> None:
        self._places = {number: place for place, number in enumerate(sorted(set(numbers)))}
        self._numbers, self._framing = numbers, framing
        self._reformatter = VideoReformatter()
        self._missing = set(numbers)
        self._clip: np.ndarray | None = None
        self._size = (0, 0)
        self._turns = 0
        self._box: CropBox | None = None

    @property
    def missing(self) -> set[int]:
        """Numbers of the frames that were not put yet."""
        return self._missing

    def put(self, number: int, frame: av.VideoFrame) -> None:
        """Take over a wanted frame; raises DataError where its size is not the first one's."""
        if self._clip is None:
            self._clip = self._begin(frame)
        if (frame.height, frame.width) != self._size:
            raise DataError(
                f"the frame size changes within the video, from {self._size[1]}x{self._size[0]} to "
                f"{frame.width}x{frame.height}"
            )
        target = self._clip[self._places[number]]
        if self._box is None:
            target[...] = _convert(frame, self._reformatter)
        else:
            _convert_box(frame, self._box, self._reformatter, target)
        self._missing.discard(number)

    def finish(self) -> tuple[np.ndarray, bool]:
        """RGB uint8 (T, H, W, 3), C-contiguous, upright, in the order asked for; and whether they are framed."""
        clip = self._clip
        assert clip is not None, "no frame was put"
        assert not self._missing, self._missing
        if self._turns:
            clip = np.ascontiguousarray(np.rot90(clip, self._turns, axes=(1, 2)))
        if self._box is not None and self._framing is not None:
            import torch

            clip = resize(torch.from_numpy(clip), self._framing.size, self._framing.size).numpy()
        if list(self._numbers) != list(self._places):
            clip = clip[[self._places[number] for number in self._numbers]]
        return clip, self._box is not None

    def _begin(self, frame: av.VideoFrame) -> np.ndarray:
        self._size = height, width = frame.height, frame.width
        self._turns = round(frame.rotation / 90) % 4
        framing = self._framing
        if framing is not None and _shows_a_box(frame, framing) and not self._turns:
            self._box = framing.box
            height, width = framing.box.height, framing.box.width
        return np.empty((len(self._places), height, width, 3), dtype=np.uint8)


def _shows_a_box(frame: av.VideoFrame, framing: Framing) -> bool:
    """Whether the framing begins with a cut out of pictures as they are stored, and they are of the usual kind."""
    return (
        cuts_first(framing)
        and (frame.height, frame.width) == (framing.height, framing.width)
        and frame.format.name in _BOX_FORMATS
        and not (frame.height % 2 or frame.width % 2)
    )


def _convert_box(frame: av.VideoFrame, box: CropBox, reformatter: VideoReformatter, target: np.ndarray) -> None:
    """The box of a frame as RGB into `target`, uint8 (box.height, box.width, 3)."""
    top, left = box.top // 2, box.left // 2  # in chroma samples
    bottom, right = -(-(box.top + box.height) // 2), -(-(box.left + box.width) // 2)
    planes = []
    for plane, samples in zip(frame.planes, (2, 1, 1), strict=True):
        values = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
        planes.append(values[top * samples : bottom * samples, left * samples : right * samples])
    part = av.VideoFrame.from_dlpack(planes, format=frame.format.name)
    part.colorspace, part.color_range = frame.colorspace, frame.color_range
    rows, columns = slice(box.top % 2, box.top % 2 + box.height), slice(box.left % 2, box.left % 2 + box.width)
    target[...] = _convert(part, reformatter)[rows, columns]


def _convert(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """A view, RGB uint8 (H, W, 3), valid as long as it is held."""
    # One thread: swscale would start one a core for each frame, at many times the cost of the conversion.
    plane = reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
    rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : frame.width * 3].reshape(frame.height, frame.width, 3)
