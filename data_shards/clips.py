"""One sample to one clip: read, choose frames, decode them, crop. The whole work that a loader does for a sample.

clip, costs = read_clip(open_manifest("packed/train"), 5, clip=ClipConfig(), training=False)
"""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch

from data_shards.activity import AUGMENTING
from data_shards.augment.color import jitter_colors
from data_shards.augment.rand_augment import rand_augment
from data_shards.clip_config import ClipConfig, View, training_labels
from data_shards.errors import DataError, SampleError
from data_shards.forms.base import DecodedFrames, FrameSource
from data_shards.forms.opening import open_frames
from data_shards.framing import apply_framing
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader, describe_sample
from data_shards.sampling import sample_generator
from data_shards.storage.base import TIERS

__all__ = ["COST_NAMES", "ClipConfig", "read_clip", "training_labels"]

# What a clip costs, as counted by `read_clip`; the seconds are wall time of the process that makes the clip.
COST_NAMES = (
    "read_seconds",
    "read_bytes",
    *(f"read_{tier}_{unit}" for unit in ("seconds", "bytes") for tier in TIERS),
    "decode_seconds",
    "decoded_bytes",
    "frames_decoded",
    "frames_used",
    "augment_seconds",
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
    """The clip of a sample, or all its views in evaluation, and what it cost (`COST_NAMES`).

    Args:
        training: random frames, crop, flip and colours, drawn from (seed, epoch, sample_id) only; otherwise
            `clip`'s evaluation views.
        reader: keeps shards open between calls.
        out: uint8, contiguous, with as many elements as `clip.sample_shape` has, to be written to.
        begins: called as each stage begins (`data_shards.activity.READING`, ...).

    Returns uint8 (V * T, C, H, W) with channels-last storage, the frames of one view after those of another, a view of
    `out` where given. One view (V = 1) needs the memory of its frames; several need whole pictures of all their frames.

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
    shape = clip.sample_shape(training=training)
    pixels = torch.empty(shape, dtype=torch.uint8) if out is None else out.view(shape)
    manifest = reader.manifest
    generator = sample_generator(*seed_and_epoch, sample_id) if training else None
    payload = reader.open(sample_id, begins)
    try:
        source = open_frames(manifest.form, payload, clip.decoding)
        views = clip.views(manifest.samples[sample_id], source.num_frames, generator)
        decoded, decode_done = decode_views(source, views, pixels, begins)
    except SampleError:
        raise
    except DataError as error:
        raise SampleError(f"{describe_sample(manifest, sample_id)}: {error}") from error
    if generator is not None:
        augment(pixels[0].numpy(), clip, generator)
    read_seconds = payload.costs.total_seconds()
    costs: dict[str, float] = {
        "read_seconds": read_seconds,
        "read_bytes": sum(payload.costs.num_bytes.values()),
        **{f"read_{tier}_seconds": seconds for tier, seconds in payload.costs.seconds.items()},
        **{f"read_{tier}_bytes": num_bytes for tier, num_bytes in payload.costs.num_bytes.items()},
        "decode_seconds": decode_done - started - read_seconds,
        "decoded_bytes": decoded.frames.nbytes,
        "frames_decoded": decoded.frames_decoded,
        "frames_used": len(decoded.frames),
        "augment_seconds": perf_counter() - decode_done,
    }
    return pixels.flatten(0, 1).permute(0, 3, 1, 2), costs


def decode_views(
    source: FrameSource, views: Sequence[View], pixels: torch.Tensor, begins: Callable[[int], None]
) -> tuple[DecodedFrames, float]:
    """Decode what the views show into `pixels` (uint8 VTHWC); returns what was decoded, and when it was (perf_counter).

    Raises DataError, without saying which sample, where a frame cannot be decoded.
    """
    numbers, places = _frames_of(views)
    framings = {view.framing for view in views}
    decoded = source.decode(numbers, views[0].framing if len(framings) == 1 else None)
    begins(AUGMENTING)
    decode_done = perf_counter()
    frames = torch.from_numpy(decoded.frames)
    framed = {framing: frames if decoded.framed else apply_framing(frames, framing) for framing in framings}
    for target, view, place in zip(pixels, views, places, strict=True):
        chosen = framed[view.framing][place]
        target.copy_(chosen.flip(2) if view.mirrored else chosen)
    return decoded, decode_done


def _frames_of(views: Sequence[View]) -> tuple[np.ndarray, list[slice | torch.Tensor]]:
    """The frames that the views are made of, each once, and where each view's are among them."""
    if len(views) == 1:
        return views[0].frame_numbers, [slice(None)]
    numbers, places = np.unique(np.concatenate([view.frame_numbers for view in views]), return_inverse=True)
    return numbers, list(torch.from_numpy(places).chunk(len(views)))


def augment(frames: np.ndarray, clip: ClipConfig, generator: np.random.Generator) -> None:
    """Changes a training clip (uint8 THWC) in place."""
    if clip.color.active:
        frames[:] = jitter_colors(frames, clip.color, generator)
    if clip.rand_augment.num_ops:
        frames[:] = rand_augment(frames, clip.rand_augment, generator)


def _nobody_asks(_stage: int) -> None:
    """The default of `begins`."""
