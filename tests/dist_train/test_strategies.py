"""Every strategy gives the gradient of the whole batch, whatever each rank's graph was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.batch_norm import apply_batch_norm_mode
from dist_train.collectives import Collectives
from dist_train.loop import TrainingConfig, train
from dist_train.phases import Phase
from dist_train.strategies import STRATEGIES, ExchangeConfig, make_strategy
from dist_train.strategies.allreduce import plan_buckets
from dist_train.world import World
from tests.dist_train.toy import parameters_of, toy_run
from tests.ranks import run_ranks

SMALL_BUCKETS = 0.0005  # megabytes: several buckets even for a toy model


def _train_twenty_steps(world, folder, training, exchange):
    run = toy_run(world, Path(folder), training, exchange=exchange)
    train(run)
    return parameters_of(run)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("batch_norm", ["frozen", "synchronized"])
@pytest.mark.parametrize("world_size,micro_batches", [(2, 1), (2, 2), (3, 1)])
def test_twenty_steps_on_w_ranks_equal_one_process_with_the_whole_batch(
    tmp_path, strategy, batch_norm, world_size, micro_batches
):
    training = TrainingConfig(
        batch_clips=12,
        epochs=5,
        batch_norm=batch_norm,
        micro_batches=micro_batches if batch_norm == "frozen" else 1,
        evaluate_every_epochs=0,
    )
    exchange = ExchangeConfig(strategy=strategy, bucket_megabytes=SMALL_BUCKETS)
    alone = run_ranks(_train_twenty_steps, 1, tmp_path / "one", training, exchange)[0]
    ranks = run_ranks(_train_twenty_steps, world_size, tmp_path / "many", training, exchange)
    for name, expected in alone.items():
        torch.testing.assert_close(ranks[0][name], expected, rtol=0, atol=1e-5, msg=name)
        for other in ranks[1:]:
            assert torch.equal(ranks[0][name], other[name]), f"ranks differ in {name}"


def _train_local_norm(world, folder, strategy):
    run = toy_run(
        world, Path(folder), TrainingConfig(batch_clips=12, epochs=1), exchange=ExchangeConfig(strategy=strategy)
    )
    train(run)
    return parameters_of(run)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_local_batch_norm_keeps_running_statistics_equal_on_all_ranks(tmp_path, strategy):
    first, second = run_ranks(_train_local_norm, 2, tmp_path, strategy)
    assert first["norm.running_var"].std() > 0
    for name in first:
        assert torch.equal(first[name], second[name]), name


class _Branches(nn.Module):
    """Three branches, of which a step may use any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, inputs: torch.Tensor, used: list[int]) -> torch.Tensor:
        return sum(self.branches[number](inputs) for number in used).square().mean()


def _step_with_branches(world, steps):
    """Steps of `allreduce` in which each rank uses its own branches; the gradients after each step."""
    model = _Branches().double()
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(bucket_megabytes=0.0001), Collectives(world))
    (phase,) = strategy.prepare([phase])
    found = []
    for number, used_by_rank in enumerate(steps):
        phase.optimizer.zero_grad()
        with strategy.micro_batch(phase, synchronize=True):
            for used in used_by_rank[world.rank]:  # each a backward of its own
                model(_inputs(number, world.rank), used).backward()
        strategy.finish(phase)
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return found


def _inputs(step, rank):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([[[[0]], [[0]]]] * 2, id="a branch that no rank used keeps no gradient"),
        pytest.param(
            [[[[0, 1, 2]], [[0, 1, 2]]], [[[0]], [[1]]], [[[2]], [[0, 2]]]], id="ranks use different branches"
        ),
        pytest.param([[[[0, 1]], [[0, 1]]], [[[0, 1], [1, 2]], [[0, 1]]]], id="a second backward on one rank only"),
        pytest.param([[[[0, 1], [0, 2]], [[0, 1], [0, 2]]]] * 3, id="two backwards in every step"),
        pytest.param([[[[0, 1], [0, 2]], [[0, 1], [0, 2]]], [[[0, 1]], [[0]]]], id="fewer backwards than learnt"),
    ],
)
def test_allreduce_is_exact_when_ranks_have_different_graphs(steps):
    by_rank = run_ranks(_step_with_branches, 2, steps)
    for number, used_by_rank in enumerate(steps):
        model = _Branches().double()
        for rank, backwards in enumerate(used_by_rank):
            for used in backwards:
                (model(_inputs(number, rank), used) / 2).backward()
        for rank in range(2):
            for parameter, gradient in zip(model.parameters(), by_rank[rank][number], strict=True):
                assert (parameter.grad is None) == (gradient is None)
                if gradient is not None:
                    torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-15)


def _one_head_of_two(world):
    """Synchronised batch norm below, and above it a head that depends on the rank."""
    torch.manual_seed(4)
    collectives = Collectives(world)
    model = nn.ModuleDict(
        {"low": nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16)), "a": nn.Linear(16, 2), "b": nn.Linear(16, 2)}
    )
    apply_batch_norm_mode(model, "synchronized", collectives)
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(bucket_megabytes=0.00005), collectives)
    strategy.prepare([phase])
    for step in range(3):
        phase.optimizer.zero_grad()
        head = "ab"[world.rank] if step else "a"
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + world.rank))
        with strategy.micro_batch(phase, synchronize=True):
            model[head](model["low"](inputs)).square().mean().backward()
        strategy.finish(phase)
    return [p.grad.clone() for p in model.parameters()]


def test_ranks_with_different_heads_and_synchronised_batch_norm_below_do_not_mix_up_collectives():
    first, second = run_ranks(_one_head_of_two, 2)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0


def _gradient_penalty(world):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    phase = Phase(name="d_reg", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(bucket_megabytes=0.0001), Collectives(world))
    strategy.prepare([phase])
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    share = inputs.chunk(world.world_size)[world.rank].requires_grad_()
    with strategy.micro_batch(phase, synchronize=True):
        (slope,) = torch.autograd.grad(model(share).sum(), share, create_graph=True)
        slope.square().sum(1).mean().backward()
    strategy.finish(phase)
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_gradient_penalty_with_a_bias_outside_the_graph_is_exact():
    """R1: the last bias gets no gradient; DistributedDataParallel gives wrong gradients here without a word."""
    (alone,) = run_ranks(_gradient_penalty, 1)
    assert alone[-1] is None
    for rank in run_ranks(_gradient_penalty, 2):
        assert rank[-1] is None
        for expected, gradient in zip(alone[:-1], rank[:-1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_buckets_hold_every_parameter_once_and_only_one_dtype():
    sizes, dtypes = (
        [400, 300, 900, 200, 100],
        [torch.float32, torch.float16, torch.float32, torch.float32, torch.float16],
    )
    buckets = plan_buckets(sizes, dtypes, order=[4, 3, 2, 1, 0], bucket_bytes=600)
    assert sorted(index for bucket in buckets for index in bucket) == [0, 1, 2, 3, 4]
    for bucket in buckets:
        assert len({dtypes[index] for index in bucket}) == 1
        assert len(bucket) == 1 or sum(sizes[index] for index in bucket) <= 600
    assert buckets == [[4, 1], [3], [2], [0]]


@pytest.mark.parametrize("name,megabytes,words", [("horovod", 25.0, "allreduce, ddp"), ("ddp", 0.0, "positive")])
def test_a_wrong_strategy_names_what_there_is(name, megabytes, words):
    with pytest.raises(ValueError, match=words):
        make_strategy(ExchangeConfig(strategy=name, bucket_megabytes=megabytes), Collectives(World()))
