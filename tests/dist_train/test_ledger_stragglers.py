"""A rank that holds the others up is named with its cause, and nobody is on an even run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.accounts import standing
from dist_train.ledger import Ledger, host
from dist_train.ledger.host import HostCounters, group_interface, infiniband_counters, interface_counters
from dist_train.ledger.standings import straggler_of
from dist_train.ledger.stragglers import Standing, find_straggler, link_straggler, slow_link, steady
from dist_train.ledger.summary import read_ledger
from dist_train.loop import train
from dist_train.run import TrainingConfig
from tests.dist_train.toy import toy_run
from tests.ranks import run_ranks

EVEN = Standing(num_steps=10, forward=0.03, backward=0.06, optimizer=0.005, loader_wait=0.01, wire=0.01)
HOSTS = {rank: f"n{rank}" for rank in range(64)}


def _with_one_slow(num_ranks=4, slow=1, wait=0.05, **changes):
    """`slow` spends more (`changes` are added), the others wait for it."""
    own = dataclasses.replace(EVEN, **{name: getattr(EVEN, name) + value for name, value in changes.items()})
    waiting = dataclasses.replace(EVEN, wait_for_peer=wait)
    return {rank: own if rank == slow else waiting for rank in range(num_ranks)}


@pytest.mark.parametrize(
    ("changes", "cause", "said"),
    [
        ({"loader_wait": 0.05}, "loader", "its loader needs 50 ms more a step"),
        ({"loader_wait": 0.05, "worker_decode": 0.2}, "loader", "(decode in its workers)"),
        ({"read": 0.045, "loader_wait": 0.005}, "loader", "(read)"),
        ({"host_to_device": 0.05}, "transfer", "copies to the device for 50 ms"),
        ({"backward": 0.03, "forward": 0.02}, "device", "not for want of a core"),
        ({"backward": 0.05, "run_queue": 0.04}, "core", "40 ms of it waiting for a core"),
        ({"backward": 0.05, "gc": 0.045}, "garbage collector", "45 ms of it in Python's garbage collector"),
        ({"decode": 0.05, "run_queue": 0.04}, "core", "waiting for a core"),
        ({"bookkeeping": 0.05}, "bookkeeping", "outside loading and computing"),
    ],
)
def test_the_cause_is_what_the_rank_spends_most_more_on(changes, cause, said):
    found = find_straggler(_with_one_slow(**changes), HOSTS)
    assert found is not None
    assert (found.rank, found.host, found.cause) == (1, "n1", cause)
    assert said in found.sentence
    assert found.share == pytest.approx(0.05 / (EVEN.step_seconds + 0.05), rel=1e-6)


@pytest.mark.parametrize(
    "standings",
    [
        {0: EVEN},
        dict.fromkeys(range(4), EVEN),
        _with_one_slow(wait=0.005, loader_wait=0.005),  # 5 ms of 120 cost less than 5 %
        _with_one_slow(wait=0.05, loader_wait=0.01),  # what it spends more does not explain the wait
        dict.fromkeys(range(4), dataclasses.replace(EVEN, wait_for_peer=0.05)),  # late in turn
        {rank: dataclasses.replace(EVEN, loader_wait=0.5) for rank in range(4)},  # all of them are slow
        _with_one_slow(wait=0.05, loader_wait=0.05, wait_for_peer=0.03),  # it waits for the others as well
    ],
    ids=["alone", "even", "cheap", "unexplained", "in turn", "all slow", "waits too"],
)
def test_nobody_is_named_without_a_reason(standings):
    assert find_straggler(standings, HOSTS) is None


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_an_even_run_with_noise_names_nobody(num_ranks):
    """Each step's slowest rank is another: the others wait a quarter of a step, but for everybody in turn."""
    random = np.random.default_rng(num_ranks)
    stretches = []
    for _ in range(30):
        extra = random.exponential(0.02, (20, num_ranks))
        waits = (extra.max(axis=1, keepdims=True) - extra).mean(axis=0)
        stretch = {
            rank: dataclasses.replace(EVEN, loader_wait=float(extra[:, rank].mean()), wait_for_peer=float(waits[rank]))
            for rank in range(num_ranks)
        }
        stretches.append(find_straggler(stretch, HOSTS))
    for begin in range(len(stretches) - 2):
        assert steady(stretches[begin : begin + 3], at_least=3) is None


def test_steady_asks_for_the_same_rank_and_cause():
    slow = find_straggler(_with_one_slow(loader_wait=0.05), HOSTS)
    other = find_straggler(_with_one_slow(slow=2, loader_wait=0.05), HOSTS)
    assert steady([slow, None, slow], at_least=3) is None
    assert steady([slow, other, slow], at_least=3) is None
    assert steady([slow, other, slow], at_least=2) == slow
    assert steady([], at_least=0) is None


def test_a_rank_that_logs_for_long_while_the_others_wait_is_named():
    standings = {rank: Standing(all_seconds=10.0, logging_peer=0.0 if rank == 0 else 2.0) for rank in range(3)}
    found = find_straggler(standings, HOSTS)
    assert found is not None
    assert (found.rank, found.cause, found.share) == (0, "logging", 0.2)


def _pairs(num_nodes, slow=(), *, both=True):
    """Seconds between nodes one and two apart; those from (and to) `slow` take ten times as long."""
    random = np.random.default_rng(num_nodes)
    shifts = [shift for shift in (1, 2) if shift < num_nodes]
    pairs = [(node, (node + shift) % num_nodes) for node in range(num_nodes) for shift in shifts]
    return {
        (a, b): (10 if a in slow or (both and b in slow) else 1) * 1e-3 * (1 + 0.5 * random.random()) for a, b in pairs
    }


@pytest.mark.parametrize(("num_nodes", "both"), [(3, True), (4, True), (4, False), (16, True), (192, False)])
def test_the_link_common_to_the_slow_pairs_is_the_culprit(num_nodes, both):
    found = slow_link(_pairs(num_nodes, {2}, both=both))
    assert found is not None
    assert found[0] == (2,)
    assert found[1] == pytest.approx(10, rel=0.5)


def test_even_links_name_nobody_and_two_slow_nodes_are_not_one():
    assert all(slow_link(_pairs(num_nodes)) is None for num_nodes in (2, 3, 4, 16))
    assert slow_link(_pairs(16, {2, 9})) is None
    assert slow_link({}) is None


def test_of_two_nodes_only_the_direction_can_be_told():
    assert slow_link({(0, 1): 1e-3, (1, 0): 8e-3}) == ((1, 0), pytest.approx(8))
    assert slow_link({(0, 1): 8e-3, (1, 0): 8e-3}) is None


def test_a_slow_link_counts_only_where_the_wire_costs_time():
    pairs, leaders = _pairs(4, {2}), [0, 8, 16, 24]
    busy = {rank: dataclasses.replace(EVEN, wire=0.05) for rank in range(32)}
    idle = {rank: dataclasses.replace(EVEN, wire=0.001) for rank in range(32)}
    found = link_straggler(pairs, busy, leaders, HOSTS)
    assert found is not None
    assert (found.rank, found.host, found.cause) == (16, "n16", "link")
    assert "the link of n16 is" in found.sentence
    assert link_straggler(pairs, idle, leaders, HOSTS) is None
    assert link_straggler({}, busy, leaders, HOSTS) is None


def test_a_standing_travels_as_floats_and_comes_from_the_ledgers_lines():
    step = {"forward": 0.2, "wait_for_peer": 0.1, "logging": 0.05}
    spans = [{"name": "step", "seconds": step, "wall_seconds": 0.35, "workers": {"decode": 0.4}}] * 2
    spans.append({"name": "checkpoint", "seconds": {"checkpoint": 1.0}, "wall_seconds": 1.0})
    entries = {
        "main bucket 0": {"row": "backward", "early": 0.2, "wire": 0.3, "hidden": 0.1, "peer": 0.1},
        "checkpoint": {"row": "checkpoint", "early": 0.7, "wire": 0.1, "peer": 0.6},
    }
    found = standing(spans, entries, {"run_queue": 0.02, "gc": 0.01})
    assert Standing.from_floats(found.floats()) == found
    assert (found.num_steps, found.forward, found.bookkeeping, found.worker_decode) == (2, 0.2, 0.05, 0.4)
    assert (found.checkpoint_peer, found.in_flight, found.hidden) == (0.6, 0.5, 0.1)
    assert (found.run_queue, found.gc) == (0.01, 0.005)
    assert found.all_seconds == pytest.approx(1.7)


def test_the_host_counts_cpu_switches_collections_and_its_interfaces():
    counters = HostCounters(interface="lo")
    assert "lo" in interface_counters()
    begun = time.process_time()
    while time.process_time() - begun < 0.05:
        pass
    import gc

    gc.collect()
    counts = counters.since_last()
    counters.close()
    assert counts["cpu"] >= 0.04
    assert counts["gc"] > 0
    assert counts["run_queue"] >= 0
    assert counts["interface"]["name"] == "lo"
    assert set(counts["interface"]) == {"name", "tx_bytes", "rx_bytes", "tx_packets", "rx_packets"}
    assert counters._on_collection not in gc.callbacks


def test_infiniband_ports_are_counted_in_words_of_four_bytes(tmp_path):
    for port, words in (("1", 100), ("2", 50)):
        folder = tmp_path / f"mlx5_0/ports/{port}/counters"
        folder.mkdir(parents=True)
        (folder / "port_xmit_data").write_text(f"{words}\n")
        (folder / "port_rcv_data").write_text("1\n")
    assert infiniband_counters(tmp_path) == {"tx_bytes": 600, "rx_bytes": 8}
    assert infiniband_counters(tmp_path / "none") == {"tx_bytes": 0, "rx_bytes": 0}


def test_a_port_without_counters_counts_nothing_and_stops_nothing(tmp_path):
    counters = tmp_path / "mlx5_2" / "ports" / "1" / "counters"
    (counters / "port_rcv_data").mkdir(parents=True)  # cannot be read, as a virtual function's
    (counters / "port_xmit_data").write_text("N/A (no PMA)\n")
    assert infiniband_counters(tmp_path) == {"tx_bytes": 0, "rx_bytes": 0}


@pytest.mark.parametrize(
    ("gloo", "nccl", "expected"),
    [
        ("eth1", "", "eth1"),
        ("", "=eth1", "eth1"),
        ("", "ib", "ib0"),
        ("", "^eth10,eth1", "ib0"),
        ("wlan", "ib0", None),
    ],
)
def test_the_interface_that_is_counted_is_the_one_in_use(monkeypatch, gloo, nccl, expected):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    monkeypatch.setattr("socket.if_nameindex", lambda: [(1, "lo"), (2, "eth10"), (3, "eth1"), (4, "ib0")])
    monkeypatch.setattr("socket.gethostbyname", lambda _: "10.0.0.1")
    monkeypatch.setattr(host, "_address", lambda name: "10.0.0.1" if name == "ib0" else None)
    assert group_interface() == expected


class _SlowLoader:
    """Sleeps before each batch."""

    def __init__(self, inner, seconds: float) -> None:
        self._inner, self._seconds, self.num_samples = inner, seconds, inner.num_samples

    def batches(self, start: int, stop: int):
        for batch in self._inner.batches(start, stop):
            time.sleep(self._seconds)
            yield batch

    def evaluation_batches(self):
        return self._inner.evaluation_batches()


class _Kept:
    def __init__(self) -> None:
        self.stragglers: list[dict] = []
        self.communication: list[dict] = []

    def log(self, metrics) -> None:
        if "straggler" in metrics:
            self.stragglers.append(metrics["straggler"])
            self.communication.append(metrics["comm"])


def _toy(world, folder: Path, slow: str):
    identity = {"attempt": 0, "rank": world.rank, "world_size": world.world_size, "host": f"n{world.rank}"}
    ledger = Ledger(folder / f"ledger/rank_{world.rank:05d}.jsonl", identity=identity)
    epochs = 5 if slow == "loader" else 4
    training = TrainingConfig(batch_clips=12, epochs=epochs, log_every_steps=4, evaluate_every_epochs=0)
    kept, hogs = _Kept(), []
    run = toy_run(world, folder, training, ledger=ledger, monitors=(kept,))
    if slow == "loader" and world.rank == 1:
        run = dataclasses.replace(run, loader=_SlowLoader(run.loader, 0.15))
    if slow == "core":
        model, cores = run.task.phases[0].module, sorted(os.sched_getaffinity(0))
        model.register_forward_pre_hook(
            lambda *_: [torch.ones(300, 300) @ torch.ones(300, 300) for _ in range(10)] and None
        )
        if world.rank == 1:
            os.sched_setaffinity(0, {cores[-1]})  # its children inherit it
            hogs = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(4)]
            os.nice(4)  # against a machine that is busy on all cores anyway
    try:
        train(run)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    ledger.end("ok")
    return kept.stragglers, kept.communication


@pytest.mark.parametrize("cause", ["loader", "core"])
def test_a_real_slow_rank_is_named_live_and_afterwards(tmp_path, cause):
    if cause == "core" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: there is none to take from one rank only")
    (live, communication), *_ = run_ranks(_toy, 2, tmp_path, cause)
    found = straggler_of(read_ledger(tmp_path).last)
    assert found is not None
    assert (found.rank, found.host, found.cause) == (1, "n1", cause)
    named = [(one["rank"], one["cause"]) for one in live]
    assert named[:2] == [(-1, "none")] * 2  # three stretches make it sure
    assert (1, cause) in named or cause == "core"  # a core is stolen in bursts of the scheduler's choosing
    assert {rank for rank, _ in named} <= {-1, 1}
    assert set(communication[-1]) == {"busbw_gbit", "hidden_share", "wait_for_peer_seconds", "wire_seconds"}
