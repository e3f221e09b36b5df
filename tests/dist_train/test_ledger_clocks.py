"""Clocks of hosts are compared by ping-pong: offsets are within the stated uncertainty, and drift is followed."""

from __future__ import annotations

import dataclasses
import time

import pytest

from dist_train import accounts
from dist_train.clocks import Clocks
from dist_train.collectives import Collectives
from dist_train.ledger import Ledger
from dist_train.ledger.clock import ClockOffset, ClockReading, HostClock
from tests.ranks import run_ranks

OFFSETS = (0.0, 5.0, -1_234_567.8)  # hosts that started days apart


def _own_node(world):
    return dataclasses.replace(
        world, local_rank=0, local_world_size=1, node_rank=world.rank, num_nodes=world.world_size
    )


def _read(world):
    world = _own_node(world)
    offset = OFFSETS[world.rank]
    return Clocks(Collectives(world), now=lambda: time.perf_counter() + offset).read()


def test_offsets_of_hosts_are_found_within_the_stated_uncertainty():
    for offset, reading in zip(OFFSETS, run_ranks(_read, 3), strict=True):
        assert abs(reading.offset - offset) <= reading.uncertainty
        assert reading.uncertainty < 0.2


def _read_two_nodes_of_two(world):
    world = dataclasses.replace(
        world, local_rank=world.rank % 2, local_world_size=2, node_rank=world.rank // 2, num_nodes=2
    )
    offset = 7.0 * world.node_rank
    clocks = Clocks(Collectives(world), now=lambda: time.perf_counter() + offset)
    return clocks.leaders, clocks.read().offset


def test_one_rank_of_each_node_asks_and_all_of_the_node_know():
    for rank, (leaders, offset) in enumerate(run_ranks(_read_two_nodes_of_two, 4)):
        assert leaders == [0, 2]
        assert offset == pytest.approx(7.0 * (rank // 2), abs=0.2)


def test_a_node_alone_has_one_clock_and_asks_nobody():
    found = run_ranks(_read_on_one_node, 2)
    assert [(reading.offset, reading.uncertainty) for reading in found] == [(0.0, 0.0)] * 2


def _read_on_one_node(world):
    return Clocks(Collectives(world)).read()


def test_offset_without_a_reading_is_zero_and_with_one_constant():
    assert ClockOffset().at(100.0) == 0.0
    offset = ClockOffset(ClockReading(at=10.0, offset=0.5, uncertainty=1e-4))
    assert (offset.at(0.0), offset.at(1e6), offset.uncertainty) == (0.5, 0.5, 1e-4)


def test_drift_between_the_last_two_readings_is_followed():
    offset = ClockOffset(ClockReading(at=-60.0, offset=9.0, uncertainty=0.0))
    for at in (0.0, 60.0):
        offset.add(ClockReading(at=at, offset=1.0 + 2e-5 * at, uncertainty=1e-4))
    for moment in (0.0, 30.0, 60.0, 120.0):
        assert offset.at(moment) == pytest.approx(1.0 + 2e-5 * moment, abs=1e-12)


def test_readings_of_the_same_moment_make_no_drift():
    offset = ClockOffset(ClockReading(at=0.0, offset=1.0, uncertainty=0.0))
    offset.add(ClockReading(at=1e-3, offset=1.1, uncertainty=0.0))
    assert offset.at(1000.0) == 1.1


def _arrivals_with_wrong_clocks(world, folder):
    world = _own_node(world)
    clock = HostClock(lambda: time.perf_counter() + OFFSETS[world.rank])
    offset = ClockOffset(Clocks(Collectives(world), now=clock.now).read())
    ledger = Ledger(folder / f"{world.rank}", identity={}, clock=clock, started=clock.now(), offset=offset)
    collectives = Collectives(world, ledger)
    collectives.barrier()
    ledger.training_begins()
    if world.rank == 1:
        time.sleep(0.3)
    collectives.barrier(name="late")
    ledger.close_span("step", step=1, clips_seen=1)
    ledger.flush(collectives)
    return ledger.communication["late"]


def test_arrivals_of_hosts_with_different_clocks_are_comparable(tmp_path):
    first, late, third = run_ranks(_arrivals_with_wrong_clocks, 3, tmp_path)
    assert 0.2 < first["early"] < 0.6
    assert 0.2 < third["early"] < 0.6
    assert (first["last"], late["last"], third["last"]) == (0, 1, 0)
    assert 0.2 < first["peer"] < 0.6


def _named_once(world, folder):
    """The links seem slow at the start, twice in a row, and are not when they are timed again."""
    slow, even = {(0, 1): 1e-3, (1, 0): 8e-3}, {(0, 1): 1e-3, (1, 0): 1e-3}
    timings = [slow, slow, even]
    accounts.time_links = lambda *_: timings.pop(0)
    accounts.CLOCK_SECONDS = accounts.PROBE_PAUSE = 0.0
    world = _own_node(world)
    ledger = Ledger(folder / f"{world.rank}.jsonl", identity={"rank": world.rank})
    kept = accounts.Accounts(Collectives(world, ledger), ledger)
    span = {"name": "step", "seconds": {"forward": 0.1, "wire": 0.2}, "wall_seconds": 0.3}
    causes = [kept.at_log([span]).get("straggler", {}).get("cause") for _ in range(2)]
    before = kept._links
    kept.close()
    return causes, before == even, timings


def test_a_link_that_was_slow_at_the_start_is_timed_again_and_not_named_for_ever(tmp_path):
    first, second = run_ranks(_named_once, 2, tmp_path)
    assert first == (["none", "none"], True, [])
    assert second == ([None, None], True, [])
