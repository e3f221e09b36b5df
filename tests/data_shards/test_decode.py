"""Frame i of the sparse decoder is, bit for bit, frame i of decoding everything."""

import io
import random
import wave
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.mp4 import Mp4Packets, read_mp4
from data_shards.packet_index import demux, index_packets, plan_runs
from tests.data_shards.videos import X264_OPEN_GOP, decode_everything, encode, rotate, without_first_group

REAL_SETS = Path(__file__).parents[3] / "shared" / "data"


def state_color(stream: av.VideoStream) -> None:
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = 1
    context.color_range = 1


VIDEOS = {
    "b_frames": {},
    "long_gop": {"num_frames": 90, "gop": 250, "b_frames": 4, "options": {"preset": "slow"}},
    "temporal_direct": {
        "num_frames": 70,
        "gop": 40,
        "options": {"x264-params": "direct=temporal:b-pyramid=strict:bframes=8:ref=5:b-adapt=0"},
    },
    "variable_rate": {"pts": np.cumsum([0, *np.random.default_rng(0).integers(5, 300, 39)]).tolist(), "num_frames": 40},
    "variable_rate_late_start": {"pts": [300, 310, 390, 400, 900, 901, 950], "num_frames": 7},
    "one_frame": {"num_frames": 1},
    "two_frames": {"num_frames": 2},
    "odd_size": {"width": 65, "height": 47, "pixel_format": "yuv444p"},
    "odd_macroblocks": {"width": 50, "height": 38},
    "open_gop": {"num_frames": 60, "options": X264_OPEN_GOP},
    "open_gop_matroska": {"num_frames": 60, "options": X264_OPEN_GOP, "container": "matroska"},
    "intra_refresh": {"num_frames": 50, "b_frames": 0, "options": {"x264-params": "intra-refresh=1:keyint=10"}},
    "all_intra": {"gop": 1, "b_frames": 0},
    "slices": {"options": {"x264-params": "slices=4"}},
    "interlaced": {"options": {"x264-params": "tff=1"}},
    "color_stated": {"setup": state_color},
    "color_stated_by_container_only": {
        "setup": state_color,
        "options": {"x264-params": "colormatrix=undef:colorprim=undef:transfer=undef"},
    },
    "negative_shifts": {"container_options": {"movflags": "negative_cts_offsets"}},
    "full_range": {"pixel_format": "yuvj420p"},
    "ten_bits": {"pixel_format": "yuv420p10le"},
    "gray": {"pixel_format": "gray"},
    "fragmented": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mov": {"container": "mov"},
    "mpegts": {"container": "mpegts"},
    "flv": {"container": "flv"},
    "h264_in_avi": {"container": "avi"},
    "h264_without_container": {"container": "h264"},
    "mpeg4": {"codec": "mpeg4"},
    "mpeg4_in_avi": {"codec": "mpeg4", "container": "avi"},
    "mpeg2": {"codec": "mpeg2video", "container": "mpegts"},
    "vp8": {"codec": "libvpx", "container": "webm", "num_frames": 60},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": {"lag-in-frames": "16"}},
    "hevc_open_gop": {
        "codec": "libx265",
        "num_frames": 40,
        "options": {"x265-params": "open-gop=1:keyint=10:bframes=3:log-level=none"},
    },
    "rotated": {},
}
# Those that the direct reader must take, so that the tests below compare both ways to the reference.
PLAIN_MP4 = {
    "b_frames",
    "long_gop",
    "temporal_direct",
    "variable_rate",
    "one_frame",
    "open_gop",
    "negative_shifts",
    "color_stated",
    "color_stated_by_container_only",
}


@cache
def video(name: str) -> tuple[bytes, np.ndarray]:
    payload = encode(**VIDEOS[name])
    reference = decode_everything(payload)
    if name == "rotated":
        payload = rotate(payload, 1)
        reference = np.rot90(reference, -1, axes=(1, 2))
    return payload, reference


def check_subsets(payload: bytes, reference: np.ndarray, *, num_subsets: int = 12) -> None:
    generator = random.Random(0)
    assert Video(payload).num_frames == len(reference)
    for _ in range(num_subsets):
        size = generator.choice([1, 2, 3, 8])
        numbers = [generator.randrange(len(reference)) for _ in range(size)]
        frames = Video(payload).decode(numbers).frames
        assert frames.dtype == np.uint8
        assert frames.flags.c_contiguous
        assert np.array_equal(frames, reference[numbers]), numbers


@pytest.mark.parametrize("name", VIDEOS)
def test_any_frames_equal_those_of_decoding_everything(name):
    payload, reference = video(name)
    check_subsets(payload, reference)
    assert np.array_equal(Video(payload).decode(range(len(reference))).frames, reference)


@pytest.mark.parametrize("name", sorted(PLAIN_MP4))
def test_frames_are_the_same_through_ffmpegs_own_demuxer(name, monkeypatch):
    payload, reference = video(name)
    assert read_mp4(payload) is not None
    monkeypatch.setattr("data_shards.packet_index.read_mp4", lambda _: None)
    check_subsets(payload, reference)


@pytest.mark.parametrize("folder", ["tennis7", "egogestar"])
def test_real_clips_equal_decoding_everything(folder):
    clips = sorted((REAL_SETS / folder / "clips").glob("*.mp4"))
    if not clips:
        pytest.skip(f"the set {folder} is not at {REAL_SETS}")
    for path in random.Random(1).sample(clips, 6):
        payload = path.read_bytes()
        reference = decode_everything(payload)
        check_subsets(payload, reference, num_subsets=3)


@pytest.mark.parametrize("name", ["open_gop", "hevc_open_gop"])
def test_each_leading_picture_of_an_open_group_is_exact_alone(name):
    payload, reference = video(name)
    index = index_packets(payload)
    firsts = [index.pts[key] for key in index.key_packets]
    leading = [
        number
        for number, packet in enumerate(index.shown)
        if any(key < packet and index.pts[packet] < first for key, first in zip(index.key_packets, firsts, strict=True))
    ]
    assert len(leading) >= 4
    for number in leading:
        decoded = Video(payload).decode([number])
        assert np.array_equal(decoded.frames[0], reference[number])
        assert decoded.frames_decoded <= 22  # two groups, not the whole video


@pytest.mark.parametrize("name", ["open_gop", "b_frames", "hevc_open_gop"])
def test_a_video_cut_inside_counts_only_frames_that_can_be_decoded(name):
    payload = without_first_group(video(name)[0])
    reference = decode_everything(payload)
    sparse = Video(payload)
    assert sparse.num_frames == len(reference)
    assert np.array_equal(sparse.decode(range(len(reference))).frames, reference)


def test_vp8_packets_that_show_nothing_are_not_counted():
    payload, _ = video("vp8")
    hidden = [7, 8, 31]
    for number, packet in enumerate(demux(payload).packets):
        data = bytes(packet)
        if number in hidden:  # clear show_frame, RFC 6386 section 9.1
            assert payload.count(data) == 1
            payload = payload.replace(data, bytes([data[0] & ~0x10]) + data[1:])
    reference = decode_everything(payload)
    assert len(reference) == 57
    check_subsets(payload, reference)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_a_stated_rotation_is_applied(quarter_turns):
    payload, upright = video("b_frames")
    turned = Video(rotate(payload, quarter_turns)).decode([5]).frames[0]
    assert np.array_equal(turned, np.rot90(upright[5], -quarter_turns))  # np.rot90 turns counterclockwise


def test_groups_without_a_wanted_frame_are_not_decoded():
    payload, _ = video("all_intra")
    assert Video(payload).decode([3, 20]).frames_decoded == 2
    payload, _ = video("long_gop")
    assert Video(payload).decode([0]).frames_decoded == 1
    assert Video(payload).decode([10]).frames_decoded < 20


def test_pictures_that_nothing_refers_to_are_left_out():
    payload, _ = video("temporal_direct")
    index = index_packets(payload)
    last = index.shown[30]
    decoded = Video(payload).decode([30]).frames_decoded
    assert 0 < decoded < 0.8 * (last + 1)


def test_frames_come_in_the_order_asked_for_and_may_repeat():
    payload, reference = video("b_frames")
    numbers = [9, 2, 2, 31, 9]
    decoded = Video(payload).decode(numbers)
    assert np.array_equal(decoded.frames, reference[numbers])


def test_one_video_can_be_asked_again():
    payload, reference = video("open_gop")
    opened = Video(payload)
    for numbers in ([7], [40, 41], [0, 59], [8]):
        assert np.array_equal(opened.decode(numbers).frames, reference[numbers])


def test_runs_are_disjoint_and_start_at_key_packets():
    payload, _ = video("open_gop")
    index = index_packets(payload)
    for seed in range(50):
        runs = plan_runs(index, random.Random(seed).sample(range(60), 6))
        assert all(run.start in index.key_packets and run.start < run.stop for run in runs)
        assert all(before.stop <= after.start for before, after in pairwise(runs))


@pytest.mark.parametrize("wanted", [[], [-1], [32], [0, 99]])
def test_frames_that_do_not_exist_are_refused(wanted):
    payload, _ = video("b_frames")
    with pytest.raises(ValueError, match="frames 0 to 31"):
        Video(payload).decode(wanted)


@pytest.mark.parametrize("payload", [b"", b"not a video\n" * 50, b"\0\0\0\x20ftypisom" + b"\0" * 100])
def test_what_is_no_video_is_a_data_error(payload):
    with pytest.raises(DataError, match="cannot be opened"):
        Video(payload)


def test_audio_alone_is_a_data_error():
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setparams((1, 2, 8000, 0, "NONE", ""))
        output.writeframes(bytes(16000))
    with pytest.raises(DataError, match="no video stream"):
        Video(file.getvalue())


def test_a_truncated_mp4_is_a_data_error():
    payload, _ = video("long_gop")
    assert payload.index(b"moov") > len(payload) // 2
    with pytest.raises(DataError, match="cannot be opened"):
        Video(payload[: len(payload) // 2])


def test_a_frame_whose_packet_is_garbage_is_named():
    payload, _ = video("all_intra")
    table = read_mp4(payload)
    assert table is not None
    start, size = table.offsets[12], table.sizes[12]
    broken = payload[:start] + b"\xff" * size + payload[start + size :]
    with pytest.raises(DataError, match="frame 12 of 32 cannot be decoded"):
        Video(broken).decode([12])
    assert len(Video(broken).decode([11, 13]).frames) == 2


def test_a_size_that_changes_within_the_video_is_refused():
    first = encode(8, width=64, height=48, container="mpegts", b_frames=0)
    second = encode(8, width=96, height=80, container="mpegts", b_frames=0, pts=[1000 + 40 * n for n in range(8)])
    with pytest.raises(DataError, match="size changes within the video, from 64x48 to 96x80"):
        Video(first + second).decode([0, 15])


def test_the_direct_reader_gives_ffmpegs_packets():
    for name in sorted(PLAIN_MP4):
        payload, _ = video(name)
        mine, theirs = read_mp4(payload), demux(payload)
        assert mine is not None
        assert [bytes(mine.data(number)) for number in range(len(mine))] == [bytes(p) for p in theirs.packets]
        assert mine.key_packets == theirs.key_packets
        shift = theirs.pts[0] - mine.pts[0]
        assert [pts + shift for pts in mine.pts] == theirs.pts
        assert mine.extradata == theirs.decoder.extradata


@pytest.mark.parametrize("name", ["fragmented", "variable_rate_late_start", "mpeg4", "hevc_open_gop", "rotated"])
def test_the_direct_reader_leaves_unusual_files_to_ffmpeg(name):
    payload, _ = video(name)
    assert payload[4:8] == b"ftyp"
    assert read_mp4(payload) is None


def test_the_direct_reader_survives_any_damage():
    payload, _ = video("b_frames")
    header = payload.index(b"moov")
    for seed in range(300):
        generator = random.Random(seed)
        broken = bytearray(payload)
        for _ in range(generator.choice([1, 4, 30])):
            broken[generator.randrange(header, len(broken))] = generator.randrange(256)
        for damaged in (bytes(broken), payload[: generator.randrange(len(payload))]):
            table = read_mp4(damaged)  # never an exception
            assert table is None or isinstance(table, Mp4Packets)


@pytest.mark.parametrize("hide", ["start", "end"])
def test_an_edit_that_hides_frames_is_left_to_ffmpeg(hide):
    payload, _ = video("b_frames")
    entry = payload.index(b"elst") + 12  # duration, then the time in the media where the edit starts
    duration = int.from_bytes(payload[entry : entry + 4], "big")
    start = int.from_bytes(payload[entry + 4 : entry + 8], "big")
    new = (duration, start + 512 * 5) if hide == "start" else (duration // 2, start)
    cut = payload[:entry] + b"".join(value.to_bytes(4, "big") for value in new) + payload[entry + 8 :]
    assert read_mp4(payload) is not None
    assert read_mp4(cut) is None
    reference = decode_everything(cut)
    assert len(reference) < 32
    check_subsets(cut, reference)


@pytest.mark.parametrize("name", ["b_frames", "open_gop", "hevc_open_gop", "vp9", "mpeg4_in_avi", "fragmented"])
def test_any_damage_ends_in_frames_or_a_data_error(name):
    payload, _ = video(name)
    for seed in range(20):
        generator = random.Random(seed)
        broken = bytearray(payload)
        for _ in range(generator.choice([1, 5, 50, 500])):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        if seed % 4 == 0:
            del broken[generator.randrange(len(broken)) :]
        with suppress(DataError):
            opened = Video(bytes(broken))
            numbers = [0, opened.num_frames // 2, opened.num_frames - 1]
            assert len(opened.decode(numbers).frames) == 3
