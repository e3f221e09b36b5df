"""Collectives in the ledger: bytes, arrivals, wire time, what is hidden; on sub-groups and channels; and bounded."""

from __future__ import annotations

import json
import time

import pytest
import torch

from dist_train.collectives import Collectives
from dist_train.jsonlines import read_json_lines
from dist_train.ledger import Ledger, recorder
from dist_train.ledger.bandwidth import bus_bytes, bus_factor, sent_bytes
from dist_train.ledger.flights import Blocked, Flight, summarize, wire_seconds
from dist_train.ledger.summary import read_ledger
from dist_train.loop import train
from dist_train.run import TrainingConfig
from dist_train.strategies import ExchangeConfig
from tests.dist_train.toy import ToyModel, toy_run
from tests.ranks import run_ranks


def landed(name="bucket 0", *, launched, first, last, finished, waited=None, ended=None, **options) -> Flight:
    """A flight whose times are known."""
    sizes = {"op": "all_reduce", "num_bytes": 100, "sent_bytes": 150.0, "num_ranks": 4, "channel": 0, "row": "backward"}
    flight = Flight(name, launched=launched, now=time.perf_counter, **{**sizes, **options})
    flight.first, flight.last, flight.finished, flight.waited, flight.ended = first, last, finished, waited, ended
    return flight


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("broadcast", 1.0), ("all_to_all", 0.75)],
)
def test_bus_factors_of_four_ranks_are_those_of_nccl_tests(op, factor):
    assert bus_factor(op, 4) == factor
    assert bus_factor(op, 1) == 0.0


def test_bytes_sent_are_what_was_measured_on_gloo():
    assert sent_bytes("all_reduce", 1000, 4, backend="gloo") == 1500
    assert sent_bytes("reduce_scatter", 1000, 4, backend="gloo") == 1500
    assert sent_bytes("reduce_scatter", 1000, 4, backend="nccl") == 750
    assert [sent_bytes("broadcast", 10, 4, backend="gloo", steps_from_root=p) for p in range(4)] == [20, 10, 0, 0]
    for num_ranks in range(2, 20):
        tree = [sent_bytes("broadcast", 1, num_ranks, backend="gloo", steps_from_root=p) for p in range(num_ranks)]
        assert sum(tree) == num_ranks - 1


def test_bus_bandwidth_of_several_stages_is_what_they_send():
    staged = {"op": "exchange", "ranks": 4, "bytes": 100, "sent": 130.0}
    plain = {"op": "all_reduce", "ranks": 4, "bytes": 100, "sent": 150.0}
    assert bus_bytes([staged, plain]) == 130 + 150


def test_blocked_time_between_two_moments():
    blocked = Blocked([(5.0, 6.0), (1.0, 3.0)])
    assert blocked.between(0.0, 10.0) == 3.0
    assert blocked.between(2.0, 5.5) == 1.5
    assert blocked.between(3.0, 5.0) == 0.0
    assert Blocked([]).between(0.0, 1.0) == 0.0


def test_a_collective_is_late_early_on_the_wire_and_hidden():
    first = landed(launched=1.0, first=0.5, last=3.0, finished=7.0, waited=2.0, ended=7.0)
    again = landed(launched=11.0, first=11.0, last=11.0, finished=12.0)
    entry = summarize([first, again], Blocked([(2.0, 7.0)]), {})["bucket 0"]
    assert (entry["count"], entry["bytes"], entry["sent"], entry["last"]) == (2, 200, 300.0, 1)
    assert entry["late"] == 0.5
    assert entry["early"] == 2.0
    assert entry["wire"] == 4.0 + 1.0
    assert entry["hidden"] == 1.0 + 1.0
    assert entry["peer"] == 1.0


def test_collectives_that_share_the_wire_are_counted_once():
    together = [landed(launched=0, first=0, last=begin, finished=end) for begin, end in ((0, 4), (1, 3), (6, 7))]
    assert wire_seconds(together) == 5.0


def _ledger(world, folder) -> Ledger:
    return Ledger(folder / f"rank_{world.rank:05d}.jsonl", identity={"rank": world.rank})


def _entries(ledger, collectives) -> dict:
    ledger.close_span("step", step=1, clips_seen=1)
    ledger.flush(collectives)
    return dict(ledger.communication)


def _arrivals(world, folder):
    ledger = _ledger(world, folder)
    collectives = Collectives(world, ledger)
    ledger.training_begins()
    collectives.barrier()
    tensor = torch.ones(100_000)
    if world.rank == 1:
        time.sleep(0.3)
    pending = collectives.start_sum_(tensor, name="bucket 0")
    time.sleep(0.5)  # computes
    pending.wait()
    return _entries(ledger, collectives)["bucket 0"]


def test_the_rank_that_comes_late_is_known_on_every_rank_and_time_behind_computing_is_hidden(tmp_path):
    early, late = run_ranks(_arrivals, 2, tmp_path)
    for entry in (early, late):
        assert (entry["op"], entry["ranks"], entry["count"]) == ("all_reduce", 2, 1)
        assert (entry["bytes"], entry["sent"]) == (400_000, 400_000)
        assert entry["hidden"] > 0.9 * (entry["early"] + entry["wire"])
        assert entry["peer"] == 0.0
    assert 0.25 < early["early"] == pytest.approx(late["late"])
    assert (early["last"], late["last"]) == (0, 1)
    assert early["late"] == late["early"] == 0.0


def _sub_groups(world, folder):
    ledger = _ledger(world, folder)
    collectives = Collectives(world, ledger)
    pair = [rank for rank in range(4) if rank // 2 == world.rank // 2]
    node, everyone = collectives.new_channel(pair), collectives.new_channel()
    ledger.training_begins()
    collectives.barrier()
    if world.rank == 3:
        time.sleep(0.3)
    part = torch.empty(1000)
    collectives.start_reduce_scatter(part, torch.ones(2000), channel=node, name="in the node").wait()
    order = ["a", "b"] if world.rank % 2 else ["b", "a"]  # between channels the order may differ
    tensors = {name: torch.full((8,), float(world.rank)) for name in order}
    channels = {"a": None, "b": everyone}
    pending = [collectives.start_mean_(tensors[name], channel=channels[name], name=name) for name in order]
    for one in pending:
        one.wait()
    whole = torch.empty(2000)
    collectives.start_all_gather(whole, part, channel=node, name="back").wait()
    entries = _entries(ledger, collectives)
    assert tensors["a"].tolist() == tensors["b"].tolist() == [1.5] * 8
    assert whole.tolist() == [2.0] * 2000
    return entries


def test_arrivals_on_a_sub_group_are_compared_with_its_own_members_only(tmp_path):
    entries = run_ranks(_sub_groups, 4, tmp_path)
    in_node = [found["in the node"] for found in entries]
    assert in_node[2]["early"] > 0.25
    assert in_node[3]["late"] == pytest.approx(in_node[2]["early"])
    assert in_node[0]["early"] + in_node[1]["early"] < 0.2
    assert [entry["ranks"] for entry in in_node] == [2] * 4
    assert in_node[0]["bytes"] == 8000
    assert in_node[0]["sent"] == 8000  # Gloo's reduce-scatter is an all-reduce
    for found in entries:
        assert found["a"]["ranks"] == found["b"]["ranks"] == 4
        assert found["back"]["sent"] == 4000
    assert entries[0]["a"]["early"] > 0.2  # rank 3 is late for everybody here


def _with_few(world, folder):
    recorder.MAX_FLIGHTS = 3
    ledger = _ledger(world, folder)
    collectives = Collectives(world, ledger)
    ledger.training_begins()
    for _ in range(50):
        collectives.sum_(torch.ones(10), name="many")
    entry = _entries(ledger, collectives)["many"]
    kept = len(ledger._flights)
    ledger.end("ok")
    return entry, kept, [line["kind"] for line in read_json_lines(folder / f"rank_{world.rank:05d}.jsonl")]


def test_memory_between_flushes_is_bounded_and_no_byte_is_lost(tmp_path):
    for entry, kept, kinds in run_ranks(_with_few, 2, tmp_path):
        assert (entry["count"], entry["bytes"], entry["sent"]) == (50, 2000, 2000.0)
        assert kept <= 3
        assert kinds.count("collectives") == 1


def _toy(world, folder, strategy):
    identity = {"attempt": 0, "rank": world.rank, "world_size": world.world_size, "host": "n1"}
    ledger = Ledger(folder / f"ledger/rank_{world.rank:05d}.jsonl", identity=identity)
    training = TrainingConfig(batch_clips=12, epochs=2, log_every_steps=4, evaluate_every_epochs=1)
    size = {} if strategy == "fsdp2" else {"bucket_megabytes": 0.0005}  # fsdp2 has no buckets
    exchange = ExchangeConfig(strategy=strategy, **size)
    train(toy_run(world, folder, training, exchange=exchange, ledger=ledger))
    ledger.end("ok")


@pytest.mark.parametrize("strategy", ["allreduce", "ddp", "fsdp2"])
def test_every_bucket_of_a_run_has_one_entry_for_each_interval(tmp_path, strategy):
    run_ranks(_toy, 2, tmp_path, strategy)
    num_bytes = sum(p.numel() * p.element_size() for p in ToyModel().parameters())
    for rank in read_ledger(tmp_path).last.ranks:
        lines = list(read_json_lines(tmp_path / f"ledger/rank_{rank.rank:05d}.jsonl"))
        intervals = [line for line in lines if line["kind"] == "collectives"]
        assert len(intervals) <= 4  # two of four steps, and the ends
        assert max(len(json.dumps(line)) for line in intervals) < 4000
        gradients = "bucket" if strategy != "fsdp2" else "reduce-scatter"
        buckets = [one for one in rank.communication.collectives if gradients in one.name]
        assert len(buckets) > (1 if strategy != "fsdp2" else 0)
        assert 8 * num_bytes <= sum(one.num_bytes for one in buckets) <= 8.5 * num_bytes  # with what is padded
        in_evaluation = [one for one in rank.communication.collectives if "(evaluation)" in one.name]
        assert all(not one.in_step for one in in_evaluation)
        gathered = any("all-gather" in one.name for one in in_evaluation)
        assert gathered == (strategy == "fsdp2")  # which gathers the weights there too
        for one in buckets:
            assert one.in_step
            assert one.wire_seconds > 0
            assert 0 <= one.hidden_share <= 1
            factor = 1.0 if strategy != "fsdp2" else 0.5
            assert one.bus_bandwidth == pytest.approx(factor * one.algorithm_bandwidth)  # of two ranks
            assert one.peer_seconds <= one.early_seconds + 1e-3
        assert rank.communication.cpu_seconds > 0
        assert rank.worst_span_gap[0] < 1e-4
