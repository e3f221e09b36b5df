"""One sample to one clip: read, choose frames, decode them, crop. The whole work that a loader does for a sample.

clip, costs = read_clip(open_manifest("packed/train"), 5, clip=ClipConfig(), training=False)
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
import torch

from data_shards.activity import AUGMENTING
from data_shards.errors import DataError, SampleError
from data_shards.forms.opening import open_frames
from data_shards.framing import Framing, apply_framing
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader, describe_sample
from data_shards.sampling import dense_frames, sample_generator, segment_frames
from data_shards.transforms import evaluation_framing, training_framing

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

    def framing(self, row: np.void, generator: np.random.Generator | None) -> Framing:
        """What of a sample's pictures a clip shows (`row` is the manifest's); random with a generator."""
        height, width = int(row["height"]), int(row["width"])
        if generator is None:
            return evaluation_framing(height, width, crop_size=self.crop_size, short_side=self.short_side)
        return training_framing(
            height,
            width,
            crop_size=self.crop_size,
            short_side=self.short_side,
            multi_scale_crop=self.multi_scale_crop,
            generator=generator,
        )


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
    begins = begins or _nobody_asks
    started = perf_counter()
    if reader is None:
        with ShardReader(manifest) as own_reader:
            return _make_clip(own_reader, sample_id, clip, training, (seed, epoch), out, begins, started)
    return _make_clip(reader, sample_id, clip, training, (seed, epoch), out, begins, started)


def _make_clip(
    reader: ShardReader,
    sample_id: int,
    clip: ClipConfig,
    training: bool,
    seed_and_epoch: tuple[int, int],
    out: torch.Tensor | None,
    begins: Callable[[int], None],
    started: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    if out is None:
        out = torch.empty((clip.num_segments, clip.crop_size, clip.crop_size, 3), dtype=torch.uint8)
    manifest = reader.manifest
    generator = sample_generator(*seed_and_epoch, sample_id) if training else None
    payload = reader.open(sample_id, begins)
    try:
        source = open_frames(manifest.form, payload)
        numbers = clip.frame_numbers(source.num_frames, generator)
        framing = clip.framing(manifest.samples[sample_id], generator)
        decoded = source.decode(numbers, framing)
        begins(AUGMENTING)
        decode_done = perf_counter()
        frames = torch.from_numpy(decoded.frames)
        if not decoded.framed:
            frames = apply_framing(frames, framing)
    except SampleError:
        raise
    except DataError as error:
        raise SampleError(f"{describe_sample(manifest, sample_id)}: {error}") from error
    if generator is not None and clip.horizontal_flip and generator.random() < 0.5:
        frames = frames.flip(2)
    out.copy_(frames)
    read_seconds = payload.costs.total_seconds()
    costs: dict[str, float] = {
        "read_seconds": read_seconds,
        "read_bytes": sum(payload.costs.num_bytes.values()),
        "decode_seconds": decode_done - started - read_seconds,
        "decoded_bytes": decoded.frames.nbytes,
        "frames_decoded": decoded.frames_decoded,
        "frames_used": len(decoded.frames),
        "augment_seconds": perf_counter() - decode_done,
    }
    return out.permute(0, 3, 1, 2), costs


def _nobody_asks(_stage: int) -> None:
    """The default of `begins`."""
