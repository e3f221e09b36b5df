"""Damaged and odd files, made by code: what downloads, disks, phones and editors do to a data set.

`SOURCES` are whole files as `pack` may meet them. Each says what becomes of it: the reason that it is rejected with, or
that it is taken, with its number of frames and its size (an odd file that can be read must be read right).
"""

from __future__ import annotations

import functools
import gzip
import io
import struct
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.data_shards.videos import X264_OPEN_GOP, encode, pictures, rotate, without_first_group

FRAMES, WIDTH, HEIGHT = 12, 64, 48


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A file that is packed, and what its sample must be."""

    num_frames: int = FRAMES
    width: int = WIDTH
    height: int = HEIGHT
    damaged: bool = False
    """True where frames in the middle do not decode: too dear to find when packing, named when a clip needs them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file."""

    make: Callable[[], bytes]
    """Its bytes."""
    outcome: str | Taken
    """Part of the reason that it is rejected with, or what it is taken as."""
    suffix: str = ".mp4"
    """The end of its name."""


@functools.cache
def whole() -> bytes:
    """A good mp4 whose index comes last, as most encoders write it."""
    return encode(FRAMES, width=WIDTH, height=HEIGHT, gop=6)


@functools.cache
def index_first() -> bytes:
    """The same with its index first, as for the web (FFmpeg moves it in a second pass over a real file)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with (
            av.open(io.BytesIO(whole())) as source,
            av.open(str(path), "w", options={"movflags": "faststart"}) as output,
        ):
            copy = output.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = copy
                    output.mux(packet)
        return path.read_bytes()


def cut(payload: bytes, share: float) -> bytes:
    """The first `share` of a file."""
    return payload[: int(len(payload) * share)]


def put(payload: bytes, offset: int, content: bytes) -> bytes:
    """The file with other bytes at `offset`."""
    assert offset >= 0
    assert offset + len(content) <= len(payload)
    return payload[:offset] + content + payload[offset + len(content) :]


def put_in_box(kind: bytes, offset: int, content: bytes, payload: bytes | None = None) -> bytes:
    """The mp4 with other bytes `offset` bytes behind the name of its last box `kind` (-4: the name, -8: the size)."""
    payload = whole() if payload is None else payload
    return put(payload, payload.rindex(kind) + 4 + offset, content)


def zeros(start: float, length: int, payload: bytes | None = None) -> bytes:
    """The file with `length` bytes of zeros from `start` (a share of its length)."""
    payload = whole() if payload is None else payload
    return put(payload, min(int(len(payload) * start), len(payload) - length), bytes(length))


def scattered(share: float) -> bytes:
    """A file with `share` of the bytes of its pictures replaced at random."""
    payload = bytearray(whole())
    start, stop = payload.index(b"mdat") + 4, payload.index(b"moov") - 4
    generator = np.random.default_rng(0)
    for place in generator.integers(start, stop, int((stop - start) * share)):
        payload[place] = generator.integers(256)
    return bytes(payload)


def sound(container: str, codec: str) -> bytes:
    """A second of silence."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for number in range(8):
            frame.pts = number * 1024
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def wav() -> bytes:
    """A second of silence without any container that could hold pictures."""
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(8000)
        output.writeframes(bytes(16000))
    return file.getvalue()


def picture(kind: str) -> bytes:
    """A still image."""
    file = io.BytesIO()
    Image.fromarray(pictures(1, HEIGHT, WIDTH)[0]).save(file, kind)
    return file.getvalue()


def without_pictures() -> bytes:
    """An mp4 with a video stream of no frame at all."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        output.mux(stream.encode(None))
        output.start_encoding()
    return file.getvalue()


def two_sizes() -> bytes:
    """A transport stream whose picture grows in the middle, as a live recording's does."""
    return encode(6, container="mpegts") + encode(6, width=96, height=64, container="mpegts")


def huge_mjpeg() -> bytes:
    """Motion JPEG whose pictures claim 65,500 x 65,500 pixels."""
    payload = encode(4, codec="mjpeg", container="avi", pixel_format="yuvj420p", b_frames=0)
    real = struct.pack(">HH", HEIGHT, WIDTH)
    return payload.replace(b"\xff\xc0\x00\x11\x08" + real, b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 65500, 65500))


def with_sound() -> bytes:
    """Pictures and sound, the sound first."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        voice = output.add_stream("aac", rate=8000)
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 8000, 0
        output.mux(voice.encode(silence))
        for number, one in enumerate(pictures(FRAMES, HEIGHT, WIDTH)):
            frame = av.VideoFrame.from_ndarray(one, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        output.mux(voice.encode(None))
    return file.getvalue()


ANY = ""  # rejected, in whatever words FFmpeg finds
COUNT = b"\xff\xff\xff\xff"  # of four billion entries
NOT_A_VIDEO, TRUNCATED, NO_STREAM, DAMAGED = "not a video", "truncated", "no video stream", "damaged"

SOURCES: dict[str, Case] = {
    # -- what is no video --------------------------------------------------------------------------------
    "empty": Case(make=lambda: b"", outcome="not a video: the file is empty"),
    "text": Case(make=lambda: b"404: not found\n" * 9, outcome=NOT_A_VIDEO),
    "html": Case(make=lambda: b"<!doctype html><title>Sign in</title>" * 40, outcome=NOT_A_VIDEO),
    "zeros": Case(make=lambda: bytes(10_000), outcome=NOT_A_VIDEO),
    "ones": Case(make=lambda: b"\xff" * 10_000, outcome=NOT_A_VIDEO),
    "noise": Case(make=lambda: np.random.default_rng(1).bytes(10_000), outcome=NOT_A_VIDEO),
    "gzip": Case(make=lambda: gzip.compress(whole()), outcome=NOT_A_VIDEO),
    "aac-only": Case(make=lambda: sound("mp4", "aac"), outcome=NO_STREAM),
    "wav-only": Case(make=wav, outcome=NO_STREAM, suffix=".avi"),
    "subtitles": Case(make=lambda: b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 9, outcome=NO_STREAM),
    "no-frames": Case(make=without_pictures, outcome=NO_STREAM),
    # -- cut ---------------------------------------------------------------------------------------------
    "cut-10-bytes": Case(make=lambda: whole()[:10], outcome=TRUNCATED),
    "cut-50-bytes": Case(make=lambda: whole()[:50], outcome=TRUNCATED),
    "cut-quarter": Case(make=lambda: cut(whole(), 0.25), outcome=TRUNCATED),
    "cut-half": Case(make=lambda: cut(whole(), 0.5), outcome=TRUNCATED),
    "cut-in-the-index": Case(make=lambda: cut(whole(), 0.9), outcome="no decoder for the codec"),
    "cut-index-first-in-the-index": Case(make=lambda: index_first()[:300], outcome=ANY),
    "cut-index-first-half": Case(make=lambda: cut(index_first(), 0.5), outcome=TRUNCATED),
    "cut-index-first-last-byte": Case(make=lambda: index_first()[:-1], outcome=TRUNCATED),
    "cut-avi": Case(
        make=lambda: cut(encode(FRAMES, codec="mpeg4", container="avi"), 0.7), outcome=TRUNCATED, suffix=".avi"
    ),
    "cut-matroska": Case(
        make=lambda: cut(encode(FRAMES, gop=3, container="matroska"), 0.6), outcome=Taken(num_frames=6), suffix=".mkv"
    ),
    "cut-mpegts": Case(make=lambda: cut(encode(FRAMES, gop=3, container="mpegts"), 0.6), outcome=DAMAGED, suffix=".ts"),
    # -- overwritten -------------------------------------------------------------------------------------
    "zeros-at-the-start": Case(make=lambda: zeros(0, 1000), outcome=NOT_A_VIDEO),
    "zeros-in-the-first-picture": Case(make=lambda: put_in_box(b"mdat", 0, bytes(1500)), outcome=DAMAGED),
    "zeros-in-the-middle": Case(make=lambda: zeros(0.7, 300), outcome=Taken(damaged=True)),
    "zeros-in-the-index": Case(make=lambda: put_in_box(b"stbl", 0, bytes(200)), outcome="no decoder for the codec"),
    "zeros-at-the-end": Case(make=lambda: zeros(1, 500), outcome="no decoder for the codec"),
    "scattered-bytes": Case(make=lambda: scattered(0.05), outcome=DAMAGED),
    # -- an index that lies --------------------------------------------------------------------------------
    "box-of-size-zero": Case(make=lambda: put_in_box(b"trak", -8, bytes(4)), outcome=Taken()),
    "box-of-size-one": Case(make=lambda: put_in_box(b"trak", -8, b"\0\0\0\1"), outcome=NO_STREAM),
    "box-of-size-seven": Case(make=lambda: put_in_box(b"mdia", -8, b"\0\0\0\7"), outcome=NO_STREAM),
    "box-beyond-the-file": Case(make=lambda: put_in_box(b"moov", -8, b"\x7f\xff\xff\xff"), outcome=Taken()),
    "four-billion-samples": Case(make=lambda: put_in_box(b"stsz", 4, b"\0\0\0\1" + COUNT), outcome=TRUNCATED),
    "four-billion-sizes": Case(make=lambda: put_in_box(b"stsz", 8, COUNT), outcome=NOT_A_VIDEO),
    "four-billion-times": Case(make=lambda: put_in_box(b"stts", 4, COUNT), outcome=ANY),
    "one-time-four-billion-times": Case(make=lambda: put_in_box(b"stts", 8, COUNT), outcome=TRUNCATED),
    "four-billion-offsets": Case(make=lambda: put_in_box(b"ctts", 4, COUNT), outcome=ANY),
    "four-billion-chunks": Case(make=lambda: put_in_box(b"stsc", 4, COUNT), outcome=ANY),
    "chunk-beyond-the-file": Case(make=lambda: put_in_box(b"stco", 8, b"\x7f\xff\xff\xff"), outcome=TRUNCATED),
    "sample-beyond-the-file": Case(make=lambda: put_in_box(b"stsz", 12, b"\x7f\xff\xff\xff"), outcome=TRUNCATED),
    "timescale-zero": Case(make=lambda: put_in_box(b"mdhd", 12, bytes(4)), outcome=ANY),
    # -- codecs --------------------------------------------------------------------------------------------
    "codec-unknown": Case(make=lambda: put_in_box(b"avc1", -4, b"zzzz"), outcome=ANY),
    "codec-of-another-name": Case(make=lambda: put_in_box(b"avc1", -4, b"hvc1"), outcome=ANY),
    "codec-encrypted": Case(make=lambda: put_in_box(b"avc1", -4, b"encv"), outcome=ANY),
    "codec-without-parameters": Case(make=lambda: put_in_box(b"avcC", 6, bytes(24)), outcome=DAMAGED),
    "vp9-in-webm": Case(
        make=lambda: encode(FRAMES, codec="libvpx-vp9", container="webm", b_frames=0), outcome=Taken(), suffix=".webm"
    ),
    "mpeg4-in-avi": Case(make=lambda: encode(FRAMES, codec="mpeg4", container="avi"), outcome=Taken(), suffix=".avi"),
    # -- odd, and to be read right -----------------------------------------------------------------------------
    "a-picture": Case(make=lambda: picture("PNG"), outcome=Taken(num_frames=1)),
    "one-frame": Case(make=lambda: encode(1), outcome=Taken(num_frames=1)),
    "variable-frame-rate": Case(
        make=lambda: encode(FRAMES, pts=[0, 40, 41, 300, 301, 340, 900, 901, 903, 1500, 1501, 4000]), outcome=Taken()
    ),
    "rotated-90": Case(make=lambda: rotate(whole(), 1), outcome=Taken(width=HEIGHT, height=WIDTH)),
    "rotated-180": Case(make=lambda: rotate(whole(), 2), outcome=Taken()),
    "rotated-270": Case(make=lambda: rotate(whole(), 3), outcome=Taken(width=HEIGHT, height=WIDTH)),
    "odd-size": Case(
        make=lambda: encode(FRAMES, width=65, height=49, pixel_format="yuv444p"), outcome=Taken(width=65, height=49)
    ),
    "two-pixels": Case(make=lambda: encode(FRAMES, width=2, height=2), outcome=Taken(width=2, height=2)),
    "very-wide": Case(make=lambda: encode(FRAMES, width=1024, height=2), outcome=Taken(width=1024, height=2)),
    "ten-bit": Case(make=lambda: encode(FRAMES, pixel_format="yuv420p10le"), outcome=Taken()),
    "four-two-two": Case(make=lambda: encode(FRAMES, pixel_format="yuv422p"), outcome=Taken()),
    "gray": Case(make=lambda: encode(FRAMES, pixel_format="gray"), outcome=Taken()),
    "open-groups": Case(make=lambda: encode(FRAMES, gop=4, options=X264_OPEN_GOP), outcome=Taken()),
    "cut-before-a-key-frame": Case(
        make=lambda: without_first_group(encode(24, gop=8, options=X264_OPEN_GOP)),
        outcome=Taken(num_frames=16),
        suffix=".mkv",
    ),
    "sound-first": Case(make=with_sound, outcome=Taken()),
    "size-changes": Case(make=two_sizes, outcome=ANY, suffix=".ts"),
    "huge-size-in-the-index": Case(make=lambda: put_in_box(b"avc1", 24, b"\xff\xff\xff\xff"), outcome=Taken()),
    "huge-size-in-the-pictures": Case(make=huge_mjpeg, outcome=DAMAGED, suffix=".avi"),
}
