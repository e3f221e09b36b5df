"""What a decoder makes of a framing is, bit for bit, what comes of whole pictures."""

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.decode import Video
from data_shards.decoding.pixels import RgbFrames
from data_shards.errors import DataError
from data_shards.framing import CropBox, Framing, apply_framing, cuts_first
from data_shards.transforms import training_framing
from tests.data_shards.videos import encode, rotate

COLOR_SPACES = [1, 2, 5, 6, 7, 9]  # BT.709, unspecified, both of BT.601, SMPTE 240M, BT.2020


def random_picture(height: int, width: int, *, pixel_format: str, seed: int) -> av.VideoFrame:
    generator = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, pixel_format)
    for plane in frame.planes:
        plane.update(generator.integers(0, 256, plane.buffer_size, dtype=np.uint8).tobytes())
    return frame


def boxed(height: int, width: int, box: CropBox, size: int) -> Framing:
    return Framing(height=height, width=width, scaled_height=height, scaled_width=width, box=box, size=size)


def convert(frame: av.VideoFrame, framing: Framing | None) -> tuple[np.ndarray, bool]:
    frames = RgbFrames([0], framing)
    frames.put(0, frame)
    return frames.finish()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, CropBox]:
    height, width = 2 * draw(st.integers(1, 60)), 2 * draw(st.integers(1, 90))
    box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
    top, left = draw(st.integers(0, height - box_height)), draw(st.integers(0, width - box_width))
    return height, width, CropBox(top=top, left=left, height=box_height, width=box_width)


@settings(deadline=None)
@given(
    boxes(),
    st.sampled_from(["yuv420p", "yuvj420p"]),
    st.sampled_from(COLOR_SPACES),
    st.integers(0, 2),
    st.integers(0, 999),
)
def test_a_box_converted_alone_equals_the_box_of_the_whole_picture(place, pixel_format, color_space, color_range, seed):
    height, width, box = place
    frame = random_picture(height, width, pixel_format=pixel_format, seed=seed)
    frame.colorspace, frame.color_range = color_space, color_range
    whole, framed = convert(frame, None)
    assert not framed
    framing = boxed(height, width, box, 8)
    alone, framed = convert(frame, framing)
    assert framed
    assert np.array_equal(alone, apply_framing(torch.from_numpy(whole), framing).numpy())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pixel_format": "yuvj420p"},
        {"pixel_format": "yuv444p"},
        {"pixel_format": "yuv420p10le"},
        {"width": 51, "pixel_format": "yuv444p"},
        {"codec": "mpeg4", "container": "avi"},
    ],
    ids=["h264", "full_range", "no_subsampling", "ten_bits", "odd_size", "no_timestamps"],
)
@pytest.mark.parametrize("multi_scale_crop", [True, False])
def test_framing_while_decoding_equals_framing_afterwards(options, multi_scale_crop):
    payload = encode(12, **options)
    whole = Video(payload).decode([7, 2, 2, 11]).frames
    height, width = whole.shape[1:3]
    for seed in range(6):
        framing = training_framing(
            height,
            width,
            crop_size=32,
            short_side=40,
            multi_scale_crop=multi_scale_crop,
            generator=np.random.default_rng(seed),
        )
        decoded = Video(payload).decode([7, 2, 2, 11], framing)
        assert decoded.frames.flags.c_contiguous
        frames = torch.from_numpy(decoded.frames)
        assert decoded.framed == (
            multi_scale_crop and options.get("pixel_format", "yuv420p") in ("yuv420p", "yuvj420p")
        )
        mine = frames if decoded.framed else apply_framing(frames, framing)
        assert torch.equal(mine, apply_framing(torch.from_numpy(whole), framing))


def test_a_rotated_video_is_framed_upright():
    payload = rotate(encode(4), 1)
    framing = boxed(64, 48, CropBox(top=10, left=3, height=40, width=30), 16)
    decoded = Video(payload).decode([1], framing)
    assert not decoded.framed
    assert decoded.frames.shape == (1, 64, 48, 3)
    upside_down = rotate(encode(4), 2)  # of the same size, and yet not to be cut as it is stored
    box = boxed(48, 64, CropBox(top=0, left=0, height=20, width=20), 20)
    decoded = Video(upside_down).decode([1], box)
    frames = torch.from_numpy(decoded.frames)
    whole = torch.from_numpy(Video(upside_down).decode([1]).frames)
    assert torch.equal(frames if decoded.framed else apply_framing(frames, box), apply_framing(whole, box))


def test_a_box_at_the_edge_of_a_picture_with_odd_sides():
    frame = random_picture(47, 65, pixel_format="yuv420p", seed=0)
    whole, _ = convert(frame, None)
    framing = boxed(47, 65, CropBox(top=7, left=25, height=40, width=40), 40)
    frames, framed = convert(frame, framing)
    mine = torch.from_numpy(frames)
    assert torch.equal(
        mine if framed else apply_framing(mine, framing), apply_framing(torch.from_numpy(whole), framing)
    )


def test_a_manifest_with_another_size_is_told():
    framing = boxed(480, 640, CropBox(top=0, left=0, height=40, width=30), 16)
    decoded = Video(encode(4)).decode([1], framing)
    assert not decoded.framed
    with pytest.raises(DataError, match="its pictures are 64x48, the manifest says 640x480"):
        apply_framing(torch.from_numpy(decoded.frames), framing)


def test_a_framing_that_scales_first_does_not_cut_first():
    box = CropBox(top=0, left=0, height=32, width=32)
    assert cuts_first(boxed(48, 64, box, 32))
    assert not cuts_first(Framing(height=48, width=64, scaled_height=40, scaled_width=53, box=box, size=32))
