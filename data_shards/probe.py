"""What a video file is, checked before it is packed: does it open, is it whole, do its ends decode.

Frames are counted as `data_shards.decode` counts them, so the manifest and the loader agree by construction.
Not looked for: damage in the middle that leaves the packets in place (that would decode it all), and whether a
container without a table of its frames (Matroska, AVI, MPEG-TS) was cut; the frames that are there count.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import av.container

from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.forms.frames_file import FramesFile
from data_shards.forms.payload import MemoryPayload

__all__ = ["VideoInfo", "probe_frames", "probe_video"]


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Facts of one video."""

    num_frames: int
    """Frames shown from start to end."""
    width: int
    """Pixels, as decoded and upright."""
    height: int
    """Pixels, as decoded and upright."""
    fps: float
    """Average frames per second; 0 where the file does not tell."""
    rotation_degrees: int
    """Rotation that the file asks a player for, counterclockwise; it is applied when decoding."""


def probe_video(payload: bytes) -> VideoInfo:
    """Describe the first video stream of `payload`, a whole file, and decode its first and last frames.

    Raises:
        DataError: the reason in one line, without the file's name: "not a video: ...", "no video stream",
            "0 frames", "truncated: ...", "damaged: ...".
    """
    if not payload:
        raise DataError("not a video: the file is empty")
    try:
        fps, rotation_degrees = _examine(payload)
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        if payload[4:8] == b"ftyp" and b"moov" not in payload:
            raise DataError("truncated: an mp4 file without its index (moov), which comes last in many") from None
        raise DataError(f"not a video: {_words(error)}") from None
    try:
        video = Video(payload)
        if video.num_frames == 0:
            raise DataError("0 frames")
        ends = video.decode([0, video.num_frames - 1]).frames
    except DataError as error:
        raise DataError(str(error) if str(error) == "0 frames" else f"damaged: {error}") from None
    return VideoInfo(
        num_frames=video.num_frames,
        width=ends.shape[2],
        height=ends.shape[1],
        fps=fps,
        rotation_degrees=rotation_degrees,
    )


def probe_frames(payload: bytes) -> VideoInfo:
    """Describe `payload`, a whole frames file: check every frame's checksum, decode the first and the last.

    Raises:
        DataError: the reason in one line, without the file's name.
    """
    file = FramesFile(MemoryPayload(payload))
    file.read(range(file.num_frames))
    file.decode([0, file.num_frames - 1])
    table = file.table
    return VideoInfo(num_frames=len(table), width=table.width, height=table.height, fps=table.fps, rotation_degrees=0)


def _examine(payload: bytes) -> tuple[float, int]:
    """Frame rate and rotation; raises DataError where the container says that frames are missing."""
    with av.open(io.BytesIO(payload), metadata_errors="ignore") as container:
        if not container.streams.video:
            raise DataError("no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError("no decoder for the codec of its video stream")
        stream.codec_context.thread_count = 1
        packets = [packet for packet in container.demux(stream) if packet.size]
        whole = sum(not packet.is_corrupt for packet in packets)
        # Only mp4 and its kin have a table of all frames; the count of others is absent, or only a hint.
        announced = stream.frames if container.format.name.startswith("mov,mp4") else 0
        if announced == 0 and not packets:
            raise DataError("0 frames")
        if whole < max(announced, len(packets)):
            raise DataError(f"truncated: {whole} of {max(announced, len(packets))} frames are in the file")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        return fps, _rotation(container, stream)


def _rotation(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Rotation in degrees, which FFmpeg tells with a decoded frame."""
    try:
        container.seek(0, stream=stream)
        first = next(container.decode(stream), None)
    except av.error.FFmpegError as error:
        raise DataError(f"damaged: the first frame does not decode ({_words(error)})") from None
    return 0 if first is None else int(first.rotation)


def _words(error: Exception) -> str:
    """FFmpeg's own words, on one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())
