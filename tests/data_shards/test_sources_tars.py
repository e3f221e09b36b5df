"""WebDataset tars as a source: grouped by key, labels by name or number, damage never ends a tar in silence."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import PIL.Image
import pytest
import webdataset

from data_shards.errors import DataError, PackError
from data_shards.forms.encoding import EncodingConfig
from data_shards.manifest import open_manifest
from data_shards.motion import MotionConfig, encode_h264, render_clip
from data_shards.pack import PackConfig, pack
from data_shards.reading import ShardReader
from data_shards.sources import Source, read_source


@pytest.fixture(scope="module")
def video() -> bytes:
    return encode_h264(render_clip(MotionConfig(size=32, num_frames=8), index=1, label="left", scene=1))


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def found(source: Source) -> set[tuple[str, str, str]]:
    return {(sample.name, sample.label, sample.split) for sample in source.samples}


def facts(name: str, label: int) -> bytes:
    return json.dumps({"class": name, "label": label}).encode()


def refusal(path: Path) -> str:
    with pytest.raises(PackError) as caught:
        read_source(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tars_of_webdataset_itself_are_packed_with_their_bytes_labels_and_facts(tmp_path: Path, video: bytes):
    (tmp_path / "source" / "train").mkdir(parents=True)
    (tmp_path / "source" / "val").mkdir()
    for split, keys in (("train", ["a/1", "a/2", "b/3"]), ("val", ["a/4"])):
        with webdataset.TarWriter(str(tmp_path / "source" / split / "x-0.tar")) as writer:
            for key in keys:
                described = {"caption": f"this is {key}", "class": {"a": "run", "b": "jump"}[key[0]]}
                writer.write({"__key__": key, "mp4": video, "cls": "ab".index(key[0]), "json": described})
    result = pack(PackConfig(source=tmp_path / "source", destination=tmp_path / "packed", workers=1))
    assert result.classes == ("run", "jump"), "the numbers of .cls, the names of .json"
    assert {split: done.num_samples for split, done in result.splits.items()} == {"train": 3, "val": 1}
    manifest = open_manifest(tmp_path / "packed" / "train")
    with ShardReader(manifest) as reader, tarfile.open(manifest.shard_path(0)) as tar:
        for sample_id in range(3):
            key = manifest.key(sample_id)
            said = json.load(tar.extractfile(f"{key}.json"))
            old_key = said["file"].removeprefix("train/x-0.tar/")
            assert said["source"]["caption"] == f"this is {old_key}"
            assert manifest.samples["label"][sample_id] == {"a": 0, "b": 1}[old_key[0]]
            assert reader.read(sample_id) == video


def test_our_own_tars_are_a_source(tmp_path: Path, video: bytes):
    for name in ("b/1", "a/2", "a/3"):
        path = tmp_path / "videos" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video)
    pack(PackConfig(source=tmp_path / "videos", destination=tmp_path / "one", workers=1, val_fraction=0))
    pack(PackConfig(source=tmp_path / "one", destination=tmp_path / "two", workers=1))
    one, two = (open_manifest(tmp_path / name / "train") for name in ("one", "two"))
    assert one.classes == two.classes == ("a", "b")
    assert sorted(one.samples["label"]) == sorted(two.samples["label"])
    assert sorted(one.samples["crc32"]) == sorted(two.samples["crc32"])


def test_labels_are_names_or_numbers_with_a_list_of_names(tmp_path: Path):
    tar_of(tmp_path / "0.tar", {"x.mp4": b"v", "x.cls": b"2", "y.cls": b"0\n", "y.mp4": b"v"})
    assert {sample.label for sample in read_source(tmp_path).samples} == {"2", "0"}
    assert read_source(tmp_path).classes == ("0", "1", "2")
    (tmp_path / "names.txt").write_text("run\njump\nfly\n")
    source = read_source(tmp_path / "0.tar", class_names=tmp_path / "names.txt", val_fraction=0)
    assert found(source) == {("0.tar/x", "fly", "train"), ("0.tar/y", "run", "train")}
    tar_of(
        tmp_path / "named" / "0.tar", {"x.mp4": b"v", "x.cls": b"fly", "y.webm": b"v", "y.json": b'{"label": "ant"}'}
    )
    assert read_source(tmp_path / "named").classes == ("ant", "fly")


def test_keys_end_at_the_first_dot_of_the_last_part(tmp_path: Path):
    members = {"a.b/x.small.mp4": b"v", "a.b/x.cls": b"0", "a.b/y.mp4": b"w", "a.b/y.cls": b"0"}
    tar_of(tmp_path / "0.tar", members)
    source = read_source(tmp_path, val_fraction=0)
    assert [sample.name for sample in source.samples] == ["0.tar/a.b/x", "0.tar/a.b/y"]
    assert [sample.content.read() for sample in source.samples] == [b"v", b"w"]


def test_what_has_no_video_or_no_label_is_listed(tmp_path: Path):
    tar_of(tmp_path / "0.tar", {"a.txt": b"words", "a.cls": b"0", "b.mp4": b"v", "c.mp4": b"v", "c.cls": b"0"})
    source = read_source(tmp_path)
    assert [sample.name for sample in source.samples] == ["0.tar/c"]
    assert {(missing.name, missing.reason) for missing in source.missing} == {
        ("0.tar/a", "no video or picture under this key"),
        ("0.tar/b", "no label: no .cls, no .json"),
    }


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.mp4": b"v", "b.mp4": b"v"}, "none of the 2 samples"),
        ({"a.mp4": b"v", "a.cls": b"0", "b.jpg": b"v", "b.cls": b"0"}, "holds videos and pictures"),
        ({"a.mp4": b"v", "a.json": b"{"}, "0.tar:a.json is not JSON"),
        ({"a.mp4": b"v", "a.cls": b"-1"}, "the label is -1"),
        (
            {"a.mp4": b"v", "a.json": facts("x", 0), "b.mp4": b"v", "b.json": facts("y", 0)},
            "label 0 is 'y' here and 'x' in an earlier sample",
        ),
        (
            {"a.mp4": b"v", "a.json": facts("x", 0), "b.mp4": b"v", "b.json": facts("x", 1)},
            "two numbers stand for the class 'x'",
        ),
    ],
)  # fmt: skip
def test_a_slip_in_the_samples_is_named(tmp_path: Path, members: dict[str, bytes], message: str):
    tar_of(tmp_path / "0.tar", members)
    assert message in refusal(tmp_path)


def test_a_key_that_comes_back_later_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.mp4", "a.cls", "b.mp4", "b.cls", "a.mp4", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    assert "the key 0.tar/a stands twice in its tar" in refusal(tmp_path)


def damaged(path: Path, change: str) -> None:
    """Damage a tar of three samples of 2 + 2 blocks each."""
    content = bytearray(path.read_bytes())
    if change == "middle header":
        content[4 * 512 : 4 * 512 + 8] = b"\xffgarbage"[:8]
    if change == "zeroed header":
        content[4 * 512 : 5 * 512] = bytes(512)
    if change == "cut in a member":
        del content[5 * 512 + 100 :]
    if change == "cut in a header":
        del content[4 * 512 + 100 :]
    if change == "first header":
        content[:512] = b"\xff" * 512
    if change == "empty":
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change", ["middle header", "zeroed header", "cut in a member", "cut in a header", "first header", "empty"]
)
def test_a_damaged_tar_is_named_and_not_cut_short_in_silence(tmp_path: Path, change: str):
    members = {f"{key}.{end}": content for key in "abc" for end, content in (("mp4", b"v" * 500), ("cls", b"0"))}
    path = tar_of(tmp_path / "0.tar", members)
    assert len(read_source(path).samples) == 3
    damaged(path, change)
    line = refusal(path)
    assert str(path) in line
    assert "copy it again or take it away" in line


def test_hidden_members_are_left_out_and_endings_may_be_capitals(tmp_path: Path):
    hidden = {"x/._a.mp4": b"\0\5\x16\7", "x/._a.cls": b"\0\5\x16\7"}
    tar_of(tmp_path / "0.tar", {**hidden, "x/a.MP4": b"v", "x/a.CLS": b"1"})
    source = read_source(tmp_path, val_fraction=0)
    assert found(source) == {("0.tar/x/a", "1", "train")}
    assert source.missing == ()


def test_a_member_is_read_whole_or_is_damaged(tmp_path: Path, monkeypatch):
    tar = tar_of(tmp_path / "0.tar", {"a.mp4": bytes(4000), "a.cls": b"0"})
    (sample,) = read_source(tmp_path).samples
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))  # Linux: 2 GiB
    assert len(sample.content.read()) == 4000
    os.truncate(tar, 1000)
    with pytest.raises(DataError, match="the tar has been cut: 488 of 4000 bytes"):
        sample.content.read()


def test_facts_that_are_no_json_are_a_bad_sample(tmp_path: Path, video: bytes):
    members = {"a.mp4": video, "a.cls": b"0", "a.json": b"{" * (2 << 20), "b.mp4": video, "b.cls": b"0"}
    tar_of(tmp_path / "source" / "0.tar", members)
    config = PackConfig(source=tmp_path / "source", destination=tmp_path / "packed", workers=1, on_bad="skip")
    (rejected,) = pack(config).rejected
    assert "a.json is not JSON" in rejected.reason


def test_facts_beside_a_picture_are_kept(tmp_path: Path):
    picture = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(picture, "PNG")
    members = {"a.png": picture.getvalue(), "a.cls": b"0", "a.json": json.dumps({"caption": "a cat"}).encode()}
    tar_of(tmp_path / "source" / "0.tar", members)
    encoding = EncodingConfig(store_as="raw")
    pack(PackConfig(source=tmp_path / "source", destination=tmp_path / "packed", encoding=encoding, workers=2))
    with tarfile.open(tmp_path / "packed" / "train" / "shard-000000.tar") as tar:
        (name,) = (name for name in tar.getnames() if name.endswith(".json"))
        file = tar.extractfile(name)
        assert file is not None
        assert json.load(file)["source"] == {"caption": "a cat"}
