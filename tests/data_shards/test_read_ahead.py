"""Reading ahead: the same bytes as without it, before they are asked for, in bounded memory, no wait in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_shards.errors import DataError
from data_shards.storage import ReadAhead, ReadCosts, Reads

WAIT_SECONDS = 20.0


class SlowStorage:
    """Bytes that say where they are from; each read waits until the test lets it go."""

    def __init__(self, *, open_gate: bool = True) -> None:
        self.root = "nowhere"
        self.asked: list[tuple[str, list[tuple[int, int]]]] = []
        self.gate = threading.Event()
        self.error: Exception | None = None
        if open_gate:
            self.gate.set()

    def read(self, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes]:
        self.asked.append((name, list(ranges)))
        assert self.gate.wait(WAIT_SECONDS)
        if self.error is not None:
            raise self.error
        found = [content(name, offset, size) for offset, size in ranges]
        costs.add("remote", 0.001, sum(map(len, found)))
        return found

    def for_thread(self) -> SlowStorage:
        return self

    def close(self) -> None:
        pass


def content(name: str, offset: int, size: int) -> bytes:
    return bytes((offset + place + ord(name[0])) % 256 for place in range(size))


def once(*ranges: tuple[int, int]) -> Reads:
    yield list(ranges)


def eventually(condition) -> None:
    ends = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.002)


@pytest.fixture
def storage():
    made = SlowStorage()
    yield made
    made.gate.set()


@pytest.fixture
def ahead(storage):
    made = ReadAhead(storage, max_bytes=1000, num_threads=2)
    yield made
    made.close()
    eventually(lambda: not any(thread.name.startswith("read-ahead") for thread in threading.enumerate()))


def test_what_was_wanted_is_read_before_it_is_asked_for(storage, ahead):
    for number in range(3):
        ahead.want(number, "shard", once((100 * number, 10)))
    eventually(lambda: len(storage.asked) == 3)
    for number in range(3):
        held, costs = ahead.take(number), ReadCosts()
        assert held.parts([(100 * number, 10)], costs) == [content("shard", 100 * number, 10)]
        assert costs.num_bytes["remote"] == 10
    assert len(storage.asked) == 3


def test_what_comes_next_may_follow_from_what_was_read(storage, ahead):
    def table_then_frames() -> Reads:
        (table,) = yield [(0, 4)]
        yield [(table[1], 5), (table[3], 5)]

    ahead.want("a", "a", table_then_frames())
    table = content("a", 0, 4)
    eventually(lambda: len(storage.asked) == 2)
    held, costs = ahead.take("a"), ReadCosts()
    assert held.parts([(0, 4)], costs) == [table]
    assert held.parts([(table[3], 5), (table[1] + 1, 3)], costs) == [
        content("a", table[3], 5),
        content("a", table[1] + 1, 3),
    ]
    assert held.parts([(200, 1)], costs) is None
    assert costs.num_bytes["remote"] == 14


def test_asking_waits_for_a_thread_that_has_begun_and_the_wait_is_counted(storage, ahead):
    storage.gate.clear()
    ahead.want(0, "shard", once((0, 10)))
    eventually(lambda: storage.asked)
    threading.Timer(0.05, storage.gate.set).start()
    costs = ReadCosts()
    assert ahead.take(0).parts([(0, 10)], costs) == [content("shard", 0, 10)]
    assert costs.seconds["remote"] > 0.01


def test_whose_turn_comes_before_a_thread_has_begun_is_left_to_the_caller(storage, ahead):
    storage.gate.clear()
    for number in range(4):
        ahead.want(number, "shard", once((number, 1)))
    eventually(lambda: len(storage.asked) == 2)
    assert ahead.take(3) is None
    assert ahead.take(7) is None
    storage.gate.set()
    eventually(lambda: len(storage.asked) == 3)
    assert ("shard", [(3, 1)]) not in storage.asked


def test_memory_is_bounded_and_goes_on_as_it_is_taken(storage, ahead):
    for number in range(20):
        ahead.want(number, "shard", once((number, 400)))
    eventually(lambda: len(storage.asked) >= 3)
    time.sleep(0.05)
    assert len(storage.asked) <= 4  # three hold 1200 of 1000 bytes, and one more may have been begun before
    for number in range(20):
        held = ahead.take(number)
        assert held is None or held.parts([(number, 400)], ReadCosts()) == [content("shard", number, 400)]
        if number == 0:
            eventually(lambda: len(storage.asked) >= 4)


def test_one_sample_larger_than_the_bound_is_read_all_the_same(storage, ahead):
    ahead.want(0, "shard", once((0, 5000)))
    eventually(lambda: storage.asked)
    assert ahead.take(0).parts([(0, 5000)], ReadCosts()) == [content("shard", 0, 5000)]


def test_a_sample_wanted_twice_is_taken_twice_in_order(storage, ahead):
    ahead.want(0, "shard", once((0, 10)))
    ahead.want(0, "shard", once((50, 10)))
    eventually(lambda: len(storage.asked) == 2)
    assert ahead.take(0).parts([(0, 10)], ReadCosts()) is not None
    assert ahead.take(0).parts([(50, 10)], ReadCosts()) is not None
    assert ahead.take(0) is None


def test_an_error_is_raised_where_the_sample_is_asked_for(storage, ahead):
    storage.error = OSError(5, "the network is down")
    ahead.want(0, "shard", once((0, 10)))
    eventually(lambda: storage.asked)
    storage.error = None
    ahead.want(1, "shard", once((0, 10)))
    eventually(lambda: len(storage.asked) == 2)
    with pytest.raises(OSError, match="the network is down"):
        ahead.take(0).parts([(0, 10)], ReadCosts())
    assert ahead.take(1).parts([(0, 10)], ReadCosts()) is not None


def test_a_damaged_table_is_left_for_the_decoder_to_name(storage, ahead):
    def damaged() -> Reads:
        yield [(0, 4)]
        raise DataError("the table is damaged")

    ahead.want(0, "shard", damaged())
    eventually(lambda: storage.asked)
    held = ahead.take(0)
    assert held.parts([(0, 4)], ReadCosts()) == [content("shard", 0, 4)]
    assert held.parts([(100, 4)], ReadCosts()) is None


def test_forgotten_samples_free_their_memory(storage, ahead):
    for number in range(5):
        ahead.want(number, "shard", once((0, 900)))
    eventually(lambda: len(storage.asked) >= 2)
    ahead.forget()
    assert ahead.take(0) is None
    asked = len(storage.asked)
    ahead.want(9, "shard", once((0, 10)))
    eventually(lambda: len(storage.asked) > asked)
    assert ahead.take(9).parts([(0, 10)], ReadCosts()) is not None


def test_it_can_be_used_again_after_close(storage, ahead):
    ahead.want(0, "shard", once((0, 10)))
    ahead.close()
    ahead.want(1, "shard", once((0, 10)))
    eventually(lambda: storage.asked)
    assert ahead.take(1).parts([(0, 10)], ReadCosts()) is not None


def test_files_of_a_folder_are_opened_by_each_thread_for_itself(tmp_path: Path):
    from data_shards.storage import LocalStorage

    (tmp_path / "a").write_bytes(bytes(range(100)))
    ahead = ReadAhead(LocalStorage(tmp_path), max_bytes=1000, num_threads=3)
    for number in range(50):
        ahead.want(number, "a", once((number, 10)))
    for number in range(50):
        held = ahead.take(number)
        assert held is None or held.parts([(number, 10)], ReadCosts()) == [bytes(range(number, number + 10))]
    ahead.close()
