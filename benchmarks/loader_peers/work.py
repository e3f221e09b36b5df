"""The same work for every loader: 8 frames by TSN's segments, TSM's multi-scale crop, 224x224, uint8, 8 clips a batch.

The choice of frames and crops and the resizing are this project's own functions for all of them; decoding is each
library's, in one thread, seeking to the first wanted frame.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.framing import apply_framing
from data_shards.sampling import segment_frames
from data_shards.transforms import training_framing

NUM_FRAMES, CROP_SIZE, BATCH_CLIPS = 8, 224, 8
PREFETCH_BATCHES = 2  # a worker; PyTorch's default

Decoder = Callable[[bytes, np.random.Generator], np.ndarray]
"""(a file, random numbers) -> uint8 (8, H, W, 3), the frames of one clip, whole pictures."""

Stream = Iterator[Any]
"""Batches without end, or (for a resumed epoch) from where it goes on."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the same clips lie, in every form that a loader reads."""

    files: Path
    """Class folders of mp4 files."""
    shards: Path
    """A packed split: tars and a manifest."""
    litdata: Path
    """LitData's chunks."""
    mds: Path
    """MosaicML's shards."""


def make_clip(payload: bytes, decode: Decoder, generator: np.random.Generator) -> torch.Tensor:
    """One clip, uint8 (T, H, W, C)."""
    frames = torch.from_numpy(decode(payload, generator))
    framing = training_framing(
        frames.shape[1],
        frames.shape[2],
        crop_size=CROP_SIZE,
        short_side=256,
        multi_scale_crop=True,
        generator=generator,
    )
    return apply_framing(frames, framing).contiguous()


def clip_of_anyone(payload: bytes, decode: Decoder) -> torch.Tensor:
    """A clip with random numbers of its own: peers have no numbers that belong to a sample."""
    return make_clip(payload, decode, np.random.default_rng())


def with_pyav(payload: bytes, generator: np.random.Generator) -> np.ndarray:
    """PyAV: seek to the key frame before the first wanted frame, then decode to the last."""
    import av

    with av.open(io.BytesIO(payload)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rate, base = stream.average_rate, stream.time_base
        assert rate is not None
        assert base is not None
        wanted = segment_frames(stream.frames, NUM_FRAMES, generator).tolist()
        times = [round(number / rate / base) + (stream.start_time or 0) for number in wanted]
        container.seek(times[0], stream=stream, backward=True, any_frame=False)
        found: dict[int, np.ndarray] = {}
        half = 1 / rate / base / 2
        for frame in container.decode(stream):
            assert frame.pts is not None
            if any(abs(frame.pts - time) < half for time in times):
                found[frame.pts] = frame.to_ndarray(format="rgb24", threads=1)
            if frame.pts >= times[-1]:
                break
    nearest = [min(found, key=lambda pts, time=time: abs(pts - time)) for time in times]  # type: ignore[misc]
    return np.stack([found[pts] for pts in nearest])


def with_torchcodec(payload: bytes, generator: np.random.Generator) -> np.ndarray:
    """TorchCodec, one thread, without its scan of the whole file ("approximate": exact at a constant frame rate)."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(payload, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
    assert decoder.metadata.num_frames is not None
    wanted = segment_frames(decoder.metadata.num_frames, NUM_FRAMES, generator)
    return decoder.get_frames_at(wanted.tolist()).data.numpy()


def with_decord(payload: bytes, generator: np.random.Generator) -> np.ndarray:
    """Decord, one thread."""
    import decord

    reader = decord.VideoReader(io.BytesIO(payload), ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(segment_frames(len(reader), NUM_FRAMES, generator)).asnumpy()


def in_worker(_number: int) -> None:
    """What each loader's worker process sets: one thread."""
    torch.set_num_threads(1)
