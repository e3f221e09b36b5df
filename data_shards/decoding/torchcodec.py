"""Videos decoded by torchcodec: with FFmpeg's shared libraries on the CPU, or on an NVIDIA GPU's decoder (NVDEC).

    video = TorchcodecVideo(payload, device="cpu")
    decoded = video.decode([0, 8, 16, 24])        # uint8 (4, H, W, 3)

On the CPU the pixels are those of `data_shards.decode.Video` for progressive video of 8 bits, at more time: pictures
that nothing refers to are decoded as well. On a GPU the conversion to RGB rounds differently (not measured here), and
each worker process holds a CUDA context. mp4 and Matroska only: of AVI and MPEG-TS torchcodec 0.13 was seen to give
frames next to those asked for, without an error. The last frame of a video of open groups is out of its reach.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_shards.errors import DataError
from data_shards.forms.base import DecodedFrames
from data_shards.framing import Framing, crop, cuts_first, resize

_EBML = b"\x1a\x45\xdf\xa3"  # how Matroska and WebM begin


class TorchcodecVideo:
    """One encoded video in memory, indexed but not decoded.

    Raises DataError where the bytes are not a video; the message does not say which sample, its caller knows.
    """

    def __init__(self, payload: bytes, *, device: str) -> None:
        from torchcodec.decoders import VideoDecoder

        if payload[4:8] != b"ftyp" and payload[:4] != _EBML:
            raise DataError(
                "the video cannot be opened: torchcodec counts the frames of files other than mp4 and Matroska in its "
                "own way; decode with pyav"
            )
        try:
            # "exact" reads all packets, as this project counts frames; the other mode trusts the file's header.
            self._decoder: Any = VideoDecoder(
                payload, dimension_order="NHWC", num_ffmpeg_threads=1, device=device, seek_mode="exact"
            )
        except (RuntimeError, ValueError) as error:
            raise DataError(f"the video cannot be opened ({_words(error)})") from None

    @property
    def num_frames(self) -> int:
        """Frames shown from start to end."""
        return len(self._decoder)

    def decode(self, frame_numbers: Sequence[int] | np.ndarray, framing: Framing | None = None) -> DecodedFrames:
        """Decode frames 0 <= number < `num_frames`, in the order given; a number may repeat; see `FrameSource.decode`.

        torchcodec does not tell how many frames it decoded: `frames_decoded` is how many were asked for, at least true.
        """
        numbers = [int(number) for number in frame_numbers]
        if not numbers or min(numbers) < 0 or max(numbers) >= self.num_frames:
            raise ValueError(f"frames {numbers} were asked of a video with frames 0 to {self.num_frames - 1}")
        try:
            frames = self._decoder.get_frames_at(numbers).data
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"frames {numbers} cannot be decoded, the video is damaged ({_words(error)})") from None
        framed = framing is not None and cuts_first(framing) and frames.shape[1:3] == (framing.height, framing.width)
        if framed:
            assert framing is not None
            boxes = crop(frames, framing.box).cpu()  # no more than the box leaves the GPU
            frames = resize(boxes, framing.size, framing.size)
        return DecodedFrames(
            frames=np.ascontiguousarray(frames.cpu().numpy()), frames_decoded=len(set(numbers)), framed=framed
        )


def _words(error: Exception) -> str:
    """What torchcodec says, without the place in its source."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^\w+, \S+:\d+, ", "", lines[0]) if lines else type(error).__name__
