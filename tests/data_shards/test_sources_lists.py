"""TSN's lists: frames by number, labels that keep their number, slips named with their line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data_shards.errors import DataError, PackError
from data_shards.forms.encoding import EncodingConfig, encode_sample
from data_shards.forms.frames_file import read_table
from data_shards.forms.opening import open_frames
from data_shards.forms.payload import MemoryPayload
from data_shards.manifest import open_manifest
from data_shards.pack import PackConfig, pack
from data_shards.reading import ShardReader
from data_shards.sources import Source, read_source
from data_shards.sources.frame_lists import FrameFolder


def frames_in(folder: Path, names: list[str]) -> list[bytes]:
    """Different JPEG pictures under these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        PIL.Image.new("RGB", (32, 24), (8 * number, 100, 50)).save(folder / name, format="jpeg")
    return [(folder / name).read_bytes() for name in names]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(source: Source) -> set[tuple[str, str, str]]:
    return {(sample.name, sample.label, sample.split) for sample in source.samples}


@pytest.mark.parametrize("pattern", ["image_{:05d}.jpg", "img_{:05d}.jpg", "{:06d}.jpg", "other-{}.JPEG"])
def test_frames_are_read_in_the_order_of_their_numbers_from_1(tmp_path: Path, pattern: str):
    frames = frames_in(tmp_path / "clip", [pattern.format(number) for number in range(1, 13)])
    (tmp_path / "clip" / "notes.txt").write_text("not a frame")
    assert list(FrameFolder(tmp_path / "clip", 12).read()) == frames
    assert list(FrameFolder(tmp_path / "clip", 5).read()) == frames[:5], "the list says how many"


def test_frames_are_counted_from_0_where_there_is_a_frame_0(tmp_path: Path):
    frames = frames_in(tmp_path / "clip", [f"img_{number:05d}.jpg" for number in range(4)])
    assert list(FrameFolder(tmp_path / "clip", 4).read()) == frames


def test_frames_that_are_not_stored_are_not_read(tmp_path: Path):
    frames_in(tmp_path / "clip", [f"img_{number:05d}.jpg" for number in range(1, 11)])
    for number in (1, 2, 4, 5, 6, 7, 9, 10):
        (tmp_path / "clip" / f"img_{number:05d}.jpg").write_bytes(b"not read, or it would be refused")
    config = EncodingConfig(store_as="jpeg", frames=2)
    encoded = encode_sample(FrameFolder(tmp_path / "clip", 10).read(), config)
    assert read_table(encoded.payload, size=len(encoded.payload)).numbers.tolist() == [2, 7]


def test_optical_flow_beside_the_frames_is_left_alone(tmp_path: Path):
    frames = frames_in(tmp_path / "clip", ["img_00001.jpg", "img_00002.jpg"])
    frames_in(tmp_path / "clip", ["flow_x_00001.jpg", "flow_y_00001.jpg"])
    assert list(FrameFolder(tmp_path / "clip", 2).read()) == frames


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["img_00001.jpg", "img_00003.jpg"], r"frame 2 is missing: the list says 3 frames from 1"),
        (["img_00002.jpg", "img_00003.jpg", "img_00004.jpg"], r"frame 1 is missing"),
        (["a_1.jpg", "b_1.jpg"], r"the folder holds several series of pictures \(a_, b_\)"),
        (["cover.jpg"], r"the folder holds no numbered pictures"),
    ],
)
def test_a_folder_without_the_frames_of_the_list_is_named(tmp_path: Path, names: list[str], message: str):
    frames_in(tmp_path / "clip", names)
    with pytest.raises(DataError, match=message):
        FrameFolder(tmp_path / "clip", 3).read()


def test_lists_give_splits_and_labels_keep_their_numbers(tmp_path: Path):
    write(tmp_path / "train_videofolder.txt", "clips/a b 12 10\nclips/c 8 2\n\n")
    write(tmp_path / "val_videofolder.txt", "clips/d 9 2\n")
    write(tmp_path / "readme.txt", "not a list")
    source = read_source(tmp_path)
    assert found(source) == {("clips/a b", "10", "train"), ("clips/c", "2", "train"), ("clips/d", "2", "val")}
    assert source.classes == tuple(map(str, range(11))), "label 10 is number 10, though 3 to 9 have no samples"
    assert [sample.weight for sample in source.samples] == [12, 8, 9]


def test_class_names_come_from_a_file(tmp_path: Path):
    write(tmp_path / "train.txt", "a 12 1\nb 12 0\n")
    names = write(tmp_path / "category.txt", "walk\nabseil\njump\n")
    source = read_source(tmp_path / "train.txt", class_names=names, val_fraction=0)
    assert found(source) == {("a", "abseil", "train"), ("b", "walk", "train")}
    assert source.classes == ("walk", "abseil", "jump"), "in the order of the file"


def test_a_list_of_video_files_has_no_number_of_frames(tmp_path: Path):
    write(tmp_path / "videos" / "x" / "my clip.mp4", "x")
    write(tmp_path / "train.txt", "x/my clip.mp4 0\n")
    source = read_source(tmp_path / "train.txt", videos=tmp_path / "videos", val_fraction=0)
    assert source.samples[0].content.path == tmp_path / "videos" / "x" / "my clip.mp4"
    assert not source.are_pictures


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 12 0\nb 12\n", "train.txt line 2 is 'b 12'; a line is `path num_frames label`"),
        ("a 12 0\nb twelve 0\n", "line 2 is 'b twelve 0'"),
        ("a 12 0\nb 0 1\n", "line 2: the number of frames is 0 of 'b'"),
        ("a 12 0\na 13 1\n", "line 2: 'a' is in"),
        ("a 12 0\nb 12 -1\n", "line 2: the label is -1; labels count from 0"),
        ("a 12 0\nb 12 2\n", "line 2: the label is 2, the list of class names has 0 to 1"),
    ],
)
def test_a_slip_in_a_list_is_named_with_its_line(tmp_path: Path, text: str, message: str):
    write(tmp_path / "train.txt", text)
    with pytest.raises(PackError) as caught:
        read_source(tmp_path / "train.txt", class_names=write(tmp_path / "names", "walk\nrun\n"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "names is empty"), ("a\n\nb\n", "line 2 is empty"), ("a\nb\na\n", "line 3 is 'a', as line 1 is")],
)
def test_a_slip_in_the_class_names_is_named(tmp_path: Path, text: str, message: str):
    write(tmp_path / "train.txt", "a 12 0\n")
    with pytest.raises(PackError, match=message):
        read_source(tmp_path / "train.txt", class_names=write(tmp_path / "names", text))


def test_class_names_for_a_source_that_names_them_itself_are_refused(tmp_path: Path):
    write(tmp_path / "src" / "run" / "1.mp4", "x")
    with pytest.raises(PackError, match="names its classes itself"):
        read_source(tmp_path / "src", class_names=write(tmp_path / "names", "a\n"))


def test_a_list_of_frames_is_packed_and_read_back_frame_by_frame(tmp_path: Path):
    frames = {name: frames_in(tmp_path / name, [f"img_{n:05d}.jpg" for n in range(1, 7)]) for name in ("a", "b", "c")}
    (tmp_path / "c" / "img_00004.jpg").unlink()
    write(tmp_path / "train.txt", "a 6 1\nb 6 0\nc 6 0\nd 6 0\n")
    config = PackConfig(
        source=tmp_path / "train.txt",
        destination=tmp_path / "packed",
        encoding=EncodingConfig(store_as="jpeg"),
        val_fraction=0,
        on_bad="skip",
        workers=1,
    )
    result = pack(config)
    assert {(Path(row.file).name, row.reason) for row in result.rejected} == {
        ("c", "frame 4 is missing: the list says 6 frames from 1"),
        ("d", "cannot be read: No such file or directory"),
    }
    manifest = open_manifest(tmp_path / "packed" / "train")
    assert manifest.form == "jpeg"
    with ShardReader(manifest) as reader:
        for sample_id in range(2):
            name = manifest.key(sample_id)
            assert int(manifest.samples["label"][sample_id]) == {"a": 1, "b": 0}[name]
            payload = reader.read(sample_id)
            assert all(frame in payload for frame in frames[name]), "JPEG files are stored as they are"
            decoded = open_frames("jpeg", MemoryPayload(payload)).decode([0, 5]).frames
            assert decoded.shape == (2, 24, 32, 3)
            assert np.abs(decoded[1, 0, 0].astype(int) - (40, 100, 50)).max() < 6


def test_pictures_are_not_packed_as_mp4(tmp_path: Path):
    frames_in(tmp_path / "a", ["img_00001.jpg"])
    write(tmp_path / "train.txt", "a 1 0\n")
    with pytest.raises(PackError, match="holds pictures: pack them --as jpeg, or --as raw"):
        pack(PackConfig(source=tmp_path / "train.txt", destination=tmp_path / "packed", workers=1))
    assert not (tmp_path / "packed.partial").exists()
