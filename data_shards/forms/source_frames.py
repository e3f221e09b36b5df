"""The frames of a source, one after the other, as they are to be stored: upright, of one size, scaled down if asked.

Frame `i` is the frame that `data_shards.decode.Video` calls `i`; a video of any length needs the memory of few frames.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data_shards.errors import DataError
from data_shards.framing import short_side_size
from data_shards.packet_index import index_packets

MAX_SIDE = 65535  # what the manifest can state


def stored_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """(height, width) at which pictures are stored: the short side at `short_side`, unless it is smaller already."""
    if short_side is None or min(height, width) <= short_side:
        return height, width
    return short_side_size(height, width, short_side)


def video_frames(payload: bytes) -> Iterator[tuple[av.VideoFrame, int | None]]:
    """All frames of a video as shown, each with its presentation timestamp; None where the file has no usable ones.

    Raises DataError where a frame cannot be decoded, or is not of the first one's size.
    """
    index = index_packets(payload)
    expected = [index.pts[packet] for packet in index.shown]
    wanted = set(expected)
    size: tuple[int, int] | None = None
    done = 0
    for number in range(len(index.packets) + 1):
        try:
            frames = index.decoder.decode(index.packets[number] if number < len(index.packets) else None)
        except av.error.EOFError:
            break
        except av.error.FFmpegError:
            continue  # a damaged picture: named below, where it is missed
        for frame in frames:
            if expected and frame.pts not in wanted:
                continue
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise DataError(
                    f"the frame size changes within the video, from {size[1]}x{size[0]} to {frame.width}x{frame.height}"
                )
            if frame.is_corrupt or (expected and (done == len(expected) or frame.pts != expected[done])):
                raise _damaged(done)
            yield frame, frame.pts if expected else None
            done += 1
    if done < len(expected) or done == 0:
        raise _damaged(done)


def video_pictures(payload: bytes, *, short_side: int | None, wanted: Container[int]) -> Iterator[np.ndarray[Any, Any]]:
    """The wanted frames of a video, RGB uint8 (H, W, 3), scaled by `stored_size`; raises as `video_frames` does."""
    reformatter = VideoReformatter()
    for number, (frame, _) in enumerate(video_frames(payload)):
        if number not in wanted:
            continue
        height, width = stored_size(frame.height, frame.width, short_side)
        unscaled = (height, width) == (frame.height, frame.width)
        # An unscaled picture is converted as `Video` does, to equal pixels.
        interpolation = None if unscaled else Interpolation.BICUBIC
        # One thread: swscale would start one a core for each frame, at many times the cost of the conversion.
        scaled = reformatter.reformat(frame, width, height, format="rgb24", interpolation=interpolation, threads=1)
        rows = np.frombuffer(memoryview(scaled.planes[0]), dtype=np.uint8).reshape(-1, scaled.planes[0].line_size)
        picture = rows[:height, : width * 3].reshape(height, width, 3)
        yield np.ascontiguousarray(np.rot90(picture, quarter_turns(frame)))


def quarter_turns(frame: av.VideoFrame) -> int:
    """How often a decoded frame is to be turned counterclockwise by 90 degrees to stand upright: 0 to 3."""
    return round(frame.rotation / 90) % 4


def _damaged(number: int) -> DataError:
    return DataError(f"damaged: frame {number} cannot be decoded")
