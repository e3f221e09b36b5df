"""The loop: a resumed run is the undisturbed run, evaluation is exact, and a stop is agreed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint import CheckpointConfig, load_latest
from dist_train.collectives import Collectives
from dist_train.journal import Journal, certify
from dist_train.ledger import Ledger
from dist_train.loop import train
from dist_train.optimizers import OptimizerConfig, make_optimizer
from dist_train.run import TrainingConfig, step_seed, steps_left
from dist_train.strategies import ExchangeConfig
from dist_train.tasks.video_classification import VideoClassification
from dist_train.world import World
from tests.dist_train.toy import NUM_SAMPLES, only_phase, parameters_of, toy_run
from tests.ranks import run_ranks

TRAINING = TrainingConfig(
    batch_clips=12, epochs=3, ema_half_life_clips=24, evaluate_every_epochs=1, log_every_steps=2, clip_gradient_norm=5.0
)


class FailAt(RuntimeError):
    """Injected at a step."""


class Metrics(list):
    """A monitor that keeps what it is told."""

    def log(self, metrics):
        json.dumps(metrics)  # a monitor may write JSON
        self.append(metrics)


def _train(world, folder, training, *, fail_at=None, attempt=0):
    """Trains, from the newest checkpoint when `attempt` > 0; returns the final state, or None after a failure."""

    def fail(step):
        if step == fail_at:
            raise FailAt

    start = load_latest(Path(folder), collectives=Collectives(world)) if attempt else None
    journal = Journal(
        Path(folder), rank=world.rank, attempt=attempt, start=start.clips_seen if start is not None else 0
    )
    metrics = Metrics()
    run = toy_run(
        world,
        Path(folder),
        training,
        checkpoint=CheckpointConfig(every_epochs=0.5),
        journal=journal,
        attempt=attempt,
        on_step=fail,
        monitors=(metrics,),
    )
    try:
        outcome = train(run, start)
    except FailAt:
        journal.close()
        return None
    journal.close()
    momentum = [value["momentum_buffer"] for value in only_phase(run).optimizer.state_dict()["state"].values()]
    return parameters_of(run), momentum, outcome, list(metrics)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("fail_at", [5, pytest.param(7, marks=pytest.mark.thorough)])
def test_a_run_killed_in_mid_epoch_and_resumed_ends_in_the_same_bits(tmp_path, world_size, fail_at):
    undisturbed = run_ranks(_train, world_size, tmp_path / "a", TRAINING)
    assert run_ranks(_train_killed, world_size, tmp_path / "b", TRAINING, fail_at) == [None] * world_size
    resumed = run_ranks(_train_resumed, world_size, tmp_path / "b", TRAINING)
    for (expected, momentum, outcome, _), (found, found_momentum, found_outcome, _) in zip(
        undisturbed, resumed, strict=True
    ):
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name
        assert all(torch.equal(a, b) for a, b in zip(momentum, found_momentum, strict=True))
        assert outcome.evaluation == found_outcome.evaluation
    for folder in ("a", "b"):
        certificates = certify(tmp_path / folder, num_samples=NUM_SAMPLES, num_epochs=3)
        assert [epoch.exact for epoch in certificates] == [True] * 3, certificates


def _train_killed(world, folder, training, fail_at):
    return _train(world, folder, training, fail_at=fail_at)


def _train_resumed(world, folder, training):
    return _train(world, folder, training, attempt=1)


@pytest.mark.parametrize("before,after", [(1, 2), (2, 3), pytest.param(3, 1, marks=pytest.mark.thorough)])
def test_resuming_on_another_number_of_ranks_keeps_the_samples_exact(tmp_path, before, after):
    training = TrainingConfig(batch_clips=12, epochs=3, batch_norm="synchronized", evaluate_every_epochs=0)
    (undisturbed, *_), *_ = run_ranks(_train, 1, tmp_path / "a", training)
    run_ranks(_train_killed, before, tmp_path / "b", training, 7)
    (resumed, *_), *_ = run_ranks(_train_resumed, after, tmp_path / "b", training)
    for name, value in undisturbed.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-5, msg=name)
    assert all(epoch.exact for epoch in certify(tmp_path / "b", num_samples=NUM_SAMPLES, num_epochs=3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_counts_every_sample_once_at_any_world_size(tmp_path, world_size):
    training = TrainingConfig(batch_clips=30, epochs=0.1, batch_norm="frozen")
    results = run_ranks(_train, world_size, tmp_path, training)
    alone = run_ranks(_train, 1, tmp_path / "alone", training)[0]
    assert alone[2].evaluation["num_samples"] == NUM_SAMPLES - 1
    for _, _, outcome, _ in results:
        assert outcome.evaluation == pytest.approx(alone[2].evaluation, abs=1e-6)
    predictions = results[0][2].predictions
    assert [row.sample_id for row in predictions] == list(range(NUM_SAMPLES - 1))
    assert all(not outcome.predictions for _, _, outcome, _ in results[1:])


def test_a_resumed_run_takes_its_options_from_the_command_not_from_the_checkpoint(tmp_path):
    train(toy_run(World(), tmp_path, TRAINING))
    run = toy_run(World(), tmp_path, replace(TRAINING, epochs=4))
    for group in only_phase(run).optimizer.param_groups:
        group.update(initial_lr=0.001, weight_decay=0.25)
    train(run, load_latest(tmp_path, collectives=Collectives(World())))
    for group in only_phase(run).optimizer.param_groups:
        assert (group["initial_lr"], group["weight_decay"]) == (0.001, 0.25)
        assert group["lr"] <= 0.001


def test_a_checkpoint_with_other_groups_of_parameters_is_told_in_one_line(tmp_path):
    train(toy_run(World(), tmp_path, TRAINING))
    run = toy_run(World(), tmp_path, replace(TRAINING, epochs=4))
    model = only_phase(run).module
    decayed = make_optimizer(OptimizerConfig(decay_norm_and_bias=True), model, learning_rate=0.05)
    run = replace(run, task=VideoClassification(model, decayed))
    with pytest.raises(ValueError, match=r"groups of \[2, 4\] parameters, and this run's of \[6\]: resume with"):
        train(run, load_latest(tmp_path, collectives=Collectives(World())))


@pytest.mark.parametrize("values,words", [({"precise_batch_norm_clips": 8, "batch_norm": "frozen"}, "use 0")])
def test_options_that_would_do_nothing_together_are_told(values, words):
    (problem,) = TrainingConfig(**values).problems()
    assert words in problem


def test_a_diverged_model_is_not_saved(tmp_path):
    run = toy_run(
        World(),
        tmp_path,
        TrainingConfig(batch_clips=12, epochs=4, log_every_steps=1000),
        checkpoint=CheckpointConfig(every_epochs=1),
        on_step=lambda step: only_phase(run).module.fc.weight.data.fill_(math.nan) if step == 6 else None,
    )
    with pytest.raises(RuntimeError, match="diverged"):
        train(run)
    assert load_latest(tmp_path, collectives=Collectives(World())).step == 4


def _stop_rank_one(world, folder):
    asked = []
    run = toy_run(
        world,
        Path(folder),
        TRAINING,
        on_step=lambda step: asked.append(step) if step == 3 and world.rank == 1 else None,
        stop_requested=lambda: bool(asked),
    )
    return train(run).step


def test_a_stop_asked_of_one_rank_ends_all_at_the_same_step_with_a_checkpoint(tmp_path):
    assert run_ranks(_stop_rank_one, 2, tmp_path) == [4, 4]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000004\n"


def test_the_loss_falls_and_metrics_say_where_the_run_stands(tmp_path):
    training = TrainingConfig(batch_clips=12, epochs=30, evaluate_every_epochs=10, label_smoothing=0.0)
    *_, metrics = _train(World(), tmp_path, training)
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert metrics[-1]["evaluation"]["top1"] > 0.8
    assert [row["clips_seen"] for row in metrics if "evaluation" in row] == [480, 960, 1440]
    assert metrics[0]["learning_rate"] > 0


def _train_with_ledger(world, folder, training, exchange):
    path = Path(folder) / "ledger" / f"rank_{world.rank:05d}.jsonl"
    ledger = Ledger(path, identity={"rank": world.rank})
    metrics = Metrics()
    train(toy_run(world, Path(folder), training, exchange=exchange, ledger=ledger, monitors=(metrics,)))
    ledger.end("ok")
    return [json.loads(line) for line in path.read_text().splitlines()], list(metrics)


@pytest.mark.parametrize("strategy", ["allreduce", "ddp"])
def test_the_ledger_of_a_run_closes_on_every_rank(tmp_path, strategy):
    training = TrainingConfig(batch_clips=12, epochs=4, log_every_steps=3)
    exchange = ExchangeConfig(strategy=strategy)
    for lines, metrics in run_ranks(_train_with_ledger, 2, tmp_path, training, exchange):
        spans = [line for line in lines if line["kind"] == "span"]
        assert [span["name"] for span in spans].count("step") == 16
        for span in spans:
            assert sum(span["seconds"].values()) == pytest.approx(span["wall_seconds"], abs=1e-4)
        total = sum(span["wall_seconds"] for span in spans)
        assert total == pytest.approx(lines[-1]["wall_seconds"], abs=0.02)
        steps = [span for span in spans if span["name"] == "step"]
        assert all(span["seconds"]["forward"] > 0 and span["seconds"]["backward"] > 0 for span in steps)
        assert any("wire" in span["seconds"] for span in steps)
        gradients = 4 * (3 * 8 * 9 + 8 + 16 + 8 * 3 + 3)
        assert all(span["bytes"]["wire"] >= gradients for span in steps)
        if metrics:
            assert metrics[0]["ledger"]["forward"] > 0


def test_a_diverged_loss_ends_the_run_with_advice(tmp_path):
    run = toy_run(World(), tmp_path, TrainingConfig(batch_clips=12, epochs=30))
    with torch.no_grad():
        only_phase(run).module.fc.weight[0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"diverged; lower optimizer\.base_learning_rate"):
        train(run)


def test_the_last_global_batch_is_full():
    assert steps_left(num_samples=100, epochs=1, batch_clips=32) == 4
    assert steps_left(num_samples=96, epochs=1.5, batch_clips=48) == 3
    assert steps_left(num_samples=10, epochs=0.1, batch_clips=10) == 1
    assert steps_left(num_samples=100, epochs=1, batch_clips=32, clips_seen=64) == 2
    assert steps_left(num_samples=100, epochs=1, batch_clips=32, clips_seen=128) == 0


def test_step_seeds_differ_between_runs_steps_and_ranks():
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(20)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**63 for seed in seeds)


def _train_precisely(world, folder):
    training = TrainingConfig(batch_clips=12, epochs=2, evaluate_every_epochs=1, precise_batch_norm_clips=20)
    run = toy_run(world, Path(folder), training)
    seen = []

    class Statistics:
        def batches(self, start, stop):
            seen.append((start, stop))
            yield from run.loader.batches(start, stop)

    train(replace(run, statistics_loader=Statistics()))
    plain = toy_run(world, Path(folder) / "plain", replace(training, precise_batch_norm_clips=0))
    train(plain)
    return seen, parameters_of(run), parameters_of(plain)


def test_precise_batch_norm_changes_the_statistics_and_nothing_else(tmp_path):
    first, second = run_ranks(_train_precisely, 2, tmp_path)
    for seen, precise, plain in (first, second):
        assert seen == [(48, 72), (96, 120)]  # whole global batches, from where the run stands
        assert not torch.equal(precise["norm.running_var"], plain["norm.running_var"])
        for name in ("conv.weight", "norm.weight", "fc.bias"):
            assert torch.equal(precise[name], plain[name])
    assert torch.equal(first[1]["norm.running_var"], second[1]["norm.running_var"])
