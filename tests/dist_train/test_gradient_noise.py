"""The noise scale's two norms are those of the ranks' own gradients and of their mean, phase by phase."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.collectives import Collectives
from dist_train.gradient_noise import GradientNoise
from dist_train.loop import train
from dist_train.phases import Phase
from dist_train.run import TrainingConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from tests.dist_train.toy import toy_run
from tests.ranks import run_ranks

CLIPS = 8  # the global batch: clip `i` has the gradient (i + 1, 0) in phase 0, and twice that in phase 1


def _phases() -> list[Phase]:
    modules = [nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]
    return [
        Phase(name=name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.0), interval=interval)
        for name, module, interval in zip(("one", "two"), modules, (1, 2), strict=True)
    ]


def _squares(world, exchange, micro_batches, steps=1):
    """What reached the meters: for each phase (small square, big square, small clips, big clips) of every step."""
    collectives = Collectives(world)
    phases = _phases()
    noise = GradientNoise(phases, collectives, every_steps=1, batch_clips=CLIPS, micro_batches=micro_batches)
    added = {phase.name: [] for phase in phases}
    for name, meter in noise._meters.items():
        meter.add = lambda *, _name=name, **values: added[_name].append(values)
    strategy = make_strategy(exchange, collectives)
    phases = strategy.prepare(phases)
    share = CLIPS // world.world_size // micro_batches
    for step in range(steps):
        for factor, phase in enumerate(phases, start=1):
            if step % phase.interval:
                continue
            phase.optimizer.zero_grad()
            noise.begins(phase, step, exchanges=strategy.exchanges)
            for number in range(micro_batches):
                first = (world.rank * micro_batches + number) * share
                with strategy.micro_batch(phase, synchronize=number == micro_batches - 1):
                    inputs = torch.tensor([[factor * (first + i + 1.0), 0.0] for i in range(share)])
                    strategy.backward(phase, phase.module(inputs).mean() / micro_batches)
                noise.micro_batch_done()
            strategy.finish(phase)
            noise.ends(phase)
            strategy.optimizer_step(phase)
    noise.at_log()
    noise.close()
    strategy.close()
    return added


def _means(parts: int) -> list[float]:
    size = CLIPS // parts
    return [sum(range(part * size + 1, (part + 1) * size + 1)) / size for part in range(parts)]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("strategy", ["allreduce", "ddp"])
def test_with_ranks_the_small_batch_is_a_ranks_share(strategy, micro_batches):
    found = run_ranks(_squares, 2, ExchangeConfig(strategy=strategy), micro_batches)
    small = sum(mean**2 for mean in _means(2)) / 2
    for factor, name in enumerate(("one", "two"), start=1):
        expected = {
            "small_square": pytest.approx(factor**2 * small, rel=1e-6),
            "big_square": pytest.approx((factor * 4.5) ** 2, rel=1e-6),
            "small_clips": 4,
            "big_clips": 8,
        }
        assert all(rank[name] == [expected] for rank in found)


def test_with_one_rank_it_is_the_first_micro_batch():
    (found,) = run_ranks(_squares, 1, ExchangeConfig(), 4)
    assert found["one"] == [
        {"small_square": pytest.approx(1.5**2), "big_square": pytest.approx(4.5**2), "small_clips": 2, "big_clips": 8}
    ]


def test_a_phase_is_measured_when_its_turn_comes():
    (found,) = run_ranks(_squares, 1, ExchangeConfig(), 2, 5)
    assert (len(found["one"]), len(found["two"])) == (5, 3)


def test_one_rank_with_one_micro_batch_has_nothing_to_compare():
    (found,) = run_ranks(_squares, 1, ExchangeConfig(), 1)
    assert found == {"one": [], "two": []}


class _Kept(list):
    log = list.append


def _logged(world, folder, exchange):
    kept = _Kept()
    training = TrainingConfig(batch_clips=12, epochs=4, log_every_steps=2, noise_scale_every_steps=1)
    train(
        replace(
            toy_run(world, Path(folder), training, monitors=(kept,)),
            strategy=make_strategy(exchange, Collectives(world)),
        )
    )
    return [line["noise_scale"] for line in kept if "noise_scale" in line]


def test_a_run_logs_it_and_ranks_agree(tmp_path):
    first, second = run_ranks(_logged, 2, tmp_path, ExchangeConfig())
    (last,) = first[-1].values()
    assert last["num_steps"] >= 2
    assert 0 <= last["low"] <= (last["clips"] or 1e9)
    assert second == []


@pytest.mark.parametrize("exchange", [ExchangeConfig(strategy="fsdp2"), ExchangeConfig(reduction="adasum")])
def test_where_a_rank_does_not_hold_the_mean_nothing_is_measured(tmp_path, exchange):
    assert run_ranks(_logged, 2, tmp_path, exchange) == [[], []]
