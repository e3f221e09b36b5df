"""A payload is read whole and checked; what cannot be read names its shard and key."""

import os
from pathlib import Path

import pytest

from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader
from data_shards.storage import local
from tests.data_shards.packed import damage, make_split

CONTENTS = {f"clip_{number}": os.urandom(1000 + 37 * number) for number in range(10)}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_split(tmp_path / "a b's set" / "train", CONTENTS, samples_per_shard=3)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH208, PTH112


def test_payloads_are_the_bytes_that_were_packed(manifest):
    with ShardReader(manifest) as reader:
        for sample_id in (9, 0, 4, 4, 1):
            assert reader.read(sample_id) == list(CONTENTS.values())[sample_id]


def test_a_read_that_returns_less_goes_on(manifest, monkeypatch):
    whole_pread = os.pread
    monkeypatch.setattr(local.os, "pread", lambda file, size, offset: whole_pread(file, min(size, 100), offset))
    with ShardReader(manifest) as reader:
        assert reader.read(7) == CONTENTS["clip_7"]


def test_few_files_stay_open_and_none_after_close(manifest):
    before = num_open_files()
    reader = ShardReader(manifest, local.LocalStorage(manifest.root, max_open_files=2))
    for sample_id in (*range(10), 0, 9):
        reader.read(sample_id)
        assert num_open_files() <= before + 2
    reader.close()
    assert num_open_files() == before
    assert reader.read(3) == CONTENTS["clip_3"]
    reader.close()


def test_a_shard_used_again_stays_open(manifest, monkeypatch):
    opened = []
    whole_open = os.open
    monkeypatch.setattr(local.os, "open", lambda path, flags: opened.append(Path(path).name) or whole_open(path, flags))
    with ShardReader(manifest) as reader:
        for sample_id in (0, 1, 2, 5, 0):
            reader.read(sample_id)
    assert opened == ["shard-000000.tar", "shard-000001.tar"]


def test_other_bytes_than_the_manifests_name_shard_and_key(manifest):
    damage(manifest, 4)
    with ShardReader(manifest) as reader:
        with pytest.raises(
            DataError, match=r"a b's set/train/shard-000001\.tar:clip_4: .*crc32.*do not match"
        ) as caught:
            reader.read(4)
        assert "\n" not in str(caught.value)
        assert reader.read(5) == CONTENTS["clip_5"]


def test_a_tar_cut_after_it_was_opened_names_shard_and_key(manifest):
    os.truncate(manifest.shard_path(4), int(manifest.samples[4]["offset"]) + 10)
    with (
        ShardReader(manifest) as reader,
        pytest.raises(DataError, match=r"shard-000001\.tar:clip_4: the tar ends after"),
    ):
        reader.read(4)


def test_a_shard_that_vanished_is_the_machines_error(manifest):
    manifest.shard_path(4).unlink()
    with ShardReader(manifest) as reader, pytest.raises(FileNotFoundError, match=r"shard-000001\.tar:clip_4"):
        reader.read(4)
