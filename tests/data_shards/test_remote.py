"""Sets behind a real HTTP server on loopback: the bytes of the folder, or an error that names the shard."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="reading over http needs aiohttp (pip install 'reelscale[http]')")

from data_shards.errors import DataError, ManifestError
from data_shards.manifest import Manifest, open_manifest
from data_shards.reading import ShardReader, describe_sample
from data_shards.storage import ReadCosts, StorageConfig
from data_shards.storage.remote import RemoteStorage
from data_shards.storage.retries import Backoff
from tests.data_shards.packed import make_split
from tests.data_shards.servers import Fault, FileServer, serving

CONTENTS = {f"clip_{number}": os.urandom(30_000 + 37 * number) for number in range(10)}
PAYLOADS = list(CONTENTS.values())


@pytest.fixture
def server(tmp_path: Path):
    make_split(tmp_path / "served" / "a b" / "train", CONTENTS, samples_per_shard=3)
    with serving(tmp_path / "served") as files:
        yield files


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(cache_folder=tmp_path / "cache", timeout_seconds=5.0, num_attempts=4)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(Backoff, "seconds", lambda _self, attempt: 0.001 * attempt)


def open_train(server: FileServer, config: StorageConfig) -> Manifest:
    return open_manifest(f"{server.url}/a%20b/train", storage=config)


def uncached(server: FileServer, **fields: object) -> RemoteStorage:
    options = {"timeout_seconds": 5.0, "num_attempts": 4, **fields}
    return RemoteStorage(f"{server.url}/a%20b/train", StorageConfig(**options))  # type: ignore[arg-type]


def test_a_remote_set_gives_the_same_bytes_once_over_the_network_and_then_from_the_cache(server, config):
    manifest = open_train(server, config)
    assert (len(manifest), manifest.location) == (10, f"{server.url}/a%20b/train")
    for tier in ("remote", "cache"):
        costs = ReadCosts()
        with ShardReader(manifest) as reader:
            for sample_id in (9, 0, 4, 1, 2, 3, 5, 6, 7, 8):
                payload = reader.open(sample_id)
                assert payload.whole() == PAYLOADS[sample_id]
                for name, num_bytes in payload.costs.num_bytes.items():
                    costs.num_bytes[name] += num_bytes
                    costs.seconds[name] += payload.costs.seconds[name]
        assert costs.num_bytes[tier] >= sum(map(len, PAYLOADS))
        assert costs.num_bytes["disk"] == 0
        assert costs.seconds[tier] > 0
    assert costs.num_bytes["remote"] == 0


def test_a_pickled_manifest_is_opened_again_without_the_network(server, config):
    carried = pickle.dumps(open_train(server, config))
    server.requests.clear()
    again = pickle.loads(carried)
    assert server.requests == []
    assert len(again) == 10
    with ShardReader(again) as reader:
        assert reader.read(3) == PAYLOADS[3]


def test_the_manifest_is_copied_once(server, config):
    open_train(server, config)
    server.requests.clear()
    open_train(server, config)
    assert [path for _, path, _ in server.requests] == ["/a%20b/train/manifest.json"]


def test_a_copy_that_was_damaged_is_made_again(server, config):
    manifest = open_train(server, config)
    (manifest.root / "samples.npy").write_bytes(b"damaged")
    served = open_manifest(server.folder / "a b" / "train")
    assert (open_train(server, config).samples == served.samples).all()


def test_a_set_that_was_packed_again_is_another_to_the_cache(server, config):
    with ShardReader(open_train(server, config)) as reader:
        assert reader.read(0) == PAYLOADS[0]
    shutil.rmtree(server.folder / "a b" / "train")
    others = {key: content[::-1] for key, content in CONTENTS.items()}
    make_split(server.folder / "a b" / "train", others, samples_per_shard=3)
    with ShardReader(open_train(server, config)) as reader:
        assert reader.read(0) == PAYLOADS[0][::-1]


def test_near_ranges_are_one_request_and_far_ones_are_asked_at_the_same_time(server):
    (server.folder / "a b" / "train" / "big").write_bytes(content := os.urandom(600_000))
    storage, costs = uncached(server), ReadCosts()
    ranges = [(0, 10), (500_000, 5), (400, 100), (500_000, 5), (20, 0)]
    assert storage.read("big", ranges, costs) == [content[offset : offset + size] for offset, size in ranges]
    assert sorted(server.gets("big")) == ["bytes=0-499", "bytes=500000-500004"]
    assert costs.num_bytes == {"disk": 0, "cache": 0, "remote": 505}


@pytest.mark.parametrize("ranges", [[(599_990, 100)], [(600_000, 10)], [(700_000, 10)]])
def test_a_range_beyond_the_end_is_shorter(server, ranges):
    (server.folder / "a b" / "train" / "big").write_bytes(content := os.urandom(600_000))
    assert uncached(server).read("big", ranges, ReadCosts()) == [content[ranges[0][0] :]]


FAULTS = [
    Fault("status", 500),
    Fault("status", 503),
    Fault("status", 429),
    Fault("cut"),
    Fault("drop"),
    Fault("slow", seconds=0.5),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind}-{fault.status}")
def test_faults_that_pass_are_not_noticed(server, fault):
    server.fault_of = lambda path, number: fault if path.endswith(".tar") and number < 2 else None
    storage = uncached(server, timeout_seconds=0.2 if fault.kind == "slow" else 5.0)
    (found,) = storage.read("shard-000000.tar", [(512, len(PAYLOADS[0]))], ReadCosts())
    assert found == PAYLOADS[0]
    assert len(server.gets(".tar")) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("status", 500), "HTTP 500 Internal Server Error"),
        (Fault("cut"), "Response payload is not completed|answer ended|ContentLengthError"),
        (Fault("drop"), "ServerDisconnected"),
        (Fault("slow", seconds=0.3), r"no answer within 0\.1 s"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_faults_that_stay_end_in_one_line_that_names_the_shard(server, config, fault, reason):
    manifest = open_train(server, StorageConfig(cache_folder=config.cache_folder, timeout_seconds=0.1, num_attempts=2))
    server.fault_of = lambda path, _number: fault if path.endswith("1.tar") else None
    with ShardReader(manifest) as reader:
        assert reader.read(0) == PAYLOADS[0]
        with pytest.raises(OSError, match=reason) as caught:
            reader.read(4)
    message = str(caught.value)
    assert "2 attempts in " in message
    assert message.endswith(f"reading {server.url}/a%20b/train/shard-000001.tar:clip_4")
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["whole", "shifted"])
def test_a_server_that_does_not_do_ranges_is_refused_at_once(server, config, kind):
    manifest = open_train(server, config)
    server.fault_of = lambda path, _number: Fault(kind) if path.endswith(".tar") else None
    with ShardReader(manifest) as reader, pytest.raises(OSError, match="it ignores range requests") as caught:
        reader.read(4)
    assert "shard-000001.tar:clip_4" in str(caught.value)
    assert len(server.gets("1.tar")) == 1


def test_a_small_file_may_come_whole(server, config):
    server.fault_of = lambda _path, _number: Fault("whole")
    assert uncached(server).read_file("manifest.json").startswith(b"{")


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (404, FileNotFoundError)])
def test_what_cannot_pass_is_not_tried_again(server, config, status, kind):
    manifest = open_train(server, config)
    server.fault_of = lambda path, _number: Fault("status", status) if path.endswith(".tar") else None
    with ShardReader(manifest) as reader, pytest.raises(kind, match=r"shard-000001\.tar:clip_4"):
        reader.read(4)
    assert len(server.gets("1.tar")) == 1


def test_a_server_that_is_not_there_is_named(tmp_path, config):
    with pytest.raises(OSError, match=r"4 attempts in .*, reading http://127\.0\.0\.1:9/train/manifest\.json"):
        open_manifest("http://127.0.0.1:9/train", storage=config)


def test_a_place_without_a_set_is_refused(server, config):
    with pytest.raises(ManifestError, match=r"http.*/nowhere is not a packed split \(it has no manifest\.json\)"):
        open_manifest(f"{server.url}/nowhere", storage=config)


def test_a_damaged_manifest_is_named_by_its_url(server, config):
    (server.folder / "a b" / "train" / "manifest.json").write_bytes(b'{"format": ')
    with pytest.raises(ManifestError, match=r"http.*/train/manifest\.json is damaged"):
        open_train(server, config)


def test_samples_of_another_manifest_are_refused_and_not_kept(server, config):
    path = server.folder / "a b" / "train" / "samples.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(ManifestError, match=r"http.*/train: of its copy, .*samples\.npy does not belong to"):
            open_train(server, config)
    path.write_bytes(whole)
    assert len(open_train(server, config)) == 10


@pytest.mark.parametrize("name", ["shard-000002.tar", "samples.npy"])
def test_a_file_that_is_missing_is_named(server, config, name):
    (server.folder / "a b" / "train" / name).unlink()
    with pytest.raises(ManifestError, match=rf"http.*/{name} is missing"):
        open_train(server, config)


def test_a_server_that_fails_when_asked_for_sizes_is_asked_again(server, config):
    server.fails_heads = True
    server.fault_of = lambda path, number: Fault("status", 500) if path.endswith(".tar") and number < 2 else None
    assert len(open_train(server, config)) == 10
    server.fault_of = lambda path, _number: Fault("status", 500) if path.endswith("2.tar") else None
    with pytest.raises(OSError, match=r"4 attempts in .* HTTP 500 .*, reading http.*/train/shard-000002\.tar"):
        open_train(server, replace(config, cache_folder=config.cache_folder.parent / "other"))


def test_a_shard_of_another_size_is_named(server, config):
    with (server.folder / "a b" / "train" / "shard-000002.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(ManifestError, match=r"shard-000002\.tar has \d+ bytes, manifest\.json says \d+"):
        open_train(server, config)


def test_damage_on_the_way_is_found_by_the_samples_checksum(server, config):
    manifest = open_train(server, config)
    path = server.folder / "a b" / "train" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with ShardReader(manifest) as reader, pytest.raises(DataError, match=r"clip_0: .*crc32"):
        reader.read(0)


def test_a_cache_folder_that_cannot_be_written_to_is_named(server, config, tmp_path):
    (tmp_path / "file").touch()
    advice = "cannot be written to; give a folder of yours on a disk of this node"
    with pytest.raises(NotADirectoryError, match=rf"file/cache/.* {advice}"):
        open_train(server, replace(config, cache_folder=tmp_path / "file" / "cache"))
    copy = open_train(server, config).root
    (copy / ".lock").unlink()
    (copy / ".lock").mkdir()  # as somebody else's lock, which root could write to
    with pytest.raises(IsADirectoryError, match=rf"{copy} {advice}"):
        open_train(server, config)


def test_a_folder_of_somebody_else_is_not_used_for_copies(server, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    manifest = open_train(server, StorageConfig())
    assert manifest.root.parent == tmp_path / f"reelscale-{os.getuid()}"
    assert manifest.root.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("data_shards.remote_manifest.os.getuid", lambda: os.geteuid() + 1)
    (tmp_path / f"reelscale-{os.geteuid() + 1}").mkdir()
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        open_train(server, StorageConfig())


@pytest.mark.parametrize(
    ("url", "message"),
    [("nothing://here/train", "Protocol not known: nothing"), ("gs://bucket/train", r"pip install gcsfs")],
)
def test_a_url_that_cannot_be_read_says_what_to_do(url, message):
    if url.startswith("gs"):
        try:
            import gcsfs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("gcsfs is installed")
    with pytest.raises(ValueError, match=message) as caught:
        open_manifest(url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_a_sample_is_names_the_url(server, config):
    manifest = open_train(server, config)
    assert describe_sample(manifest, 4) == f"{server.url}/a%20b/train/shard-000001.tar:clip_4"
    with pytest.raises(ValueError, match="is remote"):
        manifest.shard_path(0)
