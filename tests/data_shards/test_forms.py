"""Stored frames: written, read back by the table, only what is used, and every kind of damage named."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.clips import ClipConfig, read_clip
from data_shards.errors import DataError, SampleError
from data_shards.forms.base import Form
from data_shards.forms.encoding import EncodingConfig, encode_sample
from data_shards.forms.frames_file import FramesFile, read_table, table_bytes, write_frames_file
from data_shards.forms.opening import open_frames
from data_shards.forms.payload import MemoryPayload
from data_shards.framing import CropBox, Framing, apply_framing
from data_shards.manifest import ManifestError, open_manifest
from data_shards.probe import probe_frames
from data_shards.reading import ShardReader
from tests.data_shards.packed import make_split
from tests.data_shards.videos import encode, pictures

PIXELS = pictures(10, 48, 64)
RAW = write_frames_file([picture.tobytes() for picture in PIXELS], codec="raw", height=48, width=64, fps=25.0)
JPEG = encode_sample(PIXELS, EncodingConfig(store_as="jpeg")).payload
FORMS: dict[Form, bytes] = {"jpeg": JPEG, "raw": RAW}


def refusal(payload: bytes, numbers: tuple[int, ...] = (0,), form: Form | None = None) -> str:
    """The one line with which frames of `payload` are refused."""
    with pytest.raises(DataError) as caught:
        FramesFile(MemoryPayload(payload), form).decode(numbers)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_frames_come_in_the_order_asked_for_and_may_repeat(form: Form):
    decoded = open_frames(form, MemoryPayload(FORMS[form])).decode([7, 0, 7, 3])
    assert decoded.frames.shape == (4, 48, 64, 3)
    assert decoded.frames.flags.c_contiguous
    assert decoded.frames_decoded == 3
    one_by_one = [open_frames(form, MemoryPayload(FORMS[form])).decode([number]).frames[0] for number in (7, 0, 7, 3)]
    assert np.array_equal(decoded.frames, one_by_one)


def test_raw_frames_are_the_pixels_themselves():
    assert np.array_equal(FramesFile(MemoryPayload(RAW)).decode(range(10)).frames, PIXELS)


def test_only_the_table_and_the_frames_asked_for_are_read():
    payload = MemoryPayload(RAW)
    payload.num_frames = 10
    file = FramesFile(payload, "raw")
    assert payload.bytes_read == table_bytes(10) == 36 + 10 * 20 + 4
    file.decode([2, 9, 2])
    assert payload.bytes_read == table_bytes(10) + 2 * 48 * 64 * 3


def test_the_bytes_of_the_container_stay_as_they_are():
    """A change of the layout makes sets that exist unreadable: it needs a new version."""
    payload = write_frames_file(
        [b"first", b"2nd"], codec="jpeg", height=3, width=7, fps=12.5, numbers=[4, 9], source_num_frames=11
    )
    table_of_two = (
        struct.pack("<8sHHIIIId", b"RSFRAMES", 1, 1, 2, 3, 7, 11, 12.5)
        + struct.pack("<QIII", 80, 5, zlib.crc32(b"first"), 4)
        + struct.pack("<QIII", 85, 3, zlib.crc32(b"2nd"), 9)
    )
    assert payload == table_of_two + struct.pack("<I", zlib.crc32(table_of_two)) + b"first" + b"2nd"
    table = read_table(payload, size=len(payload))
    assert (table.codec, table.height, table.width, table.fps, table.source_num_frames) == ("jpeg", 3, 7, 12.5, 11)
    assert table.numbers.tolist() == [4, 9]
    assert table.ranges([1, 0]) == [(85, 3), (80, 5)]


def test_a_changed_byte_of_the_table_is_found_wherever_it_is():
    for place in range(table_bytes(10)):
        damaged = bytearray(RAW)
        damaged[place] ^= 0x41
        refusal(bytes(damaged))


def test_a_changed_byte_of_a_frame_names_the_frame_and_leaves_the_others():
    damaged = bytearray(RAW)
    damaged[table_bytes(10) + 4 * 48 * 64 * 3 + 100] ^= 1
    assert "frame 4 of 10 is damaged (crc32" in refusal(bytes(damaged), (1, 4))
    assert np.array_equal(FramesFile(MemoryPayload(bytes(damaged))).decode([3, 5]).frames, PIXELS[[3, 5]])


@pytest.mark.parametrize("size", [0, 1, 8, 35, 36, 100, table_bytes(10) - 1, table_bytes(10), len(RAW) - 1])
def test_a_cut_file_is_refused_before_a_frame_is_read(size: int):
    assert "pack the set again" in refusal(RAW[:size])


def test_what_is_something_else_is_named():
    assert "it is no frames file" in refusal(encode(2))
    assert "its frames are stored as raw, the manifest says jpeg" in refusal(RAW, form="jpeg")
    newer = RAW[:8] + b"\x02" + RAW[9:]
    assert "version 2, this reelscale reads 1; update reelscale" in refusal(newer)
    payload = MemoryPayload(RAW)
    payload.num_frames = 12
    with pytest.raises(DataError, match="holds 10 frames, the manifest says 12"):
        FramesFile(payload)


def test_frames_that_do_not_have_the_tables_size_are_refused():
    wrong_raw = write_frames_file([bytes(5)], codec="raw", height=48, width=64, fps=0)
    assert "frame 0 of 1 has 5 bytes, 64x48 RGB pixels have 9216" in refusal(wrong_raw)
    content = FramesFile(MemoryPayload(JPEG)).read([0])[0]
    wrong_jpeg = write_frames_file([content], codec="jpeg", height=50, width=64, fps=0)
    assert "its frames are 64x48, its table says 64x50" in refusal(wrong_jpeg)


def test_a_number_that_does_not_exist_is_the_callers_mistake():
    for numbers in ([10], [-1], []):
        with pytest.raises(ValueError, match="frames 0 to 9"):
            FramesFile(MemoryPayload(RAW)).decode(numbers)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [(48, 64), (60, 80)], ids=["cut first", "scaled first"])
def test_framing_gives_what_framing_whole_pictures_gives(form: Form, scaled: tuple[int, int]):
    box = CropBox(top=5, left=9, height=30, width=40)
    framing = Framing(height=48, width=64, scaled_height=scaled[0], scaled_width=scaled[1], box=box, size=24)
    decoded = open_frames(form, MemoryPayload(FORMS[form])).decode([8, 1, 8], framing)
    whole = open_frames(form, MemoryPayload(FORMS[form])).decode([8, 1, 8])
    assert not whole.framed
    frames = torch.from_numpy(decoded.frames)
    framed = frames if decoded.framed else apply_framing(frames, framing)
    assert torch.equal(framed, apply_framing(torch.from_numpy(whole.frames), framing))
    assert form == "jpeg" or decoded.framed == (scaled == (48, 64))
    assert decoded.frames.flags.c_contiguous


def test_framing_for_another_size_is_left_to_be_refused():
    box = CropBox(top=0, left=0, height=40, width=40)
    framing = Framing(height=50, width=64, scaled_height=50, scaled_width=64, box=box, size=24)
    decoded = FramesFile(MemoryPayload(RAW)).decode([0], framing)
    with pytest.raises(DataError, match="its pictures are 64x48, the manifest says 64x50"):
        apply_framing(torch.from_numpy(decoded.frames), framing)
    assert not decoded.framed


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_of_a_packed_set_reads_its_table_and_its_frames(tmp_path: Path, form: Form):
    members = {f"take{n}": encode_sample(encode(40, seed=n), EncodingConfig(store_as=form)).payload for n in range(3)}
    manifest = make_split(tmp_path / "train", members, form=form)
    assert manifest.form == form
    assert manifest.samples["num_frames"].tolist() == [40, 40, 40]
    clip = ClipConfig(num_segments=4, crop_size=32, short_side=48)
    for sample_id, member in enumerate(members.values()):
        frames, costs = read_clip(manifest, sample_id, clip=clip, training=False)
        expected = FramesFile(MemoryPayload(member)).decode([5, 15, 25, 35]).frames[:, 8:40, 16:48]
        assert np.abs(frames.permute(0, 2, 3, 1).numpy().astype(int) - expected).max() <= 1
        assert costs["frames_decoded"] == costs["frames_used"] == 4
        assert costs["read_bytes"] < len(member) / 5


def test_damage_in_a_packed_set_names_shard_key_and_frame(tmp_path: Path):
    manifest = make_split(tmp_path / "train", {"take": RAW}, form="raw")
    row = manifest.samples[0]
    with manifest.shard_path(0).open("r+b") as tar:
        tar.seek(int(row["offset"]) + table_bytes(10) + 7)
        tar.write(b"\xff\x00damage")
    clip = ClipConfig(num_segments=10, crop_size=32, short_side=48)
    with pytest.raises(SampleError, match=r"shard-000000\.tar:take: frame 0 of 10 is damaged"):
        read_clip(manifest, 0, clip=clip, training=False)


def test_a_manifest_carries_its_form_and_one_without_is_of_videos(tmp_path: Path):
    manifest = make_split(tmp_path / "train", {"take": RAW}, form="raw")
    path = manifest.root / "manifest.json"
    header = json.loads(path.read_text())
    assert header["form"] == "raw"
    with ShardReader(manifest) as reader:
        assert reader.open(0).num_frames == 10
    for form in ("webp", ["raw"], None):
        path.write_text(json.dumps(header | {"form": form}))
        with pytest.raises(ManifestError, match=r"names the form .*, this reelscale reads video, jpeg, raw; update"):
            open_manifest(manifest.root)
    del header["form"]
    path.write_text(json.dumps(header))
    assert open_manifest(manifest.root).form == "video"


def test_probing_a_frames_file_checks_every_frame():
    for payload in (RAW, JPEG):
        info = probe_frames(payload)
        assert (info.num_frames, info.width, info.height) == (10, 64, 48)
    assert probe_frames(RAW).fps == 25.0
    damaged = bytearray(RAW)
    damaged[table_bytes(10) + 6 * 48 * 64 * 3] ^= 1
    with pytest.raises(DataError, match="frame 6 of 10 is damaged"):
        probe_frames(bytes(damaged))
