"""Encoded test videos, made with PyAV in memory, and the plain way to decode one: all frames, in order."""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np

X264_OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"}


def encode(
    num_frames: int = 32,
    *,
    width: int = 64,
    height: int = 48,
    codec: str = "libx264",
    container: str = "mp4",
    gop: int = 16,
    b_frames: int = 2,
    pixel_format: str = "yuv420p",
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    seed: int = 0,
    setup: Callable[[av.VideoStream], None] | None = None,
) -> bytes:
    """A video whose frames all differ; `pts` in units of 1/1000 s make a variable frame rate."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.thread_count = 1
        time_base = Fraction(1, 1000) if pts is not None else Fraction(1, 25)
        stream.codec_context.time_base = time_base
        stream.options = options or {}
        if setup is not None:
            setup(stream)
        for number, picture in enumerate(pictures(num_frames, height, width, seed)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def pictures(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3): a coarse random texture that moves, with a bright column that counts the frames."""
    generator = np.random.default_rng(seed)
    texture = generator.integers(0, 200, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    clip = np.stack([np.roll(texture, (number, 2 * number), axis=(0, 1)) for number in range(num_frames)])
    for number in range(num_frames):
        clip[number, :, number * 3 % width] = 255
    return clip


def decode_everything(payload: bytes) -> np.ndarray:
    """All frames as FFmpeg shows them, RGB uint8 (N, H, W, 3): the reference, with none of our code."""
    with av.open(io.BytesIO(payload), metadata_errors="ignore") as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])


def rotate(payload: bytes, quarter_turns: int) -> bytes:
    """The mp4 with a display matrix that turns it clockwise by quarters, as phones write it."""
    turns = {
        1: (0, 1, -1, 0),
        2: (-1, 0, 0, -1),
        3: (0, -1, 1, 0),
    }
    a, b, c, d = (value << 16 for value in turns[quarter_turns])
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()
    start = payload.index(b"tkhd") + 4 + 40
    return payload[:start] + matrix + payload[start + 36 :]


def without_first_group(payload: bytes) -> bytes:
    """The video cut before its second key frame, packets as they are: it may start with leading pictures."""
    source = io.BytesIO(payload)
    file = io.BytesIO()
    with av.open(source) as container, av.open(file, "w", format="matroska") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        keys = 0
        for packet in container.demux(stream):
            keys += packet.size > 0 and packet.is_keyframe
            if packet.size and keys >= 2:
                packet.stream = copy
                output.mux(packet)
    return file.getvalue()
