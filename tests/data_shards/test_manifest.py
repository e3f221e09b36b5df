"""The manifest: written whole, read back, and every kind of damage named in one line."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import DataError
from data_shards.manifest import (
    Manifest,
    ManifestError,
    Shard,
    check_samples,
    open_manifest,
    samples_dtype,
    write_manifest,
)
from tests.data_shards.packed import make_split

VIDEOS = {f"clips/take_{number}": bytes([number]) * (700 + number) for number in range(5)}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_split(tmp_path / "set" / "train", VIDEOS, samples_per_shard=2)


def header_of(manifest: Manifest) -> dict:
    return json.loads((manifest.root / "manifest.json").read_text())


def rewrite(manifest: Manifest, **changes: object) -> None:
    header = header_of(manifest) | changes
    (manifest.root / "manifest.json").write_text(json.dumps(header))


def refusal(folder: Path) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(ManifestError) as caught:
        open_manifest(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_every_sample_is_found_where_the_manifest_says(manifest: Manifest):
    assert len(manifest) == 5
    assert manifest.split == "train"
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 1]
    for sample_id, (key, payload) in enumerate(VIDEOS.items()):
        row = manifest.samples[sample_id]
        descriptor = os.open(manifest.shard_path(sample_id), os.O_RDONLY)
        try:
            assert os.pread(descriptor, int(row["size"]), int(row["offset"])) == payload
        finally:
            os.close(descriptor)
        assert manifest.key(sample_id) == key
        assert manifest.describe(sample_id) == f"shard-{sample_id // 2:06d}.tar:{key}"
        assert manifest.class_name(int(row["label"])) == f"class{row['label']}"


def test_samples_are_mapped_and_read_only(manifest: Manifest):
    assert isinstance(manifest.samples.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        manifest.samples["label"][0] = 1


def test_a_label_without_class_is_refused(manifest: Manifest):
    with pytest.raises(ValueError, match="no class with label -1"):
        manifest.class_name(-1)


def test_pickling_carries_the_folder_and_not_the_samples(manifest: Manifest):
    carried = pickle.dumps(manifest)
    assert len(carried) < 500
    again = pickle.loads(carried)
    assert (again.root, again.classes, again.shards) == (manifest.root, manifest.classes, manifest.shards)
    assert (again.samples == manifest.samples).all()


def test_class_names_are_kept_verbatim(tmp_path: Path):
    classes = ["007", "a b", 'say "hi"', "打球", "x,y", "été"]
    make_split(tmp_path / "train", VIDEOS)
    written = open_manifest(tmp_path / "train")
    write_manifest(tmp_path / "train", split="train", classes=classes, shards=written.shards, samples=written.samples)
    assert open_manifest(tmp_path / "train").classes == tuple(classes)


def test_an_absent_folder_is_named(tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_folder_of_splits_is_refused_with_the_splits_in_it(manifest: Manifest):
    assert "it holds the splits train" in refusal(manifest.root.parent)


def test_a_folder_that_is_no_packed_set_is_refused(tmp_path: Path):
    assert "not a packed split (it has no manifest.json)" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"format": ', b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_json_is_named(manifest: Manifest, content: bytes):
    (manifest.root / "manifest.json").write_bytes(content)
    assert "manifest.json" in refusal(manifest.root)


def test_a_manifest_of_another_version_is_refused(manifest: Manifest):
    rewrite(manifest, version=2)
    assert "has version 2, this reelscale reads version 1" in refusal(manifest.root)


@pytest.mark.parametrize(
    ("field", "value"),
    [("split", 3), ("classes", "ab"), ("classes", [1]), ("num_samples", "5"), ("shards", None), ("shards", [{}]),
     ("samples_crc32", None), ("shards", [{"name": "a", "num_samples": "5", "num_bytes": 1, "first_sample": 0}]),
     ("shards", [{"name": "a", "num_samples": 5, "num_bytes": -1, "first_sample": 0}]),
     ("shards", [{"name": "a", "num_samples": 5, "num_bytes": 2**70, "first_sample": 0}])],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_named(manifest: Manifest, field: str, value: object):
    rewrite(manifest, **{field: value})
    assert "is damaged" in refusal(manifest.root)


def test_shards_that_do_not_add_up_are_refused(manifest: Manifest):
    rewrite(manifest, shards=header_of(manifest)["shards"][1:])
    assert '3 samples, "num_samples" is 5' in refusal(manifest.root)


def test_missing_samples_are_named(manifest: Manifest):
    (manifest.root / "samples.npy").unlink()
    assert "samples.npy is missing" in refusal(manifest.root)


@pytest.mark.parametrize("keep", [0, 20, -1])
def test_cut_samples_are_refused(manifest: Manifest, keep: int):
    path = manifest.root / "samples.npy"
    path.write_bytes(path.read_bytes()[:keep])
    assert "samples.npy is damaged or cut" in refusal(manifest.root)


def test_samples_of_another_length_are_refused(manifest: Manifest):
    np.save(manifest.root / "samples.npy", manifest.samples[:4])
    assert "holds 4 samples, manifest.json says 5" in refusal(manifest.root)


def test_samples_with_other_fields_are_refused(manifest: Manifest):
    np.save(manifest.root / "samples.npy", np.zeros(5))
    assert "does not hold the fields of a manifest" in refusal(manifest.root)


def test_samples_of_another_set_are_refused_by_their_checksum(manifest: Manifest):
    samples = manifest.samples.copy()
    samples["label"][0] ^= 1
    np.save(manifest.root / "samples.npy", samples)
    assert "does not belong to its manifest.json, or is damaged (crc32" in refusal(manifest.root)


def test_samples_that_point_beyond_a_shard_are_refused(manifest: Manifest):
    samples = manifest.samples.copy()
    samples["offset"][4] = 1 << 40
    write_manifest(manifest.root, split="train", classes=manifest.classes, shards=manifest.shards, samples=samples)
    assert "an offset that manifest.json does not have" in refusal(manifest.root)


def test_checking_the_samples_takes_the_memory_of_a_shard(monkeypatch, tmp_path: Path):
    samples = np.zeros(200_000, samples_dtype(4))
    samples["shard"] = np.repeat(np.arange(200), 1000)
    shards = tuple(
        Shard(name=f"{number}.tar", num_samples=1000, num_bytes=1, first_sample=1000 * number) for number in range(200)
    )
    monkeypatch.setattr("data_shards.manifest.crc32_of_file", lambda _: 0)  # it reads 4 MB at a time
    header = {"classes": ["a"], "samples_crc32": 0}
    tracemalloc.start()
    try:
        check_samples(tmp_path, header, shards, samples)
        assert tracemalloc.get_traced_memory()[1] < 200_000, "less than a byte a sample"
    finally:
        tracemalloc.stop()
    samples["label"][-1] = 1
    with pytest.raises(ManifestError, match="names a label"):
        check_samples(tmp_path, header, shards, samples)


def test_a_missing_shard_is_named(manifest: Manifest):
    manifest.shard_path(2).unlink()
    assert "shard-000001.tar is missing" in refusal(manifest.root)


def test_a_cut_shard_is_named_and_can_be_left_unchecked(manifest: Manifest):
    path = manifest.shard_path(4)
    os.truncate(path, 512)
    message = refusal(manifest.root)
    assert "shard-000002.tar has 512 bytes" in message
    assert "the tar was cut or replaced" in message
    assert len(open_manifest(manifest.root, check_shards=False)) == 5


def test_a_writer_refuses_shards_that_do_not_fit_its_samples(tmp_path: Path):
    samples = np.zeros(3, samples_dtype(4))
    shard = Shard(name="shard-000000.tar", num_samples=2, num_bytes=10, first_sample=0)
    with pytest.raises(AssertionError):
        write_manifest(tmp_path, split="train", classes=["a"], shards=[shard], samples=samples)
    assert not list(tmp_path.iterdir())


def test_a_manifest_error_is_bad_input():
    assert issubclass(ManifestError, DataError)
    assert issubclass(DataError, ValueError)
