"""Still images as a source: class folders, CSVs, MNIST's idx files; an image is a clip of one frame."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data_shards.errors import PackError
from data_shards.forms.encoding import EncodingConfig
from data_shards.forms.opening import open_frames
from data_shards.manifest import Manifest, open_manifest
from data_shards.pack import PackConfig, pack
from data_shards.reading import ShardReader
from data_shards.sources import read_source


def picture(path: Path, shade: int, size: tuple[int, int] = (20, 16)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), shade, np.uint8)
    pixels[0, 0] = (255, 0, shade)
    PIL.Image.fromarray(pixels).save(path)
    return pixels


def idx_pair(folder: Path, prefix: str, images: np.ndarray, labels: list[int], *, zipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", np.array(labels, np.uint8))):
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


def digits(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)


def packed(source: Path, store_as: str, **options: object) -> Path:
    destination = source.parent / "packed"
    encoding = EncodingConfig(store_as=store_as)  # type: ignore[arg-type]
    pack(PackConfig(source=source, destination=destination, workers=1, encoding=encoding, **options))
    return destination


def pixels_of(manifest: Manifest, sample_id: int) -> np.ndarray:
    """The one frame of a sample."""
    with ShardReader(manifest) as reader:
        source = open_frames(manifest.form, reader.open(sample_id))
        assert source.num_frames == manifest.samples["num_frames"][sample_id] == 1
        return source.decode([0]).frames[0]


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_packed_with_their_very_pixels_numbers_and_splits(tmp_path: Path, zipped: bool):
    images = {"train": digits(6), "t10k": digits(3)[::-1]}
    labels = {"train": [7, 2, 1, 0, 4, 1], "t10k": [9, 0, 3]}
    for prefix, array in images.items():
        idx_pair(tmp_path / "mnist", prefix, array, labels[prefix], zipped=zipped)
    root = packed(tmp_path / "mnist", "raw")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        manifest = open_manifest(root / split)
        assert manifest.classes == tuple("0123456789")
        assert len(manifest) == len(images[prefix])
        for sample_id in range(len(manifest)):
            index = int(manifest.key(sample_id).split("/")[1])
            assert manifest.samples["label"][sample_id] == labels[prefix][index]
            grey = images[prefix][index]
            assert np.array_equal(pixels_of(manifest, sample_id), np.repeat(grey[:, :, None], 3, axis=2))


def test_one_idx_file_alone_is_split_by_hash_and_may_have_names(tmp_path: Path):
    idx_pair(tmp_path / "mnist", "t10k", digits(40), [number % 2 for number in range(40)])
    (tmp_path / "names").write_text("shirt\nshoe\n")
    for source in (tmp_path / "mnist", tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"):
        found = read_source(source, class_names=tmp_path / "names", val_fraction=0.25)
        assert [sum(sample.split == split for sample in found.samples) for split in ("train", "val")] == [30, 10]
        assert found.classes == ("shirt", "shoe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: images.write_bytes(images.read_bytes()[:-9]), "is damaged or cut"),
        (lambda images, labels: images.write_bytes(gzip.compress(b"\0\0\x0d\3" + bytes(99))), "is no idx file of 3"),
        (lambda images, labels: images.write_bytes(gzip.compress(b"\0\0\x08\3" + bytes(8))), "is no idx file of 3"),
        (
            lambda images, labels: images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1])),
            "holds 3135 bytes, its header says 4 x 28 x 28",
        ),
        (lambda images, labels: labels.unlink(), "does not exist"),
        (lambda images, labels: labels.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + b"\1\2\3"), "3 labels"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, change, message: str):
    idx_pair(tmp_path, "train", digits(4), [0, 1, 2, 3])
    change(tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(PackError, match=message):
        read_source(tmp_path)


def test_class_folders_of_pictures_are_packed(tmp_path: Path):
    shades = {"cat/1.png": 10, "cat/2.PNG": 20, "dog/3.png": 30, "dog/4.png": 40}
    originals = {name: picture(tmp_path / "source" / name, shade) for name, shade in shades.items()}
    manifest = open_manifest(packed(tmp_path / "source", "raw", val_fraction=0) / "train")
    assert manifest.classes == ("cat", "dog")
    assert len(manifest) == 4
    for sample_id in range(4):
        name = next(name for name in originals if name.split(".")[0] == manifest.key(sample_id))
        assert np.array_equal(pixels_of(manifest, sample_id), originals[name])


def test_pictures_beside_videos_are_left_alone(tmp_path: Path):
    picture(tmp_path / "source" / "a" / "cover.png", 1)
    (tmp_path / "source" / "a" / "1.mp4").write_bytes(b"video")
    source = read_source(tmp_path / "source")
    assert [sample.name for sample in source.samples] == ["a/1.mp4"]
    assert source.unit == "videos"


def test_a_csv_of_jpegs_is_packed_as_the_files_are(tmp_path: Path):
    for name in ("x/1.jpg", "x/2.jpg"):
        picture(tmp_path / "source" / name, 50)
    (tmp_path / "source" / "labels.csv").write_text("file,label,split\nx/1.jpg,facade,train\nx/2.jpg,facade,val\n")
    root = packed(tmp_path / "source", "jpeg")
    manifest = open_manifest(root / "train")
    assert (manifest.samples["width"][0], manifest.samples["height"][0]) == (20, 16)
    with ShardReader(manifest) as reader:
        assert (tmp_path / "source" / "x" / "1.jpg").read_bytes() in reader.read(0)


def test_a_csv_of_videos_and_pictures_is_refused_at_the_row(tmp_path: Path):
    picture(tmp_path / "1.png", 1)
    (tmp_path / "2.mp4").write_bytes(b"video")
    (tmp_path / "labels.csv").write_text("file,label\n1.png,a\n2.mp4,a\n")
    with pytest.raises(PackError, match=r"row 3: file '2.mp4' is not the name of an image"):
        read_source(tmp_path)


def test_a_picture_that_is_none_is_listed(tmp_path: Path):
    picture(tmp_path / "source" / "a" / "1.png", 1)
    (tmp_path / "source" / "a" / "2.png").write_bytes(b"no picture")
    (tmp_path / "source" / "a" / "3.jpg").write_bytes(b"")
    destination = tmp_path / "packed"
    config = PackConfig(
        source=tmp_path / "source",
        destination=destination,
        workers=1,
        encoding=EncodingConfig(store_as="jpeg"),
        on_bad="skip",
        val_fraction=0,
    )
    result = pack(config)
    assert result.unit == "images"
    assert [Path(row.file).name for row in result.rejected] == ["2.png", "3.jpg"]
    assert all(row.reason for row in result.rejected)
    assert result.warnings == ("2 images cannot be read and are left out, see rejected.csv",)


def test_pictures_without_classes_are_of_one_class(tmp_path: Path):
    for name in ("1.png", "2.jpg", "3.JPEG"):
        picture(tmp_path / "source" / name, 1)
    result = pack(
        PackConfig(
            source=tmp_path / "source",
            destination=tmp_path / "packed",
            workers=1,
            encoding=EncodingConfig(store_as="raw"),
            val_fraction=0,
        )
    )
    assert result.classes == ("unlabelled",)
    assert result.splits["train"].num_samples == 3
    assert result.warnings == (
        f"{tmp_path / 'source'} has no folders of classes: all images are of one class, 'unlabelled'",
    )


def test_pictures_without_classes_may_lie_in_splits(tmp_path: Path):
    for name in ("train/1.png", "test/2.png", "Training/3.png"):
        picture(tmp_path / name, 1)
    source = read_source(tmp_path)
    assert source.classes == ("unlabelled",)
    assert {sample.name: sample.split for sample in source.samples} == {
        "train/1.png": "train",
        "test/2.png": "test",
        "Training/3.png": "train",
    }


def test_pictures_with_and_without_classes_are_refused(tmp_path: Path):
    for name in ("1.png", "cat/2.png"):
        picture(tmp_path / name, 1)
    with pytest.raises(PackError, match=r"1\.png is not at SRC/CLASS/IMAGE"):
        read_source(tmp_path)


def test_idx_files_that_are_there_zipped_and_unzipped_are_read_once(tmp_path: Path):
    for zipped in (True, False):
        idx_pair(tmp_path, "train", digits(4), [0, 1, 0, 1], zipped=zipped)
        idx_pair(tmp_path, "t10k", digits(2), [0, 1], zipped=zipped)
    source = read_source(tmp_path)
    assert [(sample.name, sample.split) for sample in source.samples][::4] == [("t10k/0", "test"), ("train/2", "train")]
    assert len(source.samples) == 6


def test_the_split_is_the_last_word_of_an_idx_files_prefix(tmp_path: Path):
    for prefix in ("emnist-letters-train", "emnist-letters-test"):
        idx_pair(tmp_path, prefix, digits(3), [0, 1, 2])
    assert {sample.name.split("/")[0]: sample.split for sample in read_source(tmp_path).samples} == {
        "emnist-letters-train": "train",
        "emnist-letters-test": "test",
    }
    idx_pair(tmp_path, "extra", digits(2), [0, 1])
    with pytest.raises(PackError, match=r"extra-images-idx3-ubyte\.gz does not say its split"):
        read_source(tmp_path)
