"""A sample from its source to the bytes that a shard holds: as it is, re-encoded, or as frames with an offset table.

    encoded = encode_sample(Path("take.mp4").read_bytes(), EncodingConfig(store_as="jpeg", short_side=256))
    writer.add(key, encoded.suffix, encoded.payload, info=encoded.info, ...)

Pure functions of their arguments, one thread, everything picklable: made for worker processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image

from data_shards.errors import DataError
from data_shards.forms.base import Form
from data_shards.forms.frames_file import SUFFIX, write_frames_file
from data_shards.forms.h264 import encode_h264
from data_shards.forms.source_frames import MAX_SIDE, stored_size, video_pictures
from data_shards.forms.stills import encode_jpeg, plain_jpeg_size, scaled_still, still_picture
from data_shards.probe import VideoInfo, probe_video
from data_shards.sampling import segment_frames

DEFAULT_GOP = 8
DEFAULT_CRF = 20
DEFAULT_QUALITY = 90
_LIMITS = {
    "short_side": (16, MAX_SIDE),
    "gop": (1, 100_000),
    "crf": (0, 51),
    "frames": (1, 1_000_000),
    "quality": (1, 100),
}

SampleSource = bytes | Sequence[bytes] | np.ndarray[Any, Any]
"""A sample as it comes: a whole video file; or picture files (JPEG, PNG, ...) in the order that they are shown, one for
a still; or uint8 pixels, RGB (T, H, W, 3) or grey (T, H, W)."""


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """In which form samples are stored."""

    store_as: Literal["mp4", "jpeg", "raw"] = "mp4"
    """A video file (untouched unless short_side, gop or crf is given), or frames with an offset table, each a JPEG
    picture or uint8 RGB."""
    short_side: int | None = None
    """Scale pictures down to this short side in pixels; smaller ones stay as they are."""
    gop: int | None = None
    """mp4: frames from one key frame to the next; re-encodes with H.264. 8 where short_side or crf re-encodes."""
    crf: int | None = None
    """mp4: constant rate factor of x264, 0 (lossless) to 51; re-encodes. 20 where short_side or gop re-encodes."""
    frames: int | None = None
    """jpeg, raw: store this many frames of each video, evenly spaced, instead of all."""
    quality: int | None = None
    """jpeg: quality, 1 to 100; 90 unless given."""

    def __post_init__(self) -> None:
        problems = []
        if self.store_as not in ("mp4", "jpeg", "raw"):
            problems.append(f"store_as is {self.store_as!r}, give mp4, jpeg or raw")
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                problems.append(f"{name} is {value}, it must be {low} to {high}")
        users = {"gop": ("mp4",), "crf": ("mp4",), "frames": ("jpeg", "raw"), "quality": ("jpeg",)}
        for name, forms in users.items():
            if getattr(self, name) is not None and self.store_as not in forms:
                problems.append(f"{name} is for {' and '.join(forms)}, not for {self.store_as}")
        if problems:
            raise ValueError("encoding: " + "; ".join(problems))

    @property
    def form(self) -> Form:
        """The form that the loader reads."""
        return "video" if self.store_as == "mp4" else self.store_as

    def flags(self) -> str:
        """The options of `reelscale pack` that ask for this form."""
        given = [(name, getattr(self, name)) for name in _LIMITS]
        options = [f"--{name.replace('_', '-')} {value}" for name, value in given if value is not None]
        return " ".join([f"--as {self.store_as}", *options])

    @property
    def is_untouched(self) -> bool:
        """True where a video file is stored as it is."""
        return self.store_as == "mp4" and self.short_side is None and self.gop is None and self.crf is None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A sample, ready to be written into a shard."""

    payload: bytes
    """The bytes of its tar member."""
    suffix: str
    """Name ending of the member: ".mp4" or the source's own where untouched, ".frames" for jpeg and raw."""
    info: VideoInfo
    """What is stored: the manifest's num_frames, width, height and fps."""
    form: Form
    """The same for all samples of a split."""
    meta: dict[str, Any] = field(default_factory=dict)
    """More facts for the sample's JSON member: what the source was, where that differs."""


def encode_sample(source: SampleSource, config: EncodingConfig, *, suffix: str = ".mp4") -> Encoded:
    """Make of a sample what `config` asks for.

    Args:
        source: see `SampleSource`.
        suffix: ending of the video file's name, kept where it is stored untouched.

    Raises:
        DataError: the source is damaged or no video or picture; the reason in one line, without a file name.
        ValueError: pictures or pixels were asked to be stored as mp4.
    """
    if isinstance(source, bytes):
        return _encode_video(source, config, suffix)
    if config.store_as == "mp4":
        raise ValueError("pictures are not stored as mp4; give jpeg or raw")
    return _encode_pictures(source, config)


def _encode_video(payload: bytes, config: EncodingConfig, suffix: str) -> Encoded:
    info = probe_video(payload)
    if config.is_untouched:
        return Encoded(payload=payload, suffix=suffix.lower(), info=info, form="video")
    if config.store_as == "mp4":
        encoded = encode_h264(
            payload,
            fps=info.fps,
            short_side=config.short_side,
            gop=DEFAULT_GOP if config.gop is None else config.gop,
            crf=DEFAULT_CRF if config.crf is None else config.crf,
        )
        stored = probe_video(encoded)
        if stored.num_frames != info.num_frames:
            raise DataError(f"damaged: {stored.num_frames} of its {info.num_frames} frames can be encoded again")
        return Encoded(payload=encoded, suffix=".mp4", info=stored, form="video", meta=_source_facts(info))
    numbers = _stored_numbers(info.num_frames, config.frames)
    pictures = video_pictures(payload, short_side=config.short_side, wanted=frozenset(numbers))
    return _frames_file(
        (_store(picture, config) for picture in pictures),
        config,
        numbers,
        info.num_frames,
        info.fps,
        _source_facts(info),
    )


def _encode_pictures(source: Sequence[bytes] | np.ndarray[Any, Any], config: EncodingConfig) -> Encoded:
    if len(source) == 0:
        raise DataError("0 frames")
    numbers = _stored_numbers(len(source), config.frames)
    stored = (_store_still(source[number], config) for number in numbers)
    return _frames_file(stored, config, numbers, len(source), 0.0, {"source_num_frames": len(source)})


class _Stored(NamedTuple):
    """One frame as it will lie in the member."""

    content: bytes
    height: int
    width: int


def _store(picture: np.ndarray[Any, Any], config: EncodingConfig) -> _Stored:
    """RGB uint8 (H, W, 3), contiguous, as JPEG or as it is."""
    height, width = picture.shape[:2]
    if config.store_as == "raw":
        return _Stored(picture.tobytes(), height, width)
    quality = DEFAULT_QUALITY if config.quality is None else config.quality
    return _Stored(encode_jpeg(picture, quality), height, width)


def _store_still(source: bytes | np.ndarray[Any, Any], config: EncodingConfig) -> _Stored:
    """A picture file, or pixels; a JPEG file that need not change is stored as it is."""
    if not isinstance(source, bytes):
        pixels = np.asarray(source)
        assert pixels.dtype == np.uint8, pixels.dtype
        return _store(scaled_still(PIL.Image.fromarray(pixels).convert("RGB"), config.short_side), config)
    size = plain_jpeg_size(source) if config.store_as == "jpeg" and config.quality is None else None
    if size is not None and stored_size(*size, config.short_side) == size:
        return _Stored(source, *size)
    return _store(scaled_still(still_picture(source), config.short_side), config)


def _frames_file(
    frames: Iterable[_Stored],
    config: EncodingConfig,
    numbers: Sequence[int],
    source_num_frames: int,
    source_fps: float,
    meta: dict[str, Any],
) -> Encoded:
    """The member for `frames`, which have the given numbers in their source."""
    contents: list[bytes] = []
    size: tuple[int, int] | None = None
    for number, frame in zip(numbers, frames, strict=True):
        size = size or (frame.height, frame.width)
        if (frame.height, frame.width) != size:
            raise DataError(
                f"the frame size changes, from {size[1]}x{size[0]} to {frame.width}x{frame.height} at frame {number}"
            )
        contents.append(frame.content)
    assert size is not None
    height, width = size
    if max(height, width) > MAX_SIDE:
        raise DataError(f"too large: {width}x{height} pixels, a side may have {MAX_SIDE}")
    fps = source_fps * len(contents) / source_num_frames
    payload = write_frames_file(
        contents,
        codec="raw" if config.store_as == "raw" else "jpeg",
        height=height,
        width=width,
        fps=fps,
        numbers=numbers,
        source_num_frames=source_num_frames,
    )
    info = VideoInfo(num_frames=len(contents), width=width, height=height, fps=fps, rotation_degrees=0)
    return Encoded(payload=payload, suffix=SUFFIX, info=info, form=config.form, meta=meta)


def _source_facts(info: VideoInfo) -> dict[str, Any]:
    return {"source_num_frames": info.num_frames, "source_width": info.width, "source_height": info.height}


def _stored_numbers(num_frames: int, wanted: int | None) -> list[int]:
    """Frames to store: all, or the middle ones of `wanted` equal parts; none twice."""
    if wanted is None or wanted >= num_frames:
        return list(range(num_frames))
    return segment_frames(num_frames, wanted).tolist()
