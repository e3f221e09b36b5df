"""One sample to one clip: read, choose frames, decode them, crop. The whole work that a loader does for a sample.

clip, costs = read_clip(open_manifest("packed/train"), 5, clip=ClipConfig(), training=False)
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
import torch

from data_shards.activity import AUGMENTING, DECODING, READING
from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader, describe_sample
from data_shards.sampling import dense_frames, sample_generator, segment_frames
from data_shards.transforms import evaluation_clip, train_clip

# What a clip costs, as counted by `read_clip`; the seconds are wall time of the process that makes the clip.
COST_NAMES = (
    "read_seconds",
    "read_bytes",
    "decode_seconds",
    "decoded_bytes",
    "frames_decoded",
    "frames_used",
    "augment_seconds",
)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a video becomes a clip of `num_segments` square frames."""

    num_segments: int = 8
    """Frames of a clip."""
    sampling: Literal["segments", "dense"] = "segments"
    """Frames from equal segments of the whole video (TSN), or evenly spaced in a window (dense, I3D)."""
    dense_window_frames: int = 64
    """Length of the window in frames, for dense sampling."""
    crop_size: int = 224
    """Height and width of a clip in pixels."""
    short_side: int = 256
    """Short side in pixels that frames are resized to before a crop at fixed scale (evaluation)."""
    multi_scale_crop: bool = True
    """In training, crop at random scales and aspect ratios (TSN's augmentation) instead of at one scale."""
    horizontal_flip: bool = False
    """In training, mirror half of the clips; only where left and right do not matter to the classes."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("num_segments", "crop_size", "short_side"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.sampling not in ("segments", "dense"):
            problems.append(f'sampling is {self.sampling!r}, it must be "segments" or "dense"')
        if self.sampling == "dense" and self.dense_window_frames < self.num_segments:
            problems.append(
                f"dense_window_frames is {self.dense_window_frames}, it must hold num_segments={self.num_segments}"
            )
        if self.short_side < self.crop_size:
            problems.append(f"short_side is {self.short_side}, smaller than crop_size={self.crop_size}")
        if problems:
            raise ValueError("clip: " + "; ".join(problems))

    def frame_numbers(self, num_frames: int, generator: np.random.Generator | None) -> np.ndarray:
        """Frames of a video that make a clip: int64 (num_segments,); random with a generator, else centered."""
        if self.sampling == "dense":
            return dense_frames(num_frames, self.num_segments, self.dense_window_frames, generator)
        return segment_frames(num_frames, self.num_segments, generator)


def read_clip(
    manifest: Manifest,
    sample_id: int,
    *,
    clip: ClipConfig,
    training: bool,
    seed: int = 0,
    epoch: int = 0,
    reader: ShardReader | None = None,
    out: torch.Tensor | None = None,
    begins: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """One clip, and what it cost (`COST_NAMES`).

    Args:
        training: random frames, crop and flip, drawn from (seed, epoch, sample_id) only; otherwise centered.
        reader: keeps shards open between calls.
        out: uint8 (T, H, W, C), contiguous, to be written to.
        begins: called as each stage begins (`data_shards.activity.READING`, ...).

    Returns the clip as uint8 (T, C, H, W) with channels-last storage; a view of `out` where given.

    Raises DataError, naming shard and key, for a sample that is damaged or cannot be decoded; OSError where the machine
    cannot read it.
    """
    if out is None:
        out = torch.empty((clip.num_segments, clip.crop_size, clip.crop_size, 3), dtype=torch.uint8)
    begins = begins or _nobody_asks
    begins(READING)
    started = perf_counter()
    if reader is None:
        with ShardReader(manifest) as own_reader:
            payload = own_reader.read(sample_id)
    else:
        payload = reader.read(sample_id)
    begins(DECODING)
    read_done = perf_counter()
    generator = sample_generator(seed, epoch, sample_id) if training else None
    try:
        video = Video(payload)
        decoded = video.decode(clip.frame_numbers(video.num_frames, generator))
    except DataError as error:
        raise DataError(f"{describe_sample(manifest, sample_id)}: {error}") from error
    begins(AUGMENTING)
    decode_done = perf_counter()
    frames = torch.from_numpy(decoded.frames)
    if generator is None:
        evaluation_clip(frames, out, short_side=clip.short_side)
    else:
        train_clip(
            frames,
            out,
            short_side=clip.short_side,
            multi_scale_crop=clip.multi_scale_crop,
            horizontal_flip=clip.horizontal_flip,
            generator=generator,
        )
    costs: dict[str, float] = {
        "read_seconds": read_done - started,
        "read_bytes": len(payload),
        "decode_seconds": decode_done - read_done,
        "decoded_bytes": decoded.frames.nbytes,
        "frames_decoded": decoded.frames_decoded,
        "frames_used": len(decoded.frames),
        "augment_seconds": perf_counter() - decode_done,
    }
    return out.permute(0, 3, 1, 2), costs


def _nobody_asks(_stage: int) -> None:
    """The default of `begins`."""
