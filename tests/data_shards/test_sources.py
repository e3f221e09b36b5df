"""Sources: folders and CSVs are read as written, and a slip is named with its row and value."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from data_shards.errors import PackError
from data_shards.sources import Source, read_source


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def labels_csv(root: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / name


def found(source: Source) -> set[tuple[str, str, str]]:
    return {(sample.name, sample.label, sample.split) for sample in source.samples}


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(PackError) as caught:
        read_source(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_per_class_is_read_in_the_order_of_names(tmp_path: Path):
    touch(tmp_path, "b/2.mp4", "b/10.MKV", "a/x.webm", "a/notes.txt", ".git/y.mp4", "a/._x.mp4")
    source = read_source(tmp_path, val_fraction=0)
    assert [video.name for video in source.samples] == ["a/x.webm", "b/10.MKV", "b/2.mp4"]
    assert source.classes == ("a", "b")
    assert {video.split for video in source.samples} == {"train"}
    assert source.samples[0].content.path == tmp_path / "a" / "x.webm"


def test_a_folder_per_split_and_class_is_read(tmp_path: Path):
    touch(tmp_path, "train/a/1.mp4", "validation/a/2.mp4", "Test/b/3.mp4")
    assert found(read_source(tmp_path)) == {
        ("train/a/1.mp4", "a", "train"),
        ("validation/a/2.mp4", "a", "val"),
        ("Test/b/3.mp4", "b", "test"),
    }


def test_classes_named_train_and_test_are_classes_where_videos_lie_in_them(tmp_path: Path):
    touch(tmp_path, "train/1.mp4", "test/2.mp4")
    source = read_source(tmp_path, val_fraction=0)
    assert source.classes == ("test", "train")


def test_odd_class_names_are_kept_verbatim(tmp_path: Path):
    names = ["007", "1.5", "a b", "打球", "it's", 'say "hi"', "été", "x,y"]
    touch(tmp_path, *(f"{name}/clip.mp4" for name in names))
    assert read_source(tmp_path).classes == tuple(sorted(names))


@pytest.mark.parametrize("name", ["top.mp4", "a/b/deep.mp4", "train/a/b/deep.mp4"])
def test_a_video_at_an_odd_place_is_named(tmp_path: Path, name: str):
    touch(tmp_path, "a/1.mp4", name)
    assert f"{tmp_path / name} is not at SRC/CLASS/VIDEO" in refusal(tmp_path)


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path: Path):
    message = refusal(tmp_path)
    assert f"no videos found in {tmp_path}, looked for .mp4 .avi" in message


def test_an_empty_class_folder_is_reported_and_is_no_class(tmp_path: Path):
    touch(tmp_path, "a/1.mp4", "b/readme.txt")
    source = read_source(tmp_path)
    assert source.classes == ("a",)
    assert source.warnings == (f"the folder {tmp_path / 'b'} holds no videos and is left out",)


def test_an_absent_source_is_named(tmp_path: Path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    touch(tmp_path, "a/1.mp4")
    assert "the folder of the videos" in refusal(tmp_path, videos=tmp_path / "nowhere")
    assert "is for a CSV or a list" in refusal(tmp_path, videos=tmp_path)


def test_a_csv_is_read_with_numbers_quotes_and_other_columns(tmp_path: Path):
    touch(tmp_path, "v/1.mp4", "v/a, b.mp4", "v/3.mp4")
    text = "\ufefffile,group,label,split\r\nv/1.mp4,x,007,train\r\n\r\n"
    text += '"v/a, b.mp4",y,"say ""hi"", x",valid\r\nv/3.mp4,z,7,test\r\n'
    path = labels_csv(tmp_path, text)
    expected = {
        ("v/1.mp4", "007", "train"),
        ("v/a, b.mp4", 'say "hi", x', "val"),
        ("v/3.mp4", "7", "test"),
    }
    assert found(read_source(path)) == expected
    assert found(read_source(tmp_path)) == expected, "a folder with labels.csv is that CSV"


def test_paths_are_relative_to_the_csv_or_to_the_folder_of_the_videos(tmp_path: Path):
    touch(tmp_path / "videos", "1.mp4")
    path = labels_csv(tmp_path / "lists", "file,label\n1.mp4,a\n")
    assert read_source(path, videos=tmp_path / "videos").samples[0].content.path == tmp_path / "videos" / "1.mp4"
    labels_csv(tmp_path / "lists", "file,label\n../videos/1.mp4,a\n")
    assert read_source(path).samples[0].content.path == tmp_path / "videos" / "1.mp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n1.mp4,a\n2.mp4,\n", "row 3: the label is empty (2.mp4,)"),
        ("file,label\n1.mp4,a\n1.mp4,b\n", "row 3: file '1.mp4' is in row 2 already"),
        ("file,label\n1.mp4,a\n./1.mp4,a\n", "row 3: file './1.mp4' is in row 2 already"),
        ("file,label\n1.mp4,a\nno.mp4,a\nnone.mp4,b\n", "no.mp4 does not exist (2 of 3 files are absent)"),
        ("file,label\n1.txt,a\n", "row 2: file '1.txt' is not the name of a video"),
        ("file,label,split\n1.mp4,a,fold1\n", "row 2: the split is 'fold1'; write train, val or test"),
        ("file,label,split\n1.mp4,a,\n", "row 2: the split is ''"),
        ("file,label\n1.mp4,a,b\n", "row 2 has 3 values, the header has 2 columns ('1.mp4' ...)"),
        ("file,label\n1.mp4\n", "row 2 has 1 values"),
        ("path,class\n1.mp4,a\n", "needs the columns file,label[,split] (or Kinetics'"),
        ("file,label,file\n1.mp4,a,b\n", "two columns named 'file'"),
        ("file,label\n", "holds no rows below its header"),
        ("", "holds no rows below its header"),
        (b"file,label\n1.mp4,\xe9t\xe9\n", "is not a text file in UTF-8 (invalid continuation byte at byte 17)"),
        ('file,label\n1.mp4,"a\n2.mp4,b\n', "row 3: unexpected end of data"),
        ("file,label\n1.mp4,a\x00b\n", "row 2 has a line break or control character in a value"),
    ],
)  # fmt: skip
def test_a_slip_in_a_csv_is_named_with_its_row_and_value(tmp_path: Path, text: str | bytes, message: str):
    touch(tmp_path, "1.mp4", "2.mp4", "1.txt")
    path = labels_csv(tmp_path, text)
    assert message in refusal(path)
    assert str(path) in refusal(path)


def test_labels_that_differ_only_in_case_or_spaces_are_reported(tmp_path: Path):
    touch(tmp_path, "1.mp4", "2.mp4", "3.mp4")
    path = labels_csv(tmp_path, "file,label\n1.mp4,Run\n2.mp4,run \n3.mp4,walk\n")
    (warning,) = read_source(path).warnings
    assert warning == "the classes 'Run', 'run ' differ only in spaces or case: are they one class?"


KINETICS = (
    "label,youtube_id,time_start,time_end,split\n"
    "abseiling,-3B32lodo2M,59,69,train\n"
    "air drumming,_gVBeJy_GfY,4,14.0,validate\n"
    "abseiling,gone1234567,0,10,test\n"
)


@pytest.mark.parametrize(
    "folders", [("", ""), ("abseiling/", "air drumming/"), ("train/abseiling/", "val/air drumming/")]
)
def test_kinetics_csv_finds_its_files_and_lists_the_missing(tmp_path: Path, folders: tuple[str, str]):
    touch(
        tmp_path / "videos",
        f"{folders[0]}-3B32lodo2M_000059_000069.mp4",
        f"{folders[1]}_gVBeJy_GfY_000004_000014.mkv",
        "other/unlisted_000000_000010.mp4",
    )
    source = read_source(labels_csv(tmp_path, KINETICS, "train.csv"), videos=tmp_path / "videos")
    assert found(source) == {
        (f"{folders[0]}-3B32lodo2M_000059_000069.mp4", "abseiling", "train"),
        (f"{folders[1]}_gVBeJy_GfY_000004_000014.mkv", "air drumming", "val"),
    }
    (missing,) = source.missing
    assert (missing.name, missing.label, missing.split) == ("gone1234567_000000_000010.mp4", "abseiling", "test")


def test_a_kinetics_file_in_two_folders_is_taken_from_that_of_its_class(tmp_path: Path):
    touch(tmp_path, "abseiling/x_000001_000011.mp4", "aaa/x_000001_000011.mp4")
    path = labels_csv(tmp_path, "label,youtube_id,time_start,time_end\nabseiling,x,1,11\n")
    assert read_source(path).samples[0].name == "abseiling/x_000001_000011.mp4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",x,1,11,train", "row 2: the label is empty"),
        ("a,x,one,11,train", "row 2: time_start is 'one', not a number of seconds"),
        ("a,x,1,,train", "row 2: time_end is ''"),
        ("a,x,1,11,train\nb,x,1,11,train", "row 3: the clip x_000001_000011 is in row 2 already"),
        ("a,y,1,11,train", "none of the 1 videos that"),
    ],
)
def test_a_slip_in_kinetics_csv_is_named(tmp_path: Path, row: str, message: str):
    touch(tmp_path, "x_000001_000011.mp4")
    path = labels_csv(tmp_path, f"label,youtube_id,time_start,time_end,split\n{row}\n")
    assert message in refusal(path)


def test_split_by_hash_is_a_function_of_names_and_seed_and_keeps_the_shares(tmp_path: Path):
    touch(tmp_path, *(f"class{label}/clip{number}.mp4" for label in range(5) for number in range(23)))
    options = {"val_fraction": 0.2, "test_fraction": 0.1}
    source = read_source(tmp_path, **options)
    counts = Counter(video.split for video in source.samples)
    assert counts == {"train": 80, "val": 23, "test": 12}
    for label in source.classes:
        shares = Counter(video.split for video in source.samples if video.label == label)
        assert shares["val"] in (4, 5)
        assert shares["test"] in (2, 3)
    assert found(read_source(tmp_path, **options)) == found(source)
    assert found(read_source(tmp_path, **options, seed=1)) != found(source)


def test_split_by_hash_leaves_each_class_something_to_train_on(tmp_path: Path):
    touch(tmp_path, "a/1.mp4", "b/1.mp4", "b/2.mp4")
    source = read_source(tmp_path, val_fraction=0.5, test_fraction=0.4)
    assert {video.label for video in source.samples if video.split == "train"} == {"a", "b"}


def test_impossible_shares_are_refused(tmp_path: Path):
    touch(tmp_path, "a/1.mp4")
    assert "val_fraction 0.6 and test_fraction 0.4" in refusal(tmp_path, val_fraction=0.6, test_fraction=0.4)
    assert "val_fraction -0.1" in refusal(tmp_path, val_fraction=-0.1)


def test_a_folder_that_cannot_be_read_is_an_error_and_not_left_out(tmp_path: Path, monkeypatch):
    touch(tmp_path, "a/1.mp4", "b/2.mp4", "lost+found/3.mp4")
    scandir = os.scandir

    def scan(folder: str) -> object:
        if Path(folder).name in ("b", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(PermissionError, match="b'"):
        read_source(tmp_path)
