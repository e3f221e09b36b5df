"""Accounts of communication between hosts with an address, an interface and a link of their own.

Each rank runs the engine in a network namespace; see `hosts`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess

import pytest
import torch
from torch import nn

from dist_train import accounts
from dist_train.ledger import Ledger
from dist_train.ledger.standings import straggler_of
from dist_train.ledger.summary import read_ledger
from dist_train.loop import train
from dist_train.optimizers import OptimizerConfig, make_optimizer
from dist_train.run import TrainingConfig
from dist_train.strategies import ExchangeConfig
from dist_train.tasks.video_classification import VideoClassification
from tests.cluster.hosts import Hosts, need_hosts
from tests.dist_train.toy import NUM_CLASSES, toy_run
from tests.ranks import run_ranks

HEADERS = 66  # bytes of a packet that are not TCP's payload: Ethernet 14, IP 20, TCP 20 and its time stamps 12


@pytest.fixture(autouse=True)
def hosts_can_be_made():
    need_hosts()


class LargeModel(nn.Module):
    """7.4 MB of parameters that cost little to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(384, 1024), nn.ReLU(), nn.Linear(1024, 1400), nn.Linear(1400, NUM_CLASSES)
        )

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return self.layers(clips.flatten(1).float())


class Kept:
    """Keeps metrics."""

    def __init__(self) -> None:
        self.records = []

    def log(self, metrics) -> None:
        self.records.append(metrics)


def _on_its_own_node(world):
    return dataclasses.replace(
        world, local_rank=0, local_world_size=1, node_rank=world.rank, num_nodes=world.world_size
    )


def _engine(world, folder, strategy, *, epochs=2, **hooks):
    world = _on_its_own_node(world)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    identity = {"attempt": 0, "rank": world.rank, "world_size": world.world_size, "host": f"h{world.rank + 1}"}
    ledger = Ledger(folder / f"ledger/rank_{world.rank:05d}.jsonl", identity=identity)
    kept = Kept()
    training = TrainingConfig(batch_clips=12, epochs=epochs, log_every_steps=3, evaluate_every_epochs=0)
    size = {} if strategy == "fsdp2" else {"bucket_megabytes": 2}  # fsdp2 has no buckets
    exchange = ExchangeConfig(strategy=strategy, **size)
    run = toy_run(world, folder, training, exchange=exchange, ledger=ledger, monitors=(kept,), **hooks)
    torch.manual_seed(0)
    model = LargeModel()
    run = dataclasses.replace(
        run, task=VideoClassification(model, make_optimizer(OptimizerConfig(), model, learning_rate=0.01))
    )
    train(run)
    ledger.end("ok")
    return kept.records


@pytest.mark.parametrize(
    ("num_ranks", "rate", "strategy"),
    [(4, None, "allreduce"), (2, "1gbit", "allreduce"), (4, "1gbit", "ddp")],
)
def test_bytes_sent_agree_with_the_interfaces_own_counters(tmp_path, num_ranks, rate, strategy):
    with Hosts(num_ranks, rate) as hosts:
        before = [host.tx_bytes() for host in hosts]
        run_ranks(_engine, num_ranks, tmp_path, strategy, enter=hosts.enter)
        sent = [host.tx_bytes() - start for host, start in zip(hosts, before, strict=True)]
    for rank in read_ledger(tmp_path).last.ranks:
        (counted,) = rank.communication.interfaces
        assert counted.name == "eth0"
        expected = rank.communication.sent_bytes + HEADERS * counted.tx_packets
        assert expected == pytest.approx(counted.tx_bytes, rel=0.03)
        assert counted.tx_bytes == pytest.approx(sent[rank.rank], rel=0.03)  # no part of the run went by uncounted


def _engine_with_a_link_that_slows_down(world, folder):
    """Rank 2's own queue is shaped after step 6: what it sends is slow, what it receives is not."""

    def on_step(step: int) -> None:
        if world.rank == 2 and step == 6:
            shape = ("tbf", "rate", "200mbit", "burst", "100kb", "latency", "50ms")
            subprocess.run(["tc", "qdisc", "replace", "dev", "eth0", "root", *shape], check=True)

    accounts.PROBE_PAUSE = 1.0
    return _engine(world, folder, "allreduce", epochs=3, on_step=on_step)


def test_a_link_that_is_slow_from_the_start_is_named(tmp_path):
    with Hosts(4) as hosts:
        hosts[1].set_rate("100mbit")
        records, *_ = run_ranks(_engine, 4, tmp_path, "allreduce", enter=hosts.enter)
    last = [record["straggler"] for record in records if "straggler" in record][-1]
    assert (last["rank"], last["cause"], last["host"]) == (1, "link", "h2")
    found = straggler_of(read_ledger(tmp_path).last)
    assert found is not None
    assert (found.rank, found.cause) == (1, "link")
    assert "the link of h2 is" in found.sentence


def test_a_link_that_becomes_slow_is_found_by_timing_the_links_again(tmp_path):
    with Hosts(4) as hosts:
        records, *_ = run_ranks(_engine_with_a_link_that_slows_down, 4, tmp_path, enter=hosts.enter)
    named = [record["straggler"] for record in records if "straggler" in record]
    assert named[0]["cause"] != "link"
    assert (named[-1]["rank"], named[-1]["cause"]) == (2, "link")
