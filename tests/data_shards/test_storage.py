"""Arithmetic of ranges, pauses between attempts, and where bytes come from, without a server."""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.storage import LocalStorage, ReadCosts, StorageConfig, below, is_url, open_storage
from data_shards.storage.cache import BLOCK_BYTES, BlockCache
from data_shards.storage.ranges import Span, cut_ranges, merge_ranges, split_spans
from data_shards.storage.remote import RemoteStorage
from data_shards.storage.retries import Backoff, UselessAnswerError, retried

RANGES = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 80)), max_size=12)


@given(RANGES, st.integers(0, 40), st.integers(1, 60), st.integers(0, 600))
def test_merged_requests_give_every_range_as_the_file_has_it(ranges, gap, at_most, file_size):
    file = random.Random(0).randbytes(file_size)
    spans = split_spans(merge_ranges(ranges, gap=gap), at_most=at_most)
    pieces = [(span.start, file[span.start : span.stop]) for span in spans]
    assert cut_ranges(ranges, pieces) == [file[offset : offset + size] for offset, size in ranges]
    assert all(0 < span.stop - span.start <= at_most for span in spans)


@given(RANGES, st.integers(0, 40))
def test_no_request_holds_a_gap_longer_than_allowed_and_no_two_could_be_one(ranges, gap):
    spans = merge_ranges(ranges, gap=gap)
    wanted = {byte for offset, size in ranges for byte in range(offset, offset + size)}
    for span in spans:
        inside = sorted(wanted & set(range(*span)))
        assert (inside[0], inside[-1] + 1) == span
        assert all(after - before <= gap + 1 for before, after in pairwise(inside))
    assert all(after.start - before.stop > gap for before, after in pairwise(spans))


def test_near_ranges_are_one_request_and_far_ones_two():
    assert merge_ranges([(100, 10), (0, 10), (20, 10), (5, 2)], gap=10) == [Span(0, 30), Span(100, 110)]


@pytest.mark.parametrize("place", ["s3://bucket/set", "https://host/a b", "gs://b", "memory://x"])
def test_urls_are_told_from_folders(place):
    assert is_url(place)
    assert not is_url(place.replace("://", "/"))
    assert below(place + "/", "train") == below(place, "train") == place + "/train"


def test_a_folder_needs_no_network_package(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    storage, costs = open_storage(tmp_path), ReadCosts()
    assert isinstance(storage, LocalStorage)
    assert storage.read("a", [(8, 10), (0, 3)], costs) == [b"89", b"012"]
    assert costs.num_bytes == {"disk": 5, "cache": 0, "remote": 0}
    assert costs.total_seconds() == costs.seconds["disk"] > 0
    storage.close()


@given(st.lists(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 24)), max_size=4), min_size=2, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cache_that_holds_some_of_the_blocks_gives_the_bytes_of_the_file(tmp_path, reads):
    # Ranges in eighths of a block, so that they begin and end within blocks; another cache for each example.
    file, unit = random.Random(0).randbytes(100 * BLOCK_BYTES // 8 - 7), BLOCK_BYTES // 8
    (tmp_path / "file").write_bytes(file)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        cache = BlockCache(Path(folder) / "set", max_bytes=10**9)
        storage = RemoteStorage(f"file://{tmp_path}", StorageConfig(), cache=cache)
        for read in reads:
            ranges = [(offset * unit, size * unit) for offset, size in read]
            found = storage.read("file", ranges, ReadCosts())
            assert found == [file[offset : offset + size] for offset, size in ranges]


def test_blocks_of_the_cache_between_missing_ones_are_not_in_the_way(tmp_path):
    file = random.Random(0).randbytes(5 * BLOCK_BYTES)
    (tmp_path / "file").write_bytes(file)
    cache = BlockCache(tmp_path / "cache" / "set", max_bytes=10**9)
    storage = RemoteStorage(f"file://{tmp_path}", StorageConfig(), cache=cache)
    storage.read("file", [(BLOCK_BYTES, 10)], ReadCosts())
    ranges = [(0, 10), (BLOCK_BYTES + 10, 2 * BLOCK_BYTES)]
    assert storage.read("file", ranges, ReadCosts()) == [file[:10], file[BLOCK_BYTES + 10 : 3 * BLOCK_BYTES + 10]]


@pytest.mark.parametrize("field", ["cache_gigabytes", "timeout_seconds"])
def test_numbers_without_end_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} is inf, it must be a number above 0"):
        StorageConfig(**{field: float("inf")})


def test_threads_that_read_ahead_keep_few_of_many_shards_open(tmp_path):
    for number in range(40):
        (tmp_path / str(number)).write_bytes(b"content")
    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = [LocalStorage(tmp_path).for_thread() for _ in range(8)]
    for storage in threads:
        assert all(storage.read(str(number), [(0, 7)], ReadCosts()) == [b"content"] for number in range(40))
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 8 * 16
    for storage in threads:
        storage.close()


def test_every_wrong_number_of_the_configuration_is_named_at_once():
    with pytest.raises(ValueError, match=r"num_attempts is 0, .*timeout|timeout_seconds is -1.*num_attempts is 0"):
        StorageConfig(num_attempts=0, timeout_seconds=-1.0)


def test_pauses_grow_to_the_cap_are_drawn_and_repeat_with_the_seed():
    def pauses(seed: int) -> list[float]:
        backoff = Backoff(base_seconds=1.0, cap_seconds=5.0, generator=random.Random(seed))
        return [backoff.seconds(attempt) for attempt in (1, 2, 3, 4, 5, 1000)]

    assert pauses(3) == pauses(3) != pauses(4)
    many = [pauses(seed) for seed in range(300)]
    for number, most in enumerate((1.0, 2.0, 4.0, 5.0, 5.0, 5.0)):
        drawn = [row[number] for row in many]
        assert 0 <= min(drawn) < 0.1 * most
        assert 0.9 * most < max(drawn) <= most


def attempts(errors: list[Exception | None], *, num_attempts: int = 4) -> tuple[object, int]:
    """What `retried` gives for a request that fails so, and how often it was tried."""
    tried = 0

    async def request() -> str:
        nonlocal tried
        tried += 1
        error = errors[tried - 1]
        if error is not None:
            raise error
        return "content"

    async def run() -> object:
        backoff = Backoff(base_seconds=0.001, generator=random.Random(0))
        return await retried(
            request, num_attempts=num_attempts, timeout_seconds=5.0, backoff=backoff, slots=asyncio.Semaphore(1)
        )

    try:
        return asyncio.run(run()), tried
    except Exception as error:
        return error, tried


def test_errors_that_pass_are_tried_again():
    assert attempts([ConnectionResetError("gone"), TimeoutError(), None]) == ("content", 3)


def test_errors_that_stay_end_with_the_last_reason_and_the_number_of_attempts():
    error, tried = attempts([ConnectionResetError("reset by peer")] * 4)
    assert tried == 4
    assert isinstance(error, OSError)
    assert error.strerror.startswith("4 attempts in ")
    assert error.strerror.endswith("the last: ConnectionResetError: reset by peer")


def test_requests_that_wait_for_one_connection_fail_together_and_say_why():
    async def never() -> str:
        await asyncio.sleep(60)
        return "content"

    async def run() -> list[OSError]:
        backoff, slots = Backoff(base_seconds=0.05), asyncio.Semaphore(1)
        options = {"num_attempts": 2, "timeout_seconds": 0.1, "backoff": backoff, "slots": slots}
        return await asyncio.gather(*(retried(never, **options) for _ in range(20)), return_exceptions=True)

    first, *_, last = asyncio.run(run())
    assert re.fullmatch(r"[12] attempts in \d+\.\d s, the last: no answer( within 0\.1 s)?", first.strerror)
    assert re.fullmatch(r"no connection was free for \d+\.\d s, other requests wait for their answers", last.strerror)


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("denied"), UselessAnswerError("no ranges")])
def test_errors_that_cannot_pass_are_not_tried_again(error):
    found, tried = attempts([error])
    assert tried == 1
    assert isinstance(found, OSError)
    assert isinstance(found, type(error)) or isinstance(error, UselessAnswerError)


def test_a_mistake_in_our_code_is_not_taken_for_the_network():
    found, tried = attempts([KeyError("x")])
    assert (type(found), tried) == (KeyError, 1)
