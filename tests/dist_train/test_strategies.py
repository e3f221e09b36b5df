"""Every strategy gives the gradient of the whole batch, whatever each rank's graph was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_train.batch_norm import apply_batch_norm_mode
from dist_train.collectives import Collectives
from dist_train.loop import train
from dist_train.phases import Phase
from dist_train.run import TrainingConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.strategies.base import BufferAverage
from dist_train.strategies.buckets import plan_buckets, usual_bucket_bytes
from dist_train.world import World
from tests.dist_train.toy import parameters_of, toy_run
from tests.ranks import run_ranks

SMALL_BUCKETS = 0.0005  # megabytes: several buckets even for a toy model


def _train_twenty_steps(world, folder, training, exchange):
    run = toy_run(world, Path(folder), training, exchange=exchange)
    train(run)
    return parameters_of(run)


@pytest.mark.parametrize("strategy", ["allreduce", "ddp"])
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


@pytest.mark.parametrize("strategy", ["allreduce", "ddp"])
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


def _second_backward_on_gradients_zeroed_in_place(world):
    model = _Branches().double()
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(bucket_megabytes=0.0001), Collectives(world))
    strategy.prepare([phase])
    found = []
    for step in range(3):
        phase.optimizer.zero_grad(set_to_none=False)
        with strategy.micro_batch(phase, synchronize=True):
            for _ in range(2 if step and world.rank == 1 else 1):
                strategy.backward(phase, model(_inputs(step, world.rank), [0, 1, 2]))
        strategy.finish(phase)
        found.append([p.grad.clone() for p in model.parameters()])
    return found


def test_gradients_zeroed_in_place_are_not_the_buffers_that_travel():
    ranks = run_ranks(_second_backward_on_gradients_zeroed_in_place, 2)
    for step in range(3):
        model = _Branches().double()
        for rank, times in enumerate((1, 2 if step else 1)):
            (model(_inputs(step, rank), [0, 1, 2]) * times / 2).backward()
        for rank in ranks:
            for parameter, gradient in zip(model.parameters(), rank[step], strict=True):
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


def _average_buffers(world):
    """Running means before and after an average, of a frozen layer and of one that moves."""
    layers = nn.ModuleList([nn.BatchNorm1d(1000).eval(), nn.BatchNorm1d(1)])
    layers[0].running_mean.copy_(torch.rand(1000, generator=torch.Generator().manual_seed(1)))
    layers[1].running_mean.fill_(world.rank)
    before = layers[0].running_mean.clone()
    phase = Phase(name="p", module=layers, optimizer=torch.optim.SGD(layers.parameters(), lr=0.1))
    average = BufferAverage([phase], Collectives(world))
    average.start()
    average.finish()
    return torch.equal(before, layers[0].running_mean), layers[1].running_mean.item()


def test_running_statistics_are_averaged_and_frozen_ones_keep_their_bits():
    assert run_ranks(_average_buffers, 3) == [(True, 1.0)] * 3


def _thaw_one_and_freeze_another(world):
    model = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    model[1].requires_grad_(False)
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(), Collectives(world))
    strategy.prepare([phase])
    model[0].requires_grad_(False)
    model[1].requires_grad_(True)
    with strategy.micro_batch(phase, synchronize=True):
        model[1](torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="became trainable after the strategy was prepared"):
        strategy.finish(phase)


def test_a_parameter_that_becomes_trainable_later_is_refused_though_another_is_frozen_for_it():
    run_ranks(_thaw_one_and_freeze_another, 2)


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


def _penalty_through_ddp(world, how, bucket_megabytes):
    """R1 through DDP: `how` says what is done about the last bias, which is not in the graph."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    before = [p.detach().clone() for p in model.parameters()]
    phase = Phase(
        name="d_reg", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), double_backward=True
    )
    strategy = make_strategy(ExchangeConfig(strategy="ddp", bucket_megabytes=bucket_megabytes), Collectives(world))
    (phase,) = strategy.prepare([phase])
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    share = inputs.chunk(world.world_size)[world.rank].requires_grad_()

    def one_step():
        with strategy.micro_batch(phase, synchronize=True):
            logits = phase.module(share)
            (slope,) = torch.autograd.grad(logits.sum(), share, create_graph=True)
            loss = slope.square().sum(1).mean()
            if how == "zero term" or (how == "one rank without" and world.rank == 0):
                loss = loss + 0 * logits.sum()
            if how == "unseen":
                loss.backward()
            else:
                strategy.backward(phase, loss)
        strategy.finish(phase)
        strategy.optimizer_step(phase)

    if how == "zero term":
        one_step()
        return [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError) as error:
        one_step()
    if how == "one rank without":  # rank 1 leaves, and rank 0, which waits for it, is told so by the transport
        dist.destroy_process_group()
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value), "a wrong gradient was used"
    return str(error.value)


@pytest.mark.parametrize("bucket_megabytes", [25.0, 0.0001])
@pytest.mark.parametrize("how", ["seen", "unseen", "one rank without"])
def test_ddp_stops_before_it_uses_gradients_that_it_has_not_averaged(how, bucket_megabytes):
    first, second = run_ranks(_penalty_through_ddp, 2, how, bucket_megabytes)
    assert "a parameter got no gradient on rank 1" in second
    assert "--exchange.strategy allreduce" in second
    if how != "one rank without":
        assert "a parameter got no gradient on rank 0" in first


def test_ddp_differentiates_twice_where_every_parameter_is_in_the_graph():
    (alone,) = run_ranks(_gradient_penalty, 1)
    for rank in run_ranks(_penalty_through_ddp, 2, "zero term", 25.0):
        assert rank[-1].eq(0).all()
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


@pytest.mark.parametrize(
    "num_bytes,most,expected",
    [
        pytest.param(97_000_000, 25_000_000, 24_250_000, id="four buckets"),
        pytest.param(400_000_000, 25_000_000, 25_000_000, id="more"),
        pytest.param(1_500_000, 25_000_000, 1_000_000, id="a megabyte at least"),
        pytest.param(1_500_000, 500, 500, id="as asked for"),
    ],
)
def test_a_small_model_is_exchanged_in_several_buckets_too(num_bytes, most, expected):
    assert usual_bucket_bytes(num_bytes, most, hides=True) == expected
    assert usual_bucket_bytes(num_bytes, most, hides=False) == most


@pytest.mark.parametrize("name,megabytes,words", [("horovod", 25.0, "allreduce, ddp"), ("ddp", 0.0, "positive")])
def test_a_wrong_strategy_names_what_there_is(name, megabytes, words):
    with pytest.raises(ValueError, match=words):
        make_strategy(ExchangeConfig(strategy=name, bucket_megabytes=megabytes), Collectives(World()))
