"""Encoding for the shards: what is stored is what was there, in every form, and damage is told with its reason."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zlib
from functools import partial
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.forms.encoding import Encoded, EncodingConfig, encode_sample
from data_shards.forms.frames_file import FramesFile
from data_shards.forms.payload import MemoryPayload
from data_shards.packet_index import index_packets
from data_shards.parallel import ordered_map
from data_shards.probe import probe_video
from tests.data_shards.videos import X264_OPEN_GOP, encode, pictures, rotate, without_first_group

REENCODE = EncodingConfig(gop=8, crf=2)
RAW = EncodingConfig(store_as="raw")
FINE = {"crf": "5"}


def frames_of(encoded: Encoded) -> np.ndarray:
    """All stored frames."""
    source = Video(encoded.payload) if encoded.form == "video" else FramesFile(MemoryPayload(encoded.payload))
    assert source.num_frames == encoded.info.num_frames
    frames = source.decode(range(source.num_frames)).frames
    assert frames.shape[1:3] == (encoded.info.height, encoded.info.width)
    return frames


def everything(payload: bytes) -> np.ndarray:
    video = Video(payload)
    return video.decode(range(video.num_frames)).frames


def set_up_709(stream: av.VideoStream) -> None:
    stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1


def shown_at(payload: bytes) -> list[float]:
    """When each frame is shown, in seconds; frames that a cut left without their references do not count."""
    with av.open(io.BytesIO(payload)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        index = index_packets(payload)
        if not index.pts:
            return [number / 25 for number in range(len(index.packets))]
        return [float(index.pts[packet] * stream.time_base) for packet in index.shown]


VIDEOS = {
    "plain": lambda: encode(20, options=FINE),
    "bt709": lambda: encode(20, options=FINE, setup=set_up_709),
    "full range": lambda: encode(20, options=FINE, pixel_format="yuvj420p"),
    "variable rate": lambda: encode(20, options=FINE, pts=[40 * n + 7 * (n % 3) for n in range(20)]),
    "open groups": lambda: encode(20, options=X264_OPEN_GOP | FINE),
    "cut before a key frame": lambda: without_first_group(encode(24, options=X264_OPEN_GOP | FINE)),
    "turned once": lambda: rotate(encode(20, options=FINE), 1),
    "turned twice": lambda: rotate(encode(20, options=FINE), 2),
    "turned thrice": lambda: rotate(encode(20, options=FINE), 3),
    "without timestamps": lambda: encode(20, codec="mpeg4", container="avi", b_frames=0),
    "one frame": lambda: encode(1, options=FINE),
}


def test_an_untouched_video_is_stored_byte_for_byte():
    payload = encode(12)
    encoded = encode_sample(payload, EncodingConfig(), suffix=".MKV")
    assert encoded.payload == payload
    assert (encoded.suffix, encoded.form, encoded.meta) == (".mkv", "video", {})
    assert encoded.info == probe_video(payload)


@pytest.mark.parametrize("kind", VIDEOS)
def test_raw_frames_are_the_frames_that_the_loader_decodes(kind: str):
    payload = VIDEOS[kind]()
    encoded = encode_sample(payload, RAW)
    assert np.array_equal(frames_of(encoded), everything(payload))
    assert (encoded.suffix, encoded.form) == (".frames", "raw")


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_reencoded_video_shows_the_same_frames_at_the_same_times(kind: str):
    payload = VIDEOS[kind]()
    encoded = encode_sample(payload, REENCODE)
    before, after = everything(payload).astype(int), frames_of(encoded).astype(int)
    assert before.shape == after.shape
    assert np.abs(after - before).mean() < 1.2
    assert encoded.info.rotation_degrees == 0
    assert encoded.suffix == ".mp4"
    assert np.diff(shown_at(encoded.payload)) == pytest.approx(np.diff(shown_at(payload)), abs=1e-6)


def test_a_reencoded_video_starts_a_closed_group_at_each_gop():
    index = index_packets(encode_sample(encode(30, gop=250), EncodingConfig(gop=8)).payload)
    assert [index.shown.index(packet) for packet in index.key_packets] == [0, 8, 16, 24]
    assert all(index.pts[packet] >= index.pts[key] for key in index.key_packets for packet in range(key, 30))


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv444p", "yuv422p"])
def test_other_pixel_formats_are_brought_to_8_bits_and_420(pixel_format: str):
    payload = encode(10, pixel_format=pixel_format, options=FINE)
    encoded = encode_sample(payload, REENCODE)
    with av.open(io.BytesIO(encoded.payload)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    before, after = everything(payload), frames_of(encoded)
    assert np.array_equal(frames_of(encode_sample(payload, RAW)), before)
    assert np.abs(before.mean(axis=(1, 2)) - after.mean(axis=(1, 2))).max() < 2  # the colours, not each sharp edge


def test_sound_is_dropped(tmp_path: Path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output, av.open(io.BytesIO(encode(10))) as video:
        copy = output.add_stream_from_template(video.streams.video[0])
        sound = output.add_stream("aac", rate=48000)
        for packet in video.demux(video=0):
            if packet.size:
                packet.stream = copy
                output.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 48000
        output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.audio
    with av.open(io.BytesIO(encode_sample(path.read_bytes(), REENCODE).payload)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize(
    ("width", "height", "short_side", "video_size", "frames_size"),
    [
        (64, 48, 24, (32, 24), (32, 24)),
        (48, 64, 24, (24, 32), (24, 32)),
        (64, 48, 48, (64, 48), (64, 48)),
        (64, 48, 100, (64, 48), (64, 48)),  # never made larger
        (65, 49, 25, (32, 24), (33, 25)),  # H.264 with 4:2:0 has even sides
        (65, 49, None, (64, 48), (65, 49)),
    ],
)
def test_pictures_are_scaled_down_to_the_short_side(width, height, short_side, video_size, frames_size):
    payload = encode(4, width=width, height=height, pixel_format="yuv444p")
    for config in (
        EncodingConfig(short_side=short_side, gop=8),
        EncodingConfig(store_as="jpeg", short_side=short_side),
    ):
        encoded = encode_sample(payload, config)
        expected = video_size if config.store_as == "mp4" else frames_size
        assert (encoded.info.width, encoded.info.height) == expected
        assert frames_of(encoded).shape == (4, *expected[::-1], 3)
        assert encoded.meta == {"source_num_frames": 4, "source_width": width, "source_height": height}


def test_a_turned_video_is_scaled_by_its_upright_size():
    payload = rotate(encode(3, width=64, height=48), 1)
    for config in (EncodingConfig(short_side=24), EncodingConfig(store_as="raw", short_side=24)):
        info = encode_sample(payload, config).info
        assert (info.width, info.height) == (24, 32)


@pytest.mark.parametrize(("frames", "stored"), [(4, [2, 7, 12, 17]), (1, [10]), (20, range(20)), (99, range(20))])
def test_frames_sampled_in_advance_keep_their_numbers(frames, stored):
    payload = encode(20)
    encoded = encode_sample(payload, EncodingConfig(store_as="raw", frames=frames))
    table = FramesFile(MemoryPayload(encoded.payload)).table
    assert table.numbers.tolist() == list(stored)
    assert table.source_num_frames == encoded.meta["source_num_frames"] == 20
    assert encoded.info.num_frames == len(stored)
    assert encoded.info.num_frames / encoded.info.fps == pytest.approx(20 / 25)  # the video's length in seconds
    assert np.array_equal(frames_of(encoded), everything(payload)[list(stored)])


def jpeg(picture: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "JPEG", **options)
    return file.getvalue()


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_jpeg_pictures_that_need_not_change_are_stored_byte_for_byte():
    folder = [jpeg(picture, quality=77) for picture in pictures(5, 48, 64)]
    encoded = encode_sample(folder, EncodingConfig(store_as="jpeg", short_side=48))
    assert FramesFile(MemoryPayload(encoded.payload)).read(range(5)) == folder
    assert (encoded.info.num_frames, encoded.info.fps) == (5, 0.0)
    assert encode_sample(folder, EncodingConfig(store_as="jpeg", quality=50)).payload != encoded.payload
    assert encode_sample(folder, EncodingConfig(store_as="jpeg", short_side=24)).info.height == 24


def test_a_picture_that_a_camera_turned_is_stored_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    rows, columns = np.mgrid[:48, :64]
    picture = np.stack([rows * 4, columns * 3, 255 - rows * 2 - columns], axis=-1).astype(np.uint8)
    for quality in (None, 95):
        encoded = encode_sample([jpeg(picture, exif=exif)], EncodingConfig(store_as="jpeg", quality=quality))
        assert (encoded.info.width, encoded.info.height) == (48, 64)
        turned_back = np.rot90(frames_of(encoded)[0])
        assert np.abs(turned_back.astype(int) - picture).mean() < 3


def test_stills_and_pixels_become_one_frame_clips():
    picture = pictures(1, 28, 28)[0]
    assert np.array_equal(frames_of(encode_sample([png(picture)], RAW))[0], picture)
    assert np.array_equal(frames_of(encode_sample(picture[None], RAW))[0], picture)
    grey = picture[..., 0]
    for source in (grey[None], [png(grey)]):
        stored = frames_of(encode_sample(source, RAW))
        assert np.array_equal(stored[0], np.repeat(grey[..., None], 3, axis=2))


def test_palettes_transparency_and_16_bits_become_rgb():
    picture = pictures(1, 16, 16)[0]
    palette = PIL.Image.fromarray(picture).quantize(16)
    palette.info["transparency"] = b"\x00\xff\x80"
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=b"\x00\xff\x80")
    expected = np.asarray(palette.convert("RGBA"))[..., :3]
    assert np.array_equal(frames_of(encode_sample([file.getvalue()], RAW))[0], expected)
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(frames_of(encode_sample([png(deep)], RAW))[0, ..., 0], np.arange(256).reshape(16, 16))


def test_damage_is_told_in_one_line():
    video = encode(20, gop=250, b_frames=0)
    damaged = bytearray(video)
    start = video.index(bytes(index_packets(video).data(10)))
    damaged[start : start + 12] = bytes(12)
    good = jpeg(pictures(1, 48, 64)[0])
    cases = {
        "not a video": (b"nothing of the kind", RAW),
        "damaged: frame 10 cannot be decoded": (bytes(damaged), RAW),
        "damaged: frame 10": (bytes(damaged), REENCODE),
        "0 frames": ([], RAW),
        "not a picture": ([b"nothing"], RAW),
        "damaged: the picture does not decode": ([png(pictures(1, 48, 64)[0])[:-200]], RAW),
        "JPEG file": ([good[: len(good) // 2]], EncodingConfig(store_as="jpeg")),
        "the frame size changes, from 64x48 to 32x48 at frame 1": ([good, jpeg(pictures(1, 48, 32)[0])], RAW),
    }
    for reason, (source, config) in cases.items():
        with pytest.raises(DataError) as caught:
            encode_sample(source, config)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_picture_that_claims_too_many_pixels_is_refused():
    claims = (60_000).to_bytes(4, "big") * 2
    header = bytearray(png(pictures(1, 8, 8)[0]))
    header[16:24] = claims
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    frame = bytearray(jpeg(pictures(1, 8, 8)[0]))
    size_at = frame.index(b"\xff\xc0") + 5
    frame[size_at : size_at + 4] = claims[2:4] * 2
    for picture in (header, frame):
        for store_as in ("jpeg", "raw"):
            with pytest.raises(DataError, match="claims too many pixels"):
                encode_sample([bytes(picture)], EncodingConfig(store_as=store_as))


def test_a_side_that_jpeg_cannot_hold_is_a_bad_sample():
    wide = np.zeros((1, 2, 65_501, 3), np.uint8)
    with pytest.raises(DataError, match="too large: 65501x2 pixels, a side of a JPEG picture may have 65500"):
        encode_sample(wide, EncodingConfig(store_as="jpeg"))
    assert encode_sample(wide, RAW).info.width == 65_501


def test_pictures_are_not_stored_as_video():
    with pytest.raises(ValueError, match="give jpeg or raw"):
        encode_sample(pictures(2, 16, 16), EncodingConfig())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"store_as": "webp"}, "store_as is 'webp', give mp4, jpeg or raw"),
        ({"frames": 32}, "frames is for jpeg and raw, not for mp4"),
        ({"store_as": "raw", "quality": 80}, "quality is for jpeg, not for raw"),
        ({"store_as": "jpeg", "gop": 8, "crf": 3}, "gop is for mp4, not for jpeg; crf is for mp4, not for jpeg"),
        ({"short_side": 8}, "short_side is 8, it must be 16 to 65535"),
        ({"crf": 52}, "crf is 52, it must be 0 to 51"),
        ({"store_as": "jpeg", "quality": 0, "frames": 0}, "frames is 0, it must be 1 to 1000000; quality is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_together(fields, problem):
    with pytest.raises(ValueError, match="encoding: ") as caught:
        EncodingConfig(**fields)
    assert problem in str(caught.value)


def test_equal_input_gives_equal_bytes():
    payload = encode(20, seed=3)
    for config in (REENCODE, EncodingConfig(short_side=24), EncodingConfig(store_as="jpeg"), RAW):
        config_there = pickle.loads(pickle.dumps(config))
        assert len({encode_sample(payload, config_there).payload for _ in range(8)}) == 1


@pytest.mark.thorough
def test_a_worker_process_encodes_to_the_same_bytes():
    payload = encode(20)
    there = list(ordered_map(partial(encode_sample, config=REENCODE), [payload] * 8, workers=2))
    assert {encoded.payload for encoded in there} == {encode_sample(payload, REENCODE).payload}


@pytest.mark.thorough
def test_encoding_a_long_video_holds_few_frames_at_a_time():
    payload = encode(400, width=320, height=240)
    tracemalloc.start()
    try:
        encode_sample(payload, EncodingConfig(store_as="raw", frames=4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 320 * 240 * 3
