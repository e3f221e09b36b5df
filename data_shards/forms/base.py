"""What a form of a sample promises: its frames, by number, at the size that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from data_shards.framing import Framing

Form = Literal["video", "jpeg", "raw"]
"""How the samples of a split are stored: a video file, JPEG frames with an offset table, uint8 frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedFrames:
    """Frames as asked for, and what they cost."""

    frames: np.ndarray
    """RGB uint8 (T, H, W, 3), C-contiguous, upright (a rotation that the file states is applied)."""
    frames_decoded: int
    """Frames that the decoder put out for them, wanted or not."""
    framed: bool = False
    """True where the decoder did the framing that was asked for; otherwise the frames are whole pictures."""


class FrameSource(Protocol):
    """One sample, opened: what there is to know is known, no frame is decoded yet."""

    @property
    def num_frames(self) -> int:
        """Frames from start to end."""

    def decode(self, frame_numbers: Sequence[int] | np.ndarray, framing: Framing | None = None) -> DecodedFrames:
        """Decode frames 0 <= number < `num_frames`, in the order given; a number may repeat.

        Args:
            framing: what will be made of the pictures; a source may do it itself (`DecodedFrames.framed`), with the
                pixels of `apply_framing`, bit for bit, unless it was told to be fast instead.

        Raises DataError where a wanted frame cannot be decoded, ValueError for a number that does not exist.
        """
