"""Packing: plain WebDataset tars, a manifest that points at the very bytes, and nothing half-made."""

from __future__ import annotations

import csv
import errno
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import wave
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_shards.errors import DataError, PackError
from data_shards.manifest import Manifest, open_manifest
from data_shards.motion import MotionConfig, encode_h264, render_clip
from data_shards.pack import PackConfig, PackProgress, PackResult, pack
from data_shards.probe import probe_video
from data_shards.shard_writer import sample_keys
from tests.data_shards.files import digest, put
from tests.data_shards.videos import encode, rotate

CLIP = MotionConfig(size=32, num_frames=8)


@pytest.fixture(scope="module")
def videos() -> list[bytes]:
    """Twelve different videos."""
    return [encode_h264(render_clip(CLIP, index=number, label="left", scene=number)) for number in range(12)]


@pytest.fixture
def source(tmp_path: Path, videos: list[bytes]) -> Path:
    """Three classes of four videos."""
    for number, video in enumerate(videos):
        put(tmp_path / "source" / f"class{number % 3}" / f"v{number}.mp4", video)
    return tmp_path / "source"


def packed(source: Path, **options: object) -> PackResult:
    destination = source.parent / "packed"
    return pack(PackConfig(source=source, destination=destination, workers=1, **options))


def refusal(source: Path, **options: object) -> str:
    """The one line with which packing is refused, after which no destination is there."""
    with pytest.raises(PackError) as caught:
        packed(source, **options)
    assert "\n" not in str(caught.value)
    assert not (source.parent / "packed").exists()
    return str(caught.value)


def read_rejected(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def payload_of(manifest: Manifest, sample_id: int) -> bytes:
    row = manifest.samples[sample_id]
    descriptor = os.open(manifest.shard_path(sample_id), os.O_RDONLY)
    try:
        return os.pread(descriptor, int(row["size"]), int(row["offset"]))
    finally:
        os.close(descriptor)


def check_against_webdataset(folder: Path, originals: dict[str, bytes]) -> None:
    """Read a split's tars with webdataset and with pread: the same samples, the original bytes, in the same order."""
    manifest = open_manifest(folder)
    urls = [str(folder / shard.name) for shard in manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
        gc.collect()
    assert len(samples) == len(manifest)
    for sample_id, sample in enumerate(samples):
        row = manifest.samples[sample_id]
        payload = payload_of(manifest, sample_id)
        assert sample["__key__"] == manifest.key(sample_id)
        assert sample["mp4"] == payload == originals[sample["json"]["file"]]
        assert zlib.crc32(payload) == row["crc32"]
        assert sample["cls"] == row["label"] == sample["json"]["label"]
        assert sample["json"]["class"] == manifest.class_name(sample["cls"])
        assert sample["json"]["num_frames"] == row["num_frames"]
        assert (sample["json"]["width"], sample["json"]["height"]) == (row["width"], row["height"])


def test_webdataset_and_pread_find_the_original_bytes(source: Path):
    result = packed(source, max_shard_samples=4, val_fraction=0.25)
    originals = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*.mp4")}
    assert {split: done.num_samples for split, done in result.splits.items()} == {"train": 9, "val": 3}
    assert result.splits["train"].num_shards == 3
    for split in result.splits:
        check_against_webdataset(result.destination / split, originals)
        assert open_manifest(result.destination / split).split == split
    assert result.warnings == result.rejected == ()


def test_the_real_set_is_packed_and_read(tennis7: Path, tmp_path: Path):
    with (tennis7 / "labels.csv").open(newline="") as file:
        rows = [row for number, row in enumerate(csv.DictReader(file)) if number % 16 == 0]
    listed = tmp_path / "some.csv"
    with listed.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    config = PackConfig(
        source=listed, videos=tennis7, destination=tmp_path / "packed", max_shard_megabytes=1, workers=2
    )
    result = pack(config)
    assert result.classes == tuple(sorted({row["label"] for row in rows}))
    assert {split: done.num_samples for split, done in result.splits.items()} == Counter(row["split"] for row in rows)
    for split in result.splits:
        originals = {row["file"]: (tennis7 / row["file"]).read_bytes() for row in rows}
        check_against_webdataset(result.destination / split, originals)
        manifest = open_manifest(result.destination / split)
        assert all(shard.num_bytes <= 1e6 for shard in manifest.shards)
        frames = {row["file"].removesuffix(".mp4"): int(row["frames"]) for row in rows}
        assert [frames[manifest.key(i)] for i in range(len(manifest))] == manifest.samples["num_frames"].tolist()
        assert (manifest.samples["height"] == 256).all()


def test_members_are_plain_tars_without_times_and_owners(source: Path):
    folder = packed(source, val_fraction=0).destination / "train"
    with tarfile.open(folder / "shard-000000.tar") as tar:
        members = tar.getmembers()
    manifest = open_manifest(folder)
    assert [member.name for member in members[:3]] == [manifest.key(0) + end for end in (".mp4", ".cls", ".json")]
    assert [member.offset_data for member in members[::3]] == manifest.samples["offset"].tolist()
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}
    assert (folder / "shard-000000.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_shards_keep_to_the_size_and_a_large_video_has_its_own(source: Path):
    folder = packed(source, val_fraction=0, max_shard_megabytes=0.02).destination / "train"
    manifest = open_manifest(folder)
    assert len(manifest.shards) > 3
    for shard in manifest.shards:
        assert shard.num_bytes <= 20_000 + tarfile.RECORDSIZE or shard.num_samples == 1
    assert sum(shard.num_samples for shard in manifest.shards) == 12


def test_shards_mix_the_classes(tmp_path: Path, videos: list[bytes]):
    for number in range(90):
        put(tmp_path / "source" / f"class{number // 30}" / f"v{number:02d}.mp4", videos[number % 12])
    manifest = open_manifest(packed(tmp_path / "source", val_fraction=0, max_shard_samples=30).destination / "train")
    for shard in manifest.shards:
        labels = manifest.samples["label"][shard.first_sample : shard.first_sample + shard.num_samples]
        assert len(np.unique(labels)) == 3


def test_the_same_seed_packs_the_same_bytes_with_any_number_of_workers(source: Path):
    packs = {}
    for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        destination = source.parent / name
        pack(PackConfig(source=source, destination=destination, seed=seed, workers=workers, val_fraction=0))
        packs[name] = digest(destination)
    assert packs["a"] == packs["b"]
    assert packs["a"] != packs["c"]


def test_every_split_has_the_same_classes_and_a_class_without_videos_is_reported(tmp_path: Path, videos: list[bytes]):
    put(tmp_path / "source/train/b/1.mp4", videos[0])
    put(tmp_path / "source/train/a/1.mp4", videos[1])
    put(tmp_path / "source/val/b/2.mp4", videos[2])
    (tmp_path / "source/val/c").mkdir()
    result = packed(tmp_path / "source")
    assert [open_manifest(result.destination / split).classes for split in ("train", "val")] == [("a", "b")] * 2
    assert open_manifest(result.destination / "val").samples["label"].tolist() == [1]
    assert result.warnings == (
        f"the folder {tmp_path / 'source/val/c'} holds no videos and is left out",
        "1 of 2 classes have no video in val: 'a'",
    )


def test_odd_class_names_stay_in_the_manifest_and_their_keys_stay_plain(tmp_path: Path, videos: list[bytes]):
    names = ["007", "1.5", "a b", "打球", 'say "hi"', "it's", "été"]
    for name, video in zip(names, videos, strict=False):
        put(tmp_path / "source" / name / "cl.ip 1.MP4", video)
    folder = packed(tmp_path / "source", val_fraction=0).destination / "train"
    manifest = open_manifest(folder)
    assert manifest.classes == tuple(sorted(names))
    for sample_id in range(len(manifest)):
        assert all(character.isalnum() or character in "_-/" for character in manifest.key(sample_id))
        assert manifest.key(sample_id).isascii()
    originals = {f"{name}/cl.ip 1.MP4": video for name, video in zip(names, videos, strict=False)}
    check_against_webdataset(folder, originals)


def test_keys_are_unique_short_and_never_leave_the_folder():
    names = ["a/b.mp4", "a/b.avi", "A/B.mp4", "打球.mp4", "乒乓.mp4", "../up/x.y.mp4", "/abs/z.mp4", "d" * 200 + ".mp4",
             "e" * 200 + "1.mp4", "e" * 200 + "2.mp4", "c d/1.mp4", "c_d/1.mp4", "plain/name.mp4"]  # fmt: skip
    keys = sample_keys(names)
    assert len({key.lower() for key in keys}) == len(names)
    assert keys[-1] == "plain/name"
    assert keys[5] == "__/up/x_y"
    assert keys[6] == "abs/z"
    for key in keys:
        assert "." not in key
        assert len(f"{key}.json") <= 100
        assert key.isascii()
        assert not key.startswith("/")


BAD = {
    "text": (b"this is not a video\n" * 20, "not a video: Invalid data found when processing input"),
    "empty": (b"", "not a video: the file is empty"),
}


@pytest.mark.parametrize("kind", ["text", "empty"])
def test_a_file_that_is_no_video_stops_the_packing_with_one_line(source: Path, kind: str):
    content, reason = BAD[kind]
    put(source / "class1" / "bad.mp4", content)
    message = refusal(source)
    listed = source.parent / "packed.rejected.csv"
    assert f"1 of 13 videos cannot be packed, the first is {source / 'class1' / 'bad.mp4'}: {reason}" in message
    assert f"{listed} lists all" in message
    (row,) = read_rejected(listed)
    assert row["reason"] == reason
    assert row["label"] == "class1"


def test_a_truncated_real_video_is_named_as_truncated(source: Path, tennis7: Path):
    whole = sorted((tennis7 / "clips").glob("*.mp4"))[0].read_bytes()
    put(source / "class0" / "cut.mp4", whole[: len(whole) // 2])
    assert "cut.mp4: truncated: " in refusal(source)


def test_a_video_without_its_index_is_named(source: Path, videos: list[bytes]):
    put(source / "class0" / "cut.mp4", videos[0][: len(videos[0]) // 2])
    assert "cut.mp4: truncated: an mp4 file without its index (moov)" in refusal(source)


def test_all_bad_videos_are_listed_and_then_skipped_and_counted(source: Path):
    for name, (content, _) in BAD.items():
        put(source / "class2" / f"{name}.mp4", content)
    message = refusal(source, val_fraction=0)
    assert "2 of 14 videos cannot be packed" in message
    listed = source.parent / "packed.rejected.csv"
    assert len(read_rejected(listed)) == 2
    result = packed(source, on_bad="skip", val_fraction=0)
    assert result.splits["train"].num_samples == 12
    rows = read_rejected(result.destination / "rejected.csv")
    assert [(Path(row["file"]).name, row["label"], row["split"], row["reason"]) for row in rows] == [
        (f"{name}.mp4", "class2", "train", BAD[name][1]) for name in ("empty", "text")
    ]
    assert [row.reason for row in result.rejected] == [row["reason"] for row in rows]
    assert result.warnings == ("2 videos cannot be read and are left out, see rejected.csv",)
    assert not listed.exists(), "the list of the refused run is out of date"


def test_skipping_everything_is_an_error(tmp_path: Path):
    put(tmp_path / "source" / "a" / "bad.mp4", b"text")
    assert "1 of 1 videos cannot be packed" in refusal(tmp_path / "source", on_bad="skip")


def test_a_broken_link_is_rejected_with_its_reason(source: Path):
    (source / "class0" / "link.mp4").symlink_to(source / "gone.mp4")
    assert "link.mp4: cannot be read: No such file or directory" in refusal(source)


def test_missing_kinetics_videos_are_listed_and_not_fatal(tmp_path: Path, videos: list[bytes]):
    put(tmp_path / "source/run/abc_000001_000011.mp4", videos[0])
    rows = "label,youtube_id,time_start,time_end,split\nrun,abc,1,11,train\nrun,gone,2,12,train\njump,lost,3,13,val\n"
    put(tmp_path / "source/labels.csv", rows.encode())
    result = packed(tmp_path / "source")
    assert result.splits.keys() == {"train"}
    assert result.classes == ("run",)
    assert [row["file"] for row in read_rejected(result.destination / "rejected.csv")] == [
        "gone_000002_000012.mp4",
        "lost_000003_000013.mp4",
    ]
    assert "2 of 3 listed videos are missing, see rejected.csv" in result.warnings


def test_an_empty_source_is_refused(tmp_path: Path):
    (tmp_path / "source").mkdir()
    assert "no videos found in" in refusal(tmp_path / "source")


def test_an_existing_destination_is_refused_and_untouched(source: Path):
    put(source.parent / "packed" / "mine.txt", b"mine")
    with pytest.raises(ValueError, match="packed exists and is not empty; remove it, or choose another name"):
        packed(source)
    assert digest(source.parent / "packed").keys() == {"mine.txt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_megabytes": 0}, "max_shard_megabytes is 0"),
        ({"max_shard_samples": 0}, "max_shard_samples 0"),
        ({"max_shard_megabytes": float("inf")}, "max_shard_megabytes is inf"),
        ({"max_sample_seconds": float("inf")}, "max_sample_seconds is inf"),
        ({"on_bad": "ignore"}, "on_bad is 'ignore', give raise or skip"),
        ({"workers": -1}, "workers are 0 and -1"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PackConfig(**{"source": tmp_path, "destination": tmp_path, **options})


def test_progress_counts_every_video(source: Path):
    calls: list[PackProgress] = []
    config = PackConfig(source=source, destination=source.parent / "packed", workers=2)
    pack(config, progress=calls.append)
    assert [(at.done, at.total, at.earlier) for at in calls] == [(done, 12, 0) for done in range(13)]
    assert calls[-1].num_bytes == sum(path.stat().st_size for path in source.rglob("*.mp4"))


FULL_DISK = """
import sys
from pathlib import Path
from data_shards.pack import PackConfig, pack
try:
    pack(PackConfig(source=Path(sys.argv[1]), destination=Path(sys.argv[2]), workers=1, max_shard_samples=4))
except OSError as error:
    sys.exit(f"{error.errno} {error}")
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="this system lets no user mount a small file system (unshare -rm)",
)
def test_a_full_disk_is_one_line_and_keeps_the_finished_shards(source: Path):
    script, mount = source.parent / "full.py", source.parent / "mount"
    script.write_text(FULL_DISK)
    mount.mkdir()
    shell = (
        'mount -t tmpfs -o size=100k none "$3" && "$0" "$1" "$2" "$3/packed"; echo "rc $?"; find "$3" -name "*.tar*"'
    )
    command = ["unshare", "-rm", "sh", "-c", shell, sys.executable, str(script), str(source), str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("rc 1\n")
    assert ".tar.partial" not in done.stdout, "what was being written makes room"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{errno.ENOSPC} ")
    finished = done.stdout.count(".tar")
    assert finished in (1, 2, 3)
    assert re.search(rf"the disk is full: [123] of 4 shards of {mount}/packed are finished and kept in .*partial", line)


def test_a_probe_tells_what_a_video_is(videos: list[bytes]):
    info = probe_video(videos[0])
    assert (info.num_frames, info.width, info.height, info.fps, info.rotation_degrees) == (8, 32, 32, 15.0, 0)


def test_a_rotated_video_is_described_as_it_is_shown():
    wide = encode(5)
    info = probe_video(rotate(wide, 1))
    assert (info.width, info.height) == (48, 64)
    assert abs(info.rotation_degrees) == 90
    info = probe_video(wide)
    assert (info.width, info.height, info.rotation_degrees) == (64, 48, 0)


@pytest.mark.parametrize(("container", "codec"), [("matroska", "libx264"), ("avi", "mpeg4"), ("mpegts", "libx264")])
def test_other_containers_are_counted_and_not_taken_for_truncated(container: str, codec: str):
    info = probe_video(encode(20, container=container, codec=codec))
    assert (info.num_frames, info.width, info.height, info.fps) == (20, 64, 48, 25.0)


def test_a_file_with_sound_only_has_no_video_stream():
    with pytest.raises(DataError, match=r"^no video stream$"):
        probe_video(_wave())


def _wave() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return file.getvalue()


def test_a_video_with_damaged_ends_is_refused(videos: list[bytes]):
    start = videos[0].index(b"mdat") + 4
    with pytest.raises(DataError, match=r"^damaged: "):
        probe_video(videos[0][:start] + bytes(2000) + videos[0][start + 2000 :])


def test_packing_does_without_the_seconds_that_pytorch_takes():
    code = "import sys, data_shards.pack, data_shards.packing.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0


def test_the_manifest_of_a_pack_names_its_maker(source: Path):
    header = json.loads((packed(source, val_fraction=0).destination / "train" / "manifest.json").read_text())
    assert header["created_by"].startswith("reelscale")
