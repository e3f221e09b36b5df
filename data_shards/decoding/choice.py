"""Which decoder makes frames of a sample's bytes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

from data_shards.decode import Video
from data_shards.decoding.jpeg import JpegScaling
from data_shards.forms.base import FrameSource


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """What decodes the samples."""

    video: Literal["auto", "pyav", "torchcodec", "torchcodec-cuda"] = "auto"
    """Decoder of videos: "pyav" brings its own FFmpeg; "torchcodec" needs the package and FFmpeg's shared libraries;
    "torchcodec-cuda" takes the GPU's decoder. "auto" is pyav: the fastest on a CPU, of equal pixels."""
    jpeg: JpegScaling = "exact"
    """JPEG frames that are shown at half their size or less: decoded whole and scaled ("exact"), or partly scaled by
    the decoder ("fast": about two thirds of the time, pixels that differ by 0.4 of 255 on average)."""

    def __post_init__(self) -> None:
        problems = []
        if self.video not in ("auto", "pyav", "torchcodec", "torchcodec-cuda"):
            problems.append(f'video is {self.video!r}, it must be "auto", "pyav", "torchcodec" or "torchcodec-cuda"')
        if self.jpeg not in ("exact", "fast"):
            problems.append(f'jpeg is {self.jpeg!r}, it must be "exact" or "fast"')
        if problems:
            raise ValueError("decoding: " + "; ".join(problems))

    def check_available(self) -> None:
        """Raise ValueError, saying what to install, where the machine lacks what is asked for."""
        if not self.video.startswith("torchcodec"):
            return
        try:
            importlib.import_module("torchcodec.decoders")
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"decoding: video is {self.video!r}, but torchcodec does not import ({reason}); install "
                "`reelscale[torchcodec]` and FFmpeg's shared libraries, or take pyav"
            ) from None
        import torch

        if self.video == "torchcodec-cuda" and not torch.cuda.is_available():
            raise ValueError('decoding: video is "torchcodec-cuda", but PyTorch finds no GPU; take pyav')


def open_video(payload: bytes, decoding: DecodingConfig) -> FrameSource:
    """The frames of a video file; raises DataError where the bytes are none."""
    if decoding.video.startswith("torchcodec"):
        from data_shards.decoding.torchcodec import TorchcodecVideo

        return TorchcodecVideo(payload, device="cuda" if decoding.video == "torchcodec-cuda" else "cpu")
    return Video(payload)
