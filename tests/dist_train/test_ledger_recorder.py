"""The ledger's rows add up to the wall time, and a wait is split where the last rank arrived."""

from __future__ import annotations

import time

import pytest
import torch

from dist_train.collectives import Collectives
from dist_train.jsonlines import read_json_lines
from dist_train.ledger import RANK_ROWS, Ledger, NullLedger
from dist_train.ledger.clock import ClockOffset, ClockReading, HostClock, process_start_seconds
from tests.ranks import run_ranks


class SetClock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def stamp(self) -> float:
        return self.seconds

    now = stamp

    def resolve(self, stamps):
        return list(stamps)


class Others:
    """One other rank, which arrives at every collective at `moment`."""

    def __init__(self, moment: float) -> None:
        self.moment, self.told = moment, []

    def first_and_last(self, moments, channel):
        self.told += moments
        return [min(m, self.moment) for m in moments], [max(m, self.moment) for m in moments]


def launch(ledger, name="main bucket 0", **options):
    """An all-reduce of 4 kB over two ranks."""
    sizes = {"num_bytes": 4000, "sent_bytes": 4000.0, "num_ranks": 2}
    return ledger.launch(name, op="all_reduce", **{**sizes, **options})


def constant_offset(seconds):
    return ClockOffset(ClockReading(at=0.0, offset=seconds, uncertainty=0.0))


@pytest.fixture
def clock():
    return SetClock()


@pytest.fixture
def ledger(tmp_path, clock):
    ledger = Ledger(tmp_path / "rank_00000.jsonl", identity={"rank": 0}, clock=clock, started=0.0)
    yield ledger
    ledger.end("ok")


def _spend(ledger, clock, row, seconds, **options):
    with ledger.row(row, **options):
        clock.seconds += seconds


def test_rows_of_a_span_add_up_and_unclaimed_time_is_remainder(ledger, clock):
    clock.seconds = 2.0
    ledger.training_begins()
    _spend(ledger, clock, "forward", 3.0)
    clock.seconds += 0.5
    _spend(ledger, clock, "backward", 4.0)
    ledger.close_span("step", step=1, clips_seen=8)
    startup, step = ledger.flush()
    assert startup["seconds"] == {"startup": 2.0}
    assert step["seconds"] == {"forward": 3.0, "remainder": 0.5, "backward": 4.0}
    assert step["wall_seconds"] == sum(step["seconds"].values()) == 7.5


def test_an_inner_row_takes_its_time_from_the_outer_one(ledger, clock):
    ledger.training_begins()
    with ledger.row("forward"):
        clock.seconds += 1.0
        _spend(ledger, clock, "wire", 2.0)
        clock.seconds += 4.0
    ledger.close_span("step", step=1, clips_seen=8)
    assert ledger.flush()[-1]["seconds"] == {"forward": 5.0, "wire": 2.0}


def test_an_absorbing_row_keeps_all_its_time_and_ends_with_its_block(ledger, clock):
    ledger.training_begins()
    with ledger.row("evaluation", absorb=True):
        _spend(ledger, clock, "forward", 1.0)
        _spend(ledger, clock, "logging", 2.0, absorb=True)
        with ledger.waiting(launch(ledger)):
            clock.seconds += 3.0
    _spend(ledger, clock, "forward", 8.0)
    ledger.close_span("evaluation", step=1, clips_seen=8)
    assert ledger.flush(Others(3.0))[-1]["seconds"] == {
        "evaluation": 6.0,
        "forward": 8.0,
    }


@pytest.mark.parametrize(
    "last_start,peer,wire",
    [(0.5, None, 5.0), (4.0, 3.0, 2.0), (9.0, 5.0, None)],
    ids=["all started before", "a peer came 3 s late", "still missing when the wait ended"],
)
def test_a_wait_before_the_last_rank_started_is_wait_for_peer(ledger, clock, last_start, peer, wire):
    ledger.training_begins()
    flight = launch(ledger)
    _spend(ledger, clock, "backward", 1.0)
    with ledger.waiting(flight):
        clock.seconds += 5.0
    ledger.close_span("step", step=1, clips_seen=8)
    seconds = ledger.flush(Others(last_start))[-1]["seconds"]
    assert seconds.get("wait_for_peer") == peer
    assert seconds.get("wire", 0.0) == (wire or 0.0)
    assert sum(seconds.values()) == 6.0


def test_clock_offsets_are_taken_off_before_ranks_compare_their_starts(tmp_path, clock):
    ledger = Ledger(tmp_path / "r", identity={}, clock=clock, started=0.0, offset=constant_offset(100.0))
    clock.seconds = 101.0
    ledger.training_begins()
    with ledger.waiting(launch(ledger)):
        clock.seconds += 5.0
    ledger.close_span("step", step=1, clips_seen=8)
    others = Others(3.0)
    seconds = ledger.flush(others)[-1]["seconds"]
    assert others.told == [1.0]
    ledger.end("ok")
    assert seconds == {"wait_for_peer": 2.0, "wire": 3.0}


def test_time_after_the_last_span_belongs_to_the_next_flush(ledger, clock):
    ledger.training_begins()
    ledger.flush()
    with ledger.row("logging"):
        clock.seconds += 1.5
        assert ledger.flush() == []
    ledger.close_span("step", step=1, clips_seen=8)
    assert ledger.flush()[0]["seconds"] == {"logging": 1.5}


def test_what_a_rank_read_by_itself_moves_from_waiting_to_reading(ledger, clock):
    ledger.training_begins()
    _spend(ledger, clock, "loader_wait", 1.0)
    ledger.split_row("loader_wait", {"read": 0.25, "decode": 0.5})
    ledger.close_span("step", step=1, clips_seen=8)
    assert ledger.flush()[-1]["seconds"] == {"loader_wait": 0.25, "read": 0.25, "decode": 0.5}


def test_bytes_and_worker_costs_belong_to_the_span_in_which_they_were_added(ledger):
    ledger.training_begins()
    ledger.add_bytes("wire", 10)
    ledger.add_bytes("wire", 5)
    ledger.add_worker_costs({"decode": 0.5, "frames_used": 8})
    ledger.close_span("step", step=1, clips_seen=8)
    ledger.close_span("step", step=2, clips_seen=16)
    _, first, second = ledger.flush()
    assert first["bytes"] == {"wire": 15}
    assert first["workers"] == {"decode": 0.5, "frames_used": 8}
    assert "bytes" not in second
    assert "workers" not in second


def test_a_resumed_rank_goes_on_in_the_same_file_after_a_torn_line(tmp_path, clock):
    path = tmp_path / "rank_00000.jsonl"
    Ledger(path, identity={"attempt": 0}, clock=clock, started=0.0).end("error")
    with path.open("a") as file:
        file.write('{"kind":"span","na')
    Ledger(path, identity={"attempt": 1}, clock=clock, started=0.0).end("ok")
    kinds = [(line["kind"], line.get("attempt")) for line in read_json_lines(path)]
    assert [kind for kind in kinds if kind[0] == "start"] == [("start", 0), ("start", 1)]


def test_the_real_clock_covers_the_process_from_its_start(tmp_path):
    started = process_start_seconds()
    assert 0 < time.perf_counter() - started < 3600
    ledger = Ledger(tmp_path / "r", identity={}, clock=HostClock())
    ledger.training_begins()
    ledger.end("ok")
    *_, end = read_json_lines(tmp_path / "r")
    assert end["wall_seconds"] == pytest.approx(time.perf_counter() - started, abs=0.05)


def _straggle(world, folder):
    ledger = Ledger(folder / f"rank_{world.rank:05d}.jsonl", identity={"rank": world.rank})
    collectives = Collectives(world, ledger)
    collectives.barrier()
    ledger.training_begins()
    ledger.flush(collectives)
    if world.rank == 1:
        with ledger.row("loader_wait"):
            time.sleep(0.5)
    collectives.sum_(torch.ones(1000))
    ledger.close_span("step", step=1, clips_seen=2)
    span = ledger.flush(collectives)[-1]
    ledger.end("ok")
    return span


def test_a_real_straggler_shows_as_wait_for_peer_on_the_other_rank_only(tmp_path):
    early, late = run_ranks(_straggle, 2, tmp_path)
    assert early["seconds"]["wait_for_peer"] > 0.4
    assert late["seconds"].get("wait_for_peer", 0.0) < 0.1
    assert late["seconds"]["loader_wait"] >= 0.5
    assert early["bytes"]["wire"] == late["bytes"]["wire"] == 4000 + 16  # and the ledger's own exchange
    for span in (early, late):
        assert set(span["seconds"]) <= set(RANK_ROWS)
        assert sum(span["seconds"].values()) == pytest.approx(span["wall_seconds"], abs=1e-4)


def test_the_null_ledger_takes_every_call():
    ledger = NullLedger()
    with ledger.row("forward"), ledger.waiting(launch(ledger)):
        ledger.add_bytes("wire", 1)
    ledger.training_begins()
    ledger.close_span("step", step=1, clips_seen=1)
    assert ledger.flush() == []
