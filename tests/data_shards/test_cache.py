"""The node's cache: what it gives back is right whatever happened to its files, and it keeps to its size."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from data_shards.storage import cache as cache_module
from data_shards.storage.cache import BLOCK_BYTES, BlockCache

GIGABYTE = 10**9
SEGMENT_BLOCKS = 256


def content_of(block: int, size: int = BLOCK_BYTES) -> bytes:
    return random.Random(block).randbytes(size)


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*/*.blocks"))


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache" / "set", max_bytes=GIGABYTE)


def test_blocks_come_back_and_others_are_not_there(cache: BlockCache):
    blocks = {number: content_of(number) for number in (0, 3, SEGMENT_BLOCKS - 1, SEGMENT_BLOCKS, 1000)}
    blocks[1001] = b"the file's end"
    cache.put("shard-000000.tar", blocks)
    cache.put("below/a", {0: b"other file"})
    assert cache.get("shard-000000.tar", range(1100)) == blocks
    assert cache.get("shard-000001.tar", range(10)) == {}
    assert cache.get("below/a", [0]) == {0: b"other file"}


def test_files_are_sparse(cache: BlockCache):
    cache.put("a", {200: content_of(200)})
    assert used_bytes(cache.folder.parent) < 3 * BLOCK_BYTES


@pytest.mark.parametrize("damage", ["content", "table", "cut", "empty", "zeros"])
def test_a_damaged_block_is_not_there_and_can_be_written_again(cache: BlockCache, damage: str):
    blocks = {number: content_of(number) for number in range(3)}
    cache.put("a", blocks)
    (path,) = cache.folder.glob("*.blocks")
    content = bytearray(path.read_bytes())
    if damage == "content":
        content[4096 + BLOCK_BYTES + 77] ^= 1
    elif damage == "table":
        content[8] ^= 1
    elif damage == "cut":
        del content[4096 + BLOCK_BYTES + 100 :]
    elif damage == "empty":
        content.clear()
    else:  # the power went after the table was on the disk, and before its block was
        content[4096 + BLOCK_BYTES : 4096 + 2 * BLOCK_BYTES] = bytes(BLOCK_BYTES)
    path.write_bytes(content)
    found = cache.get("a", range(3))
    assert 1 not in found
    assert found.items() <= blocks.items()
    cache.put("a", blocks)
    assert cache.get("a", range(3)) == blocks


def test_the_size_is_kept_and_what_the_set_has_stays(tmp_path: Path):
    room = 10 * BLOCK_BYTES
    cache = BlockCache(tmp_path / "cache" / "set", max_bytes=room)
    for number in range(40):
        cache.put("a", {number: content_of(number)})
        assert used_bytes(tmp_path / "cache") <= room
    (path,) = cache.folder.glob("*.blocks")
    os.utime(path, (time.time() - 7200,) * 2)  # not used for long, as in a long epoch
    BlockCache(cache.folder, max_bytes=room).put("b", {0: content_of(0)})
    found = cache.get("a", range(40))
    assert set(found) == set(range(len(found)))
    assert len(found) >= 8
    assert cache.get("b", [0]) == {}


def test_an_epoch_hits_the_share_that_is_cached_in_any_order(tmp_path: Path):
    num_blocks = 60
    cache = BlockCache(tmp_path / "cache" / "set", max_bytes=(num_blocks // 2) * (BLOCK_BYTES + 4096))
    hits = []
    for epoch in range(4):
        order = random.Random(epoch).sample(range(num_blocks), num_blocks)
        hits.append(0)
        for number in order:
            found = cache.get("a", [number])
            hits[-1] += len(found)
            if not found:
                cache.put("a", {number: content_of(number)})
    assert hits[0] == 0
    assert all(num_blocks * 0.4 <= hit <= num_blocks * 0.55 for hit in hits[1:]), hits


def test_other_sets_go_when_nobody_has_used_them_the_oldest_first(tmp_path: Path):
    room = 12 * BLOCK_BYTES
    for age_seconds, name in ((7200, "old"), (9000, "older"), (60, "in use")):
        other = BlockCache(tmp_path / "cache" / name, max_bytes=room)
        other.put("a", {number: content_of(number) for number in range(3)})
        (path,) = other.folder.glob("*.blocks")
        os.utime(path, (time.time() - age_seconds,) * 2)
    mine = BlockCache(tmp_path / "cache" / "set", max_bytes=room)
    mine.put("a", {number: content_of(number) for number in range(4)})
    left = {path.parent.name for path in (tmp_path / "cache").glob("*/*.blocks")}
    assert left == {"old", "in use", "set"}
    for number in range(4, 12):
        mine.put("a", {number: content_of(number)})
    left = {path.parent.name for path in (tmp_path / "cache").glob("*/*.blocks")}
    assert left == {"in use", "set"}
    assert used_bytes(tmp_path / "cache") <= room


def test_use_is_noted_so_that_a_set_that_is_read_is_not_evicted(cache: BlockCache):
    cache.put("a", {0: content_of(0)})
    (path,) = cache.folder.glob("*.blocks")
    os.utime(path, (time.time() - 7200,) * 2)
    cache.get("a", [0])
    assert time.time() - path.stat().st_mtime < 60


def test_an_account_that_is_wrong_is_made_right(tmp_path: Path):
    cache = BlockCache(tmp_path / "cache" / "set", max_bytes=GIGABYTE)
    (tmp_path / "cache" / "account").write_bytes((GIGABYTE - 1).to_bytes(8, "little"))
    cache.put("a", {0: b"kept"})
    assert cache.get("a", [0]) == {0: b"kept"}


def test_a_full_disk_turns_the_cache_off_with_one_warning(cache: BlockCache, monkeypatch, caplog):
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache.put("a", {0: b"kept"})
    monkeypatch.setattr(cache_module.os, "pwrite", no_space)
    with caplog.at_level(logging.WARNING):
        cache.put("a", {1: b"lost"})
        cache.put("a", {2: b"lost"})
    assert [record.getMessage() for record in caplog.records] == [
        f"the cache {cache.folder.parent} is off for this process: [Errno 28] No space left on device"
    ]
    assert cache.get("a", [0]) == {}


def _write_and_check(folder: Path, seed: int, seconds: float) -> None:
    """Put and get blocks at random; ends with exit code 1 at the first wrong byte."""
    cache = BlockCache(folder, max_bytes=40 * BLOCK_BYTES)
    generator, ends = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < ends:
        numbers = sorted(generator.sample(range(60), 4))
        found = cache.get("a", numbers)
        if any(found[number] != content_of(number) for number in found):
            os._exit(1)
        cache.put("a", {number: content_of(number) for number in numbers if number not in found})


def test_writers_at_once_and_writers_killed_leave_nothing_wrong(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "cache" / "set"
    seconds = (30.0, 30.0, 1.0)
    writers = [context.Process(target=_write_and_check, args=(folder, seed, seconds[seed])) for seed in range(3)]
    for writer in writers:
        writer.start()
    writers[2].join()
    for writer in writers[:2]:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    assert [writer.exitcode for writer in writers] == [-9, -9, 0]
    cache = BlockCache(folder, max_bytes=40 * BLOCK_BYTES)
    found = cache.get("a", range(60))
    assert found
    assert found == {number: content_of(number) for number in found}
    cache.put("b", {0: b"the lock is free"})
    assert used_bytes(tmp_path / "cache") <= 42 * BLOCK_BYTES
