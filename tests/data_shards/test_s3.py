"""Sets in a real S3 server (moto's) on loopback, with faults injected between it and the reader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="reading from S3 needs s3fs (pip install 'reelscale[s3]')")
pytest.importorskip("moto.server", reason="the S3 server of this test is moto's (pip install 'moto[server]')")

from data_shards.errors import ManifestError
from data_shards.manifest import open_manifest
from data_shards.reading import ShardReader
from data_shards.storage import ReadCosts, StorageConfig
from data_shards.storage.remote import RemoteStorage
from data_shards.storage.retries import Backoff
from tests.data_shards.packed import make_split
from tests.data_shards.servers import Fault, FileServer, bucket_of

CONTENTS = {f"clip_{number}": os.urandom(30_000 + 37 * number) for number in range(10)}
PAYLOADS = list(CONTENTS.values())


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[FileServer]:
    """A packed split at s3://bucket/a set/train, behind a proxy that can fail."""
    folder = tmp_path_factory.mktemp("s3")
    make_split(folder / "train", CONTENTS, samples_per_shard=3)
    (folder / "train" / "big").write_bytes(bytes(range(256)) * 2000)
    with bucket_of(folder, "a set") as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def no_faults(bucket, monkeypatch):
    monkeypatch.setattr(Backoff, "seconds", lambda _self, attempt: 0.001 * attempt)
    bucket.fault_of = lambda _path, _number: None
    bucket.requests.clear()


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(cache_folder=tmp_path / "cache", timeout_seconds=5.0, num_attempts=4)


URL = "s3://bucket/a set/train"


def test_a_set_in_a_bucket_gives_the_same_bytes(bucket, config):
    manifest = open_manifest(URL, storage=config)
    for tier in ("remote", "cache"):
        num_bytes = 0
        with ShardReader(manifest) as reader:
            for sample_id in range(10):
                payload = reader.open(sample_id)
                assert payload.whole() == PAYLOADS[sample_id]
                num_bytes += payload.costs.num_bytes[tier]
        assert num_bytes >= sum(map(len, PAYLOADS))
    assert all(sent.startswith("bytes=") for sent in bucket.gets(".tar"))


@pytest.mark.parametrize("ranges", [[(0, 10), (300_000, 5)], [(511_990, 100)], [(512_000, 10)], [(600_000, 10)]])
def test_ranges_and_the_end_of_a_file(bucket, ranges):
    content = bytes(range(256)) * 2000
    storage = RemoteStorage(URL, StorageConfig(num_attempts=2))
    found = storage.read("big", ranges, ReadCosts())
    assert found == [content[offset : offset + size] for offset, size in ranges]


@pytest.mark.parametrize(
    "fault",
    [Fault("status", 500), Fault("status", 503), *map(Fault, ("cut", "short", "drop")), Fault("slow", seconds=0.6)],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_faults_that_pass_are_not_noticed_and_tried_again_by_us_alone(bucket, fault):
    left = [fault, fault]
    bucket.fault_of = lambda path, _number: left.pop() if path.endswith("/big") and left else None
    config = StorageConfig(num_attempts=4, timeout_seconds=0.3 if fault.kind == "slow" else 5.0)
    (found,) = RemoteStorage(URL, config).read("big", [(512, 100_000)], ReadCosts())
    assert found == (bytes(range(256)) * 2000)[512:100_512]
    assert len(bucket.gets("/big")) == 3


@pytest.mark.parametrize("fault", [Fault("status", 500), Fault("cut"), Fault("drop")], ids=lambda fault: fault.kind)
def test_faults_that_stay_end_in_one_line_that_names_the_shard(bucket, config, fault):
    manifest = open_manifest(URL, storage=config)
    bucket.fault_of = lambda path, _number: fault if path.endswith("1.tar") else None
    with ShardReader(manifest) as reader, pytest.raises(OSError, match="4 attempts in ") as caught:
        reader.read(4)
    assert str(caught.value).endswith("reading s3://bucket/a set/train/shard-000001.tar:clip_4")
    assert "\n" not in str(caught.value)
    # aiohttp itself sends a request again when a connection that was kept has been closed.
    assert len(bucket.gets("1.tar")) == (8 if fault.kind == "drop" else 4)


def test_what_is_not_there_is_named_at_once(bucket, config):
    with pytest.raises(ManifestError, match=r"s3://bucket/nowhere is not a packed split"):
        open_manifest("s3://bucket/nowhere", storage=config)
    with pytest.raises(ManifestError, match=r"s3://no-bucket/train is not a packed split"):
        open_manifest("s3://no-bucket/train", storage=config)
    storage = RemoteStorage(URL, config)
    with pytest.raises(FileNotFoundError, match=r"no such file: 'shard-9\.tar'"):
        storage.read("shard-9.tar", [(0, 10)], ReadCosts())
    assert len(bucket.gets("shard-9.tar")) == 1
