"""The number of workers and slabs may change at any time: the stream does not."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import random
import time

import pytest

from data_shards.clips import ClipConfig
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest, open_manifest
from data_shards.storage import StorageConfig
from data_shards.worker import Failure
from data_shards.workers.accounts import new_account
from data_shards.workers.pool import _Running
from data_shards.workers.process import Report
from data_shards.workers.requests import Span
from data_shards.workers.tuning import Size
from tests.data_shards.deadly import Slow, give_maker
from tests.data_shards.packed import make_split
from tests.data_shards.servers import serving
from tests.data_shards.test_loader import contents
from tests.data_shards.videos import encode

CLIP = ClipConfig(num_segments=2, crop_size=24, short_side=32)
VIDEOS = {f"clip_{number:02d}": encode(4, width=40, height=32, seed=number) for number in range(14)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("packed") / "train", VIDEOS, samples_per_shard=5)


@pytest.fixture(scope="module")
def stream(manifest: Manifest) -> list[tuple[int, int, int, bytes]]:
    with make_loader(manifest, num_workers=0) as loader:
        return contents(loader.batches(0, 160))


@pytest.fixture
def quick_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_WINDOW_SECONDS", 0.2), ("_WINDOW_BATCHES", 4), ("_SETTLING_SECONDS", 0.05)):
        monkeypatch.setattr(f"data_shards.workers.tuning.{name}", value)
    monkeypatch.setattr("data_shards.workers.room.own_cores", lambda _local_world_size: 4)


def make_loader(manifest: Manifest, **config: object) -> ClipLoader:
    return ClipLoader(
        manifest, clip=CLIP, loader=LoaderConfig(**config), training=True, global_batch_clips=4, micro_batches=2
    )


def test_workers_that_come_and_go_do_not_change_the_stream(manifest, stream, monkeypatch):
    monkeypatch.setattr("data_shards.workers.room.own_cores", lambda _local_world_size: 4)
    sizes = random.Random(1)
    with make_loader(manifest) as loader:
        give_maker(loader, Slow)
        found = []
        for number, batch in enumerate(loader.batches(0, 160)):
            found += contents([batch])
            if number % 9 == 0:
                size = Size(sizes.randint(1, 4), sizes.randint(1, 8))
                loader._pool.resize(size.num_workers, loader._num_slabs(size))
                assert loader.num_workers == size.num_workers
        accounts = loader.accounts
        assert sum(account.num_batches for account in accounts) == 80
        assert all(account.end == "" for account in accounts)  # none has failed
        assert len(accounts) > 4
    assert found == stream


def test_auto_adds_workers_while_the_training_waits_and_removes_those_that_wait(
    manifest, stream, quick_decisions, caplog
):
    with make_loader(manifest) as loader, caplog.at_level(logging.INFO):
        give_maker(loader, Slow)
        assert contents(loader.batches(0, 160)) == stream
        assert loader.num_workers == 4
        for _ in loader.batches(0, 400):
            time.sleep(0.15)  # nearly four times as long as one worker needs for a batch
            if loader.num_workers == 1:
                break
        assert loader.num_workers == 1
    assert "loader: 2 -> " in caplog.text
    assert " -> 1 workers, " in caplog.text


def test_what_is_read_ahead_is_for_the_batch_after_this_one_too(tmp_path, manifest, stream):
    ahead = open_manifest(manifest.root, storage=StorageConfig(read_ahead="on"))
    with make_loader(ahead, num_workers=2) as loader:
        assert contents(loader.batches(0, 160)) == stream
        iterator = loader.batches(40, 160)
        assert contents([next(iterator)]) == stream[40:42]
        assert contents(loader.batches(80, 120)) == stream[80:120]
        rows = [account.tier_bytes["disk"] for account in loader.accounts]
        assert sum(rows) >= sum(int(manifest.samples["size"][sample]) for _, sample, *_ in stream)


def test_a_batch_of_a_stream_that_was_left_is_not_taken_for_one_of_the_next(manifest):
    with make_loader(manifest, num_workers=1) as loader:
        pool = loader._start_pool()
        try:
            pool._wanted = 0  # the test works in the worker's place
            pool._board.let_leave(0)
            while pool.accounts[0].ended is None:
                pool._collect_reports(0.1)
            pool._board.let_leave(0, False)
            pool.start_stream(Span(0, 8))
            claim = pool._board.take(0)
            pool.start_stream(Span(8, 16))
            reads, writes = multiprocessing.Pipe(duplex=False)
            account = new_account(0, 0, ())
            writes.send_bytes(pickle.dumps(Report(claim, Failure(RuntimeError, ("of the old stream",)))))
            pool._take_reports(_Running(pool._context.Process(), reads, account))
            assert pool._done == {}
            assert pool._board.take(0).slab == claim.slab
        finally:
            pool.close()
            reads.close()
            writes.close()


def test_workers_read_a_remote_set_over_the_network_once_and_then_from_the_cache(tmp_path, manifest, stream):
    pytest.importorskip("aiohttp", reason="reading over http needs aiohttp (pip install 'reelscale[http]')")
    with serving(manifest.root.parent) as server:
        config = StorageConfig(cache_folder=tmp_path / "cache", timeout_seconds=30.0)
        remote = open_manifest(f"{server.url}/{manifest.root.name}", storage=config)
        with make_loader(remote, num_workers=2) as loader:
            batches = list(loader.batches(0, 160))
            accounts = loader.accounts
    assert contents(batches) == stream
    read = {tier: sum(batch.costs[f"read_{tier}_bytes"] for batch in batches) for tier in ("disk", "cache", "remote")}
    assert read["disk"] == 0
    assert read["remote"] > 0
    assert read["cache"] > read["remote"]
    for tier, num_bytes in read.items():
        assert sum(account.tier_bytes[tier] for account in accounts) == num_bytes
