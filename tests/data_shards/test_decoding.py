"""Decoders that are chosen by name: the same frames, the same errors, and what is missing is said at the start."""

import sys

import numpy as np
import pytest
import torch

from data_shards.clips import ClipConfig, read_clip
from data_shards.decode import Video
from data_shards.decoding.choice import DecodingConfig, open_video
from data_shards.errors import DataError
from data_shards.forms.frames_file import write_frames_file
from data_shards.forms.opening import open_frames
from data_shards.forms.payload import MemoryPayload
from data_shards.framing import apply_framing
from data_shards.transforms import training_framing
from tests.data_shards.packed import make_split
from tests.data_shards.videos import decode_everything, encode, rotate

KINDS = {
    "b_frames": {},
    "long_gop": {"num_frames": 60, "gop": 250, "b_frames": 4},
    "variable_rate": {"pts": np.cumsum([0, *np.random.default_rng(0).integers(5, 300, 39)]).tolist(), "num_frames": 40},
    "one_frame": {"num_frames": 1},
    "matroska": {"container": "matroska"},
    "full_range": {"pixel_format": "yuvj420p"},
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "vp9": {"codec": "libvpx-vp9", "container": "webm"},
}


@pytest.fixture
def torchcodec_video():
    """The class; skips where torchcodec cannot run."""
    try:
        DecodingConfig(video="torchcodec").check_available()
    except ValueError as reason:
        pytest.skip(str(reason))
    from data_shards.decoding.torchcodec import TorchcodecVideo

    return TorchcodecVideo


@pytest.mark.parametrize("name", KINDS)
def test_torchcodec_gives_the_same_frames(torchcodec_video, name):
    payload = encode(**KINDS[name])
    reference = decode_everything(payload)
    video = torchcodec_video(payload, device="cpu")
    assert video.num_frames == Video(payload).num_frames == len(reference)
    for numbers in ([len(reference) - 1], [len(reference) // 2, 0, 0], range(len(reference))):
        decoded = video.decode(numbers)
        assert decoded.frames.flags.c_contiguous
        assert np.array_equal(decoded.frames, reference[list(numbers)])


def test_torchcodec_turns_rotated_videos_upright(torchcodec_video):
    payload = rotate(encode(4), 1)
    assert np.array_equal(torchcodec_video(payload, device="cpu").decode([2]).frames, Video(payload).decode([2]).frames)


@pytest.mark.parametrize("multi_scale_crop", [True, False])
def test_torchcodec_frames_as_whole_pictures_are_framed(torchcodec_video, multi_scale_crop):
    payload = encode(12)
    video = torchcodec_video(payload, device="cpu")
    whole = torch.from_numpy(Video(payload).decode([1, 9]).frames)
    for seed in range(4):
        framing = training_framing(
            48,
            64,
            crop_size=32,
            short_side=40,
            multi_scale_crop=multi_scale_crop,
            generator=np.random.default_rng(seed),
        )
        decoded = video.decode([1, 9], framing)
        assert decoded.framed == multi_scale_crop
        frames = torch.from_numpy(decoded.frames)
        assert torch.equal(frames if decoded.framed else apply_framing(frames, framing), apply_framing(whole, framing))


@pytest.mark.parametrize("payload", [b"", b"not a video\n" * 50, b"\0\0\0\x20ftypisom" + b"\0" * 100])
def test_what_is_no_video_is_a_data_error_with_torchcodec(torchcodec_video, payload):
    with pytest.raises(DataError, match=r"^the video cannot be opened") as error:
        torchcodec_video(payload, device="cpu")
    assert ".cpp" not in str(error.value)


@pytest.mark.parametrize("container", ["avi", "mpegts", "flv"])
def test_torchcodec_is_not_given_what_it_counts_in_its_own_way(torchcodec_video, container):
    with pytest.raises(DataError, match="decode with pyav"):
        torchcodec_video(encode(container=container), device="cpu")


def test_frames_that_do_not_exist_are_refused_by_torchcodec(torchcodec_video):
    video = torchcodec_video(encode(8), device="cpu")
    for wanted in ([], [-1], [8]):
        with pytest.raises(ValueError, match="frames 0 to 7"):
            video.decode(wanted)


def test_a_clip_is_the_same_whichever_decoder_reads_it(torchcodec_video, tmp_path):
    manifest = make_split(tmp_path / "train", {"a": encode(9), "b": encode(20, seed=1)})
    for training in (True, False):
        clips = [
            read_clip(
                manifest,
                1,
                clip=ClipConfig(num_segments=3, crop_size=32, short_side=40, decoding=DecodingConfig(video=name)),
                training=training,
            )[0]
            for name in ("auto", "pyav", "torchcodec")
        ]
        assert torch.equal(clips[0], clips[1])
        assert torch.equal(clips[0], clips[2])


def test_the_decoder_is_chosen_by_name(torchcodec_video):
    payload = encode(2)
    assert isinstance(open_video(payload, DecodingConfig()), Video)
    assert isinstance(open_video(payload, DecodingConfig(video="pyav")), Video)
    assert isinstance(open_video(payload, DecodingConfig(video="torchcodec")), torchcodec_video)


def test_a_sample_is_opened_as_the_configuration_says(torchcodec_video):
    video = MemoryPayload(encode(2))
    assert isinstance(open_frames("video", video, DecodingConfig(video="torchcodec")), torchcodec_video)
    assert isinstance(open_frames("video", video), Video)


def test_jpeg_frames_are_scaled_as_the_configuration_says(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "data_shards.forms.frames_file.decode_jpegs",
        lambda _, framing, *, scaling: asked.append(scaling) or np.zeros((1, framing.size, framing.size, 3), np.uint8),
    )
    payload = MemoryPayload(write_frames_file([b"jpeg"], codec="jpeg", height=48, width=64, fps=25.0))
    framing = training_framing(
        48, 64, crop_size=32, short_side=40, multi_scale_crop=True, generator=np.random.default_rng(0)
    )
    for decoding in (None, DecodingConfig(jpeg="fast")):
        open_frames("jpeg", payload, decoding).decode([0], framing)
    assert asked == ["exact", "fast"]


def test_unknown_names_are_told_together():
    with pytest.raises(ValueError, match=r"^decoding: video is 'decord', it must be .*; jpeg is 'quick', it must be"):
        DecodingConfig(video="decord", jpeg="quick")


def test_torchcodec_that_does_not_import_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"torchcodec does not import .*; install `reelscale\[torchcodec\]`"):
        DecodingConfig(video="torchcodec").check_available()
    DecodingConfig().check_available()


def test_a_gpu_that_is_absent_is_told(torchcodec_video, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch finds no GPU"):
        DecodingConfig(video="torchcodec-cuda").check_available()
