"""Videos re-encoded so that any frame is cheap to reach: H.264 with short closed groups of pictures, no sound."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import av.container
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data_shards.errors import DataError
from data_shards.forms.source_frames import quarter_turns, stored_size, video_frames
from data_shards.packet_index import describe_av_error

# Made to be decoded often, few frames at a time. Up to three pictures that nothing refers to stand between two that
# others need: a decoder leaves out those that nobody wants. Variable-length codes instead of arithmetic ones and no
# filter over the block borders halve the time of decoding what is left, for 7 % more bytes and 0.3 dB
# (8 of 300 frames at 340x256, group of 8: 14 ms with x264's own choices, 7 ms with these). The macroblock tree is
# left out because x264's bytes then differ from run to run, and a set packed again must be the same set.
_B_FRAMES = 3
_X264 = "open-gop=0:scenecut=0:b-adapt=0:b-pyramid=none:cabac=0:no-deblock=1:mbtree=0"
_PRESET = "fast"
_RGB, _UNSPECIFIED = 0, 2  # matrix coefficients, ITU-T H.273 table 4
_OPTIONS = {"fflags": "+bitexact"}


def encode_h264(payload: bytes, *, fps: float, short_side: int | None, gop: int, crf: int) -> bytes:
    """The video of `payload` as mp4: all its frames at their times, upright, 8 bits, 4:2:0, with even sides.

    Args:
        fps: average frames per second; times the frames where the source does not.

    Raises DataError where a frame cannot be decoded, or H.264 cannot hold it.
    """
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4", options=_OPTIONS) as output:
            _encode(payload, output, fps=fps, short_side=short_side, gop=gop, crf=crf)
    except av.error.FFmpegError as error:
        raise DataError(f"not packed: the video cannot be encoded again ({describe_av_error(error)})") from None
    return file.getvalue()


def _encode(
    payload: bytes, output: av.container.OutputContainer, *, fps: float, short_side: int | None, gop: int, crf: int
) -> None:
    rate = max(Fraction(fps or 25).limit_denominator(1001), Fraction(1, 1001))
    time_base = _time_base(payload)
    reformatter = VideoReformatter()
    stream = output.add_stream("libx264", rate=rate)
    first_pts: int | None = None
    for number, (decoded, pts) in enumerate(video_frames(payload)):
        frame = _as_stored(decoded, short_side, reformatter)
        if number == 0:
            first_pts = pts
            _set_up(stream.codec_context, frame, gop=gop, crf=crf)
            stream.codec_context.time_base = 1 / rate if pts is None else time_base
        if pts is None or first_pts is None:
            frame.pts, frame.time_base = number, 1 / rate
        else:
            frame.pts, frame.time_base = pts - first_pts, time_base
        frame.pict_type = av.video.frame.PictureType.NONE  # the encoder's choice, not the source's
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _set_up(encoder: av.VideoCodecContext, frame: av.VideoFrame, *, gop: int, crf: int) -> None:
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuv420p"
    encoder.thread_count = 1
    encoder.gop_size, encoder.max_b_frames = gop, min(_B_FRAMES, gop - 1)
    is_rgb = frame.colorspace == _RGB  # of the source; what it was turned into has the usual matrix
    encoder.colorspace = _UNSPECIFIED if is_rgb else frame.colorspace
    encoder.color_range = frame.color_range
    encoder.color_primaries, encoder.color_trc = frame.color_primaries, frame.color_trc
    encoder.options = {
        "preset": _PRESET,
        "crf": str(crf),
        "x264-params": f"{_X264}:min-keyint={gop}",
    }


def _as_stored(frame: av.VideoFrame, short_side: int | None, reformatter: VideoReformatter) -> av.VideoFrame:
    """The frame scaled, upright, as 8-bit 4:2:0; its colour matrix and range are kept."""
    height, width = stored_size(frame.height, frame.width, short_side)
    height, width = max(height // 2, 1) * 2, max(width // 2, 1) * 2
    scaled = reformatter.reformat(
        frame, width, height, format="yuv420p", interpolation=Interpolation.BICUBIC, threads=1
    )
    return _turned(scaled, quarter_turns(frame))


def _turned(frame: av.VideoFrame, turns: int) -> av.VideoFrame:
    """A 4:2:0 picture turned counterclockwise by quarters, plane by plane."""
    if turns == 0:
        return frame
    height, width = frame.height, frame.width
    luma, blue, red = np.split(frame.to_ndarray().reshape(-1), [height * width, height * width * 5 // 4])
    planes = [luma.reshape(height, width), *(plane.reshape(height // 2, width // 2) for plane in (blue, red))]
    turned_width = height if turns % 2 else width
    pixels = np.concatenate([np.rot90(plane, turns).reshape(-1) for plane in planes]).reshape(-1, turned_width)
    turned = av.VideoFrame.from_ndarray(pixels, format="yuv420p")
    turned.colorspace, turned.color_range = frame.colorspace, frame.color_range
    turned.color_primaries, turned.color_trc = frame.color_primaries, frame.color_trc
    return turned


def _time_base(payload: bytes) -> Fraction:
    """The unit of the first video stream's timestamps in seconds."""
    with av.open(io.BytesIO(payload), metadata_errors="ignore") as container:
        return container.streams.video[0].time_base or Fraction(1, 90_000)
