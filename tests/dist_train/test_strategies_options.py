"""Whole runs with each option of the exchange: against one process, resumed, and with steps that ranks make alone.

What equals what, and to which tolerance, is in docs/strategies.md; the figures there are the ones asserted here.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.checkpoint import CheckpointConfig, read_checkpoint
from dist_train.collectives import Collectives
from dist_train.ledger import NullLedger
from dist_train.loop import train
from dist_train.optimizers import OptimizerConfig, make_optimizer, set_learning_rate
from dist_train.phases import Phase
from dist_train.run import TrainingConfig
from dist_train.schedules import ScheduleConfig, learning_rate_factor
from dist_train.strategies import ExchangeConfig, make_strategy, tuning
from dist_train.world import World
from tests.dist_train.toy import NUM_SAMPLES, ToyLoader, parameters_of, toy_batch, toy_run
from tests.ranks import run_ranks

SMALL = 0.0005  # megabytes: several buckets even for a toy model
TRAINING = TrainingConfig(batch_clips=12, epochs=5, batch_norm="frozen", evaluate_every_epochs=0)  # 20 steps

# Twenty steps of SGD at a rate of 0.05: largest difference of any parameter from one process with the whole batch.
TWENTY_STEPS = {
    "float32": (2, ExchangeConfig(bucket_megabytes=SMALL), 2e-6),
    "auto": (3, ExchangeConfig(bucket_megabytes="auto"), 2e-6),
    "hierarchical": (4, ExchangeConfig(bucket_megabytes=SMALL, hierarchical="on"), 2e-6),
    "fp16": (3, ExchangeConfig(bucket_megabytes=SMALL, compression="fp16"), 2e-4),
    "bf16": (3, ExchangeConfig(bucket_megabytes=SMALL, compression="bf16"), 2e-3),
    "hierarchical fp16": (4, ExchangeConfig(bucket_megabytes=SMALL, compression="fp16", hierarchical="on"), 2e-4),
    "powersgd of full rank": (2, ExchangeConfig(compression="powersgd", powersgd_rank=100), 2e-6),
}


def _as_two_nodes(world):
    return replace(world, num_nodes=2, node_rank=world.rank // 2, local_rank=world.rank % 2, local_world_size=2)


def _train(world, folder, training, exchange):
    if world.world_size > 1:
        tuning.CANDIDATE_MEGABYTES = (0.0003, 0.0006)  # and all in one: 4 steps each
    world = _as_two_nodes(world) if world.world_size == 4 else world
    run = toy_run(world, Path(folder), training, exchange=exchange)
    train(run)
    return parameters_of(run), run.strategy.figures()


@pytest.mark.parametrize("name", TWENTY_STEPS)
def test_twenty_steps_with_each_option_against_one_process(tmp_path, name):
    world_size, exchange, tolerance = TWENTY_STEPS[name]
    alone, _ = _train(World(), tmp_path / "one", TRAINING, ExchangeConfig())
    ranks = run_ranks(_train, world_size, tmp_path / "many", TRAINING, exchange)
    for parameter, expected in alone.items():
        torch.testing.assert_close(ranks[0][0][parameter], expected, rtol=0, atol=tolerance, msg=parameter)
        for other, _ in ranks[1:]:
            assert torch.equal(ranks[0][0][parameter], other[parameter]), f"ranks differ in {parameter}"
    assert all(figures == ranks[0][1] for _, figures in ranks)
    assert bool(ranks[0][1]) == (name == "auto")


SAME_BITS = {
    "one bucket": ExchangeConfig(),
    "many buckets": ExchangeConfig(bucket_megabytes=SMALL),
    "auto": ExchangeConfig(bucket_megabytes="auto"),
    "ddp": ExchangeConfig(strategy="ddp"),
}


def _train_each(world, folder, training, exchanges):
    return [_train(world, Path(folder) / name, training, exchange)[0] for name, exchange in exchanges.items()]


def test_two_ranks_have_the_bits_of_one_process_with_two_micro_batches(tmp_path):
    """Halving is exact and a sum of two has no order, so neither the plan nor who adds can be seen."""
    alone = replace(TRAINING, micro_batches=2)
    ((expected, _),) = run_ranks(_train, 1, tmp_path / "one", alone, ExchangeConfig())
    for rank in run_ranks(_train_each, 2, tmp_path / "many", TRAINING, SAME_BITS):
        for found in rank:
            for parameter, value in expected.items():
                assert torch.equal(found[parameter], value), parameter


# -- resumed -------------------------------------------------------------------------------------------------------

RESUMED = {
    "float32": ExchangeConfig(bucket_megabytes=SMALL),
    "fp16": ExchangeConfig(bucket_megabytes=SMALL, compression="fp16"),
    "powersgd": ExchangeConfig(bucket_megabytes=SMALL, compression="powersgd", powersgd_rank=1),
    "auto, saved while it tries": ExchangeConfig(bucket_megabytes="auto"),
    "local": ExchangeConfig(bucket_megabytes=SMALL, average_every_steps=3, local_after_epochs=1.0),
    "local ddp": ExchangeConfig(strategy="ddp", average_every_steps=3),
}


def _train_and_resume(world, folder, names):
    """The final parameters of a run of 4 epochs, and of one that starts from its checkpoint after 2, for each name."""
    found = {}
    training = replace(TRAINING, epochs=4, ema_half_life_clips=24, clip_gradient_norm=1.0, batch_norm="local")
    checkpoint = CheckpointConfig(every_epochs=2, keep=2)
    for name in names:
        tuning.CANDIDATE_MEGABYTES = (0.0003, 0.0006, 0.001)
        path = Path(folder) / name
        first = toy_run(world, path, training, exchange=RESUMED[name], checkpoint=checkpoint)
        train(first)
        tuning.CANDIDATE_MEGABYTES = (1.0,)  # what is measured anew would be seen
        again = toy_run(world, path / "again", training, exchange=RESUMED[name], checkpoint=checkpoint)
        train(again, read_checkpoint(path / "checkpoints" / "step_00000008"))
        found[name] = parameters_of(first), parameters_of(again), first.strategy.figures(), again.strategy.figures()
        for run in (first, again):
            run.strategy.close()
    return found


def test_a_resumed_run_is_the_undisturbed_run_bit_for_bit_whatever_the_exchange(tmp_path):
    ranks = run_ranks(_train_and_resume, 3, tmp_path, list(RESUMED))
    for name in RESUMED:
        for rank in ranks:
            undisturbed, resumed, figures, figures_again = rank[name]
            assert figures == figures_again
            assert bool(figures) == ("auto" in name)
            for parameter, value in undisturbed.items():
                assert torch.equal(value, resumed[parameter]), f"{name}: {parameter}"
                assert torch.equal(value, ranks[0][name][0][parameter]), f"{name}: ranks differ in {parameter}"


def _resume_elsewhere(world, folder):
    run = toy_run(world, Path(folder) / "again", TRAINING, exchange=RESUMED["powersgd"])
    train(run, read_checkpoint(Path(folder) / "powersgd" / "checkpoints" / "step_00000008"))
    return parameters_of(run)


def test_a_powersgd_run_resumes_on_another_number_of_ranks(tmp_path):
    run_ranks(_train_and_resume, 3, tmp_path, ["powersgd"])
    first, second = run_ranks(_resume_elsewhere, 2, tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _plans(world):
    """The plan learnt in a first step through the last branch; and that of a run which resumes, then uses another."""
    plans, state = [], None
    for branches in ([2, 1, 0], [0]):
        model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        strategy = make_strategy(ExchangeConfig(bucket_megabytes=0.0001), Collectives(world))
        strategy.prepare([phase])
        if state is not None:
            strategy.load_state([phase], state)
        with strategy.micro_batch(phase, synchronize=True):
            outputs = torch.ones(2, 4)
            for branch in branches:
                outputs = model[branch](outputs)
            strategy.backward(phase, outputs.sum())
        strategy.finish(phase)
        state = strategy.state([phase])
        plans.append((state["exchange"]["p"], [bucket.indices for bucket in strategy._exchanges["p"]._buckets]))
    return plans


def test_a_resumed_run_keeps_the_order_that_was_learnt_though_its_first_step_has_another():
    for first, second in run_ranks(_plans, 2):
        assert first == second
        assert set(first[0]["order"][:2]) == {0, 1}, "the branch used last has its gradients first"


# -- the size of the buckets ---------------------------------------------------------------------------------------


class _Script:
    """A clock that is read from a list of durations: a stamp at 0, the next at the duration."""

    def __init__(self, durations):
        self._stamps = [stamp for duration in durations for stamp in (0.0, duration)]

    def stamp(self):
        return self._stamps.pop(0)

    def resolve(self, stamps):
        return list(stamps)


def _tune(seconds, steps):
    """A tuner of 30 MB of gradients after `steps` steps, `seconds` for each candidate; and the sizes it used."""
    tuner = tuning.BucketTuner("p", 30_000_000, Collectives(World()))
    noise = [5.0, 0.1, 0.0, -0.1]  # a first step that does not count, and a median
    tuner._clock = _Script([base + more for base in seconds for more in noise])
    used = []
    for _ in range(steps):
        used.append(tuner.bucket_bytes)
        tuner.exchange_begins()
        tuner.exchange_ends()
    return tuner, used


def test_the_size_with_the_least_median_is_kept_and_logged_once(caplog):
    caplog.set_level(logging.INFO, "dist_train.strategies.tuning")
    tuner, used = _tune([5, 4, 2, 3, 6], steps=25)
    assert (
        used
        == [size for size in (1_000_000, 4_000_000, 10_000_000, 25_000_000, 30_000_000) for _ in range(4)]
        + [10_000_000] * 5
    )
    assert tuner.settled
    assert [record.message for record in caplog.records] == [
        "p: buckets of 10 MB (backward and exchange: 1 MB 5000.0 ms, 4 MB 4000.0 ms, 10 MB 2000.0 ms, "
        "25 MB 3000.0 ms, 30 MB 6000.0 ms)"
    ]


@pytest.mark.parametrize("steps,size", [(0, 25_000_000), (3, 25_000_000), (4, 1_000_000), (11, 4_000_000)])
def test_a_checkpoint_while_sizes_are_tried_ends_the_trying(steps, size):
    tuner, _ = _tune([5, 4, 2, 3, 6], steps)
    tuner.settle()
    assert (tuner.settled, tuner.bucket_bytes) == (True, size)
    assert not tuner.exchange_ends()


# -- post-local SGD ------------------------------------------------------------------------------------------------


class _CountsBytes(NullLedger):
    def __init__(self):
        self.wire = 0

    def launch(self, name, *, num_bytes, **_):
        self.wire += num_bytes


def _train_locally(world, folder, training, exchange):
    ledger = _CountsBytes()
    moved = []
    run = toy_run(
        world, Path(folder), training, exchange=exchange, ledger=ledger, on_step=lambda _: moved.append(ledger.wire)
    )
    train(run)
    return parameters_of(run), [after - before for before, after in itertools.pairwise(moved)]


def _post_local_sgd_slowly(folder, world_size, every, after_steps):
    """Copies side by side in one process: their gradients are averaged, and later they are."""
    worlds = [World(rank=rank, world_size=world_size) for rank in range(world_size)]
    copies = [toy_run(World(), folder, TRAINING) for _ in worlds]
    loaders = [ToyLoader(world, TRAINING).batches(0, 240) for world in worlds]
    phases = [copy.task.phases[0] for copy in copies]
    for phase in phases:
        phase.module.train()
        phase.module.norm.eval()
    alone = 0
    for step in range(20):
        factor = learning_rate_factor(
            ScheduleConfig(warmup_epochs=0.5),
            clips_seen=step * 12,
            clips_per_epoch=NUM_SAMPLES,
            total_clips=240,
            start_factor=0.1,
        )
        for copy, phase, loader in zip(copies, phases, loaders, strict=True):
            for group in phase.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            phase.optimizer.zero_grad()
            sum(copy.task.losses(phase, next(loader)).values()).backward()
        if step < after_steps:
            _make_equal([[p.grad for p in phase.parameters()] for phase in phases])
        for phase in phases:
            phase.optimizer.step()
        alone += step >= after_steps
        if alone == every or (step == 19 and alone):
            alone = 0
            _make_equal([[p.data for p in phase.parameters()] for phase in phases])
            _make_equal([[s["momentum_buffer"] for s in phase.optimizer.state.values()] for phase in phases])
    return parameters_of(copies[0])


def _make_equal(by_copy):
    for tensors in zip(*by_copy, strict=True):
        mean = torch.stack(list(tensors)).mean(0)
        for tensor in tensors:
            tensor.copy_(mean)


@pytest.mark.parametrize("strategy", ["allreduce", "ddp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_post_local_sgd_averages_copies_and_momentum_every_few_steps(tmp_path, world_size, strategy):
    exchange = ExchangeConfig(strategy=strategy, average_every_steps=3, local_after_epochs=1.0)
    expected = _post_local_sgd_slowly(tmp_path, world_size, every=3, after_steps=4)
    ranks = run_ranks(_train_locally, world_size, tmp_path, replace(TRAINING, log_every_steps=100), exchange)
    for parameters, moved in ranks:
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=0, atol=1e-5, msg=name)
            assert torch.equal(parameters[name], ranks[0][0][name])
        local = moved[3:]  # steps 5 to 20
        assert all((num_bytes > 0) == (number % 3 == 0) for number, num_bytes in enumerate(local, start=1))


def _local_steps_with_different_heads(world, optimizer):
    """Three local steps in which each rank uses its own head below spectral norm, an average, and one more of each."""
    torch.manual_seed(2)
    body = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = nn.ModuleDict({"body": body, "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    chosen = make_optimizer(
        OptimizerConfig(name=optimizer, momentum_correction=optimizer == "lars"), model, learning_rate=0.1
    )
    phase = Phase(name="p", module=model, optimizer=chosen)
    strategy = make_strategy(ExchangeConfig(average_every_steps=3), Collectives(world))
    strategy.prepare([phase])
    for step in range(4):
        strategy.step_begins(step)
        set_learning_rate(chosen, 1 / (1 + step))
        chosen.zero_grad()
        head = model["ab"[(world.rank + step // 3) % 2]]
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + world.rank))
        with strategy.micro_batch(phase, synchronize=True):
            strategy.backward(phase, head(model["body"](inputs)).square().mean())
        strategy.finish(phase)
        strategy.optimizer_step(phase)
        strategy.step_ends()
    state = strategy.state([phase])
    strategy.close()
    return state


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "lamb"])
def test_after_an_average_ranks_are_equal_in_everything_though_they_used_different_parameters(optimizer):
    first, second = run_ranks(_local_steps_with_different_heads, 2, optimizer)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# -- weights -------------------------------------------------------------------------------------------------------


class _SomeSkipped(ToyLoader):
    """Every fifth sample, and one whole batch, could not be read: weight 0; or such samples are not there at all."""

    def __init__(self, world, training, *, left_out):
        super().__init__(world, training)
        self._left_out = left_out

    def batches(self, start_position, stop_position):
        for batch in super().batches(start_position, stop_position):
            counts = (batch.sample_ids % 5 != 0) & (batch.positions // self._training.batch_clips != 3)
            if self._left_out and counts.any():
                yield toy_batch(batch.positions[counts], batch.sample_ids[counts])
            else:
                yield replace(batch, weights=counts.float())


def _train_with_skips(world, folder, training, left_out):
    run = toy_run(world, Path(folder), training)
    run = replace(run, loader=_SomeSkipped(world, training, left_out=left_out), weighted=not left_out)
    train(run)
    return parameters_of(run)


@pytest.mark.parametrize("world_size,micro_batches", [(1, 1), (2, 1), (3, 2)])
def test_the_mean_is_over_the_clips_that_count_on_all_ranks(tmp_path, world_size, micro_batches):
    expected = _train_with_skips(World(), tmp_path / "one", TRAINING, left_out=True)
    training = replace(TRAINING, micro_batches=micro_batches)
    for found in run_ranks(_train_with_skips, world_size, tmp_path / "many", training, False):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
