"""What the tests of the reductions share: the options, a model whose graph differs by rank, and what they give."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from dist_train.collectives import Collectives
from dist_train.phases import Phase
from dist_train.strategies import ExchangeConfig, make_strategy
from tests.dist_train.test_reduction_adasum import _tree

SMALL_BUCKETS = 0.0005  # megabytes

EXACT = {
    "average": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS),
    "sum": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, reduction="sum"),
    "hierarchical": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, hierarchical="on"),
    "hierarchical sum": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, hierarchical="on", reduction="sum"),
    "auto": ExchangeConfig(bucket_megabytes="auto"),
}
ROUNDED = {
    "fp16": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, compression="fp16"),
    "bf16": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, compression="bf16"),
    "fp16 sum": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, compression="fp16", reduction="sum"),
    "hierarchical fp16": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, compression="fp16", hierarchical="on"),
    "hierarchical bf16": ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, compression="bf16", hierarchical="on"),
}
ADASUM = ExchangeConfig(bucket_megabytes=SMALL_BUCKETS, reduction="adasum")
POWERSGD = ExchangeConfig(bucket_megabytes=0.002, compression="powersgd", powersgd_rank=2)


class Model(nn.Module):
    """A convolution in channels-last layout, and three heads of which a step may use any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.low = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList(nn.Linear(5 * 4 * 4, 7) for _ in range(3))

    def forward(self, images: torch.Tensor, heads: list[int]) -> torch.Tensor:
        features = torch.tanh(self.low(images)).flatten(1)
        return sum(self.heads[number](features) for number in heads).square().mean()


STEPS = [[[0, 1], [0, 1], [0, 1], [0, 1]], [[0], [1], [0, 1], [0]], [[1], [1], [1], [1]], [[0], [0, 1], [0], [1]]]


def images_of(step, rank):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def in_nodes(world, ranks_per_node):
    return replace(
        world,
        node_rank=world.rank // ranks_per_node,
        num_nodes=-(-world.world_size // ranks_per_node),
        local_rank=world.rank % ranks_per_node,
        local_world_size=ranks_per_node,
    )


def prepared(world, config, model=None):
    model = model or Model().double()
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(config, Collectives(world))
    strategy.prepare([phase])
    return strategy, phase, model


def gradients_under(world, configs, ranks_per_node):
    """The gradients of each step under each of `configs`; every rank has its own heads in each step."""
    world, found = in_nodes(world, ranks_per_node), {}
    for name, config in configs.items():
        strategy, phase, model = prepared(world, config)
        found[name] = []
        for step, heads in enumerate(STEPS):
            phase.optimizer.zero_grad()
            with strategy.micro_batch(phase, synchronize=True):
                strategy.backward(phase, model(images_of(step, world.rank), heads[world.rank]))
            strategy.finish(phase)
            found[name].append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        strategy.close()
    return found


def _expected(world_size):
    """For each step and parameter, the ranks' own gradients: None where a rank's graph had none."""
    steps = []
    for step, heads in enumerate(STEPS):
        ranks = []
        for rank in range(world_size):
            model = Model().double()
            model(images_of(step, rank), heads[rank]).backward()
            ranks.append([p.grad for p in model.parameters()])
        steps.append(list(zip(*ranks, strict=True)))
    return steps


def _compare(by_rank, world_size, combine, *, rounding=0.0):
    """`rounding`: of each rank's value and each partial sum, relative to the largest value; else float64's."""
    for step, parameters in enumerate(_expected(world_size)):
        for index, own in enumerate(parameters):
            present = [gradient for gradient in own if gradient is not None]
            for found in by_rank:
                gradient = found[step][index]
                assert (gradient is None) == (not present), "a parameter that no rank used keeps grad=None"
                if present:
                    filled = [torch.zeros_like(present[0]) if own_ is None else own_ for own_ in own]
                    largest = max(float(own_.abs().max()) for own_ in filled)
                    atol = world_size * rounding * largest + 1e-7 if rounding else 1e-14
                    torch.testing.assert_close(gradient, combine(filled), rtol=0, atol=atol)
                    assert torch.equal(gradient, by_rank[0][step][index]), "ranks differ"


def sum_of(gradients):
    return torch.stack(gradients).sum(0)


def mean_of(gradients):
    return torch.stack(gradients).mean(0)


# A unit in the last place: half of it for each rank's value, and half for each partial sum of the transport.
ULP = {"fp16": 2.0**-11, "bf16": 2.0**-8}


def check(name, by_rank, world_size):
    if name == "adasum":
        _compare(by_rank, world_size, _tree)
        return
    scale = world_size if "sum" in name else 1
    rounding = scale * next((ulp for word, ulp in ULP.items() if word in name), 0.0)
    _compare(by_rank, world_size, sum_of if "sum" in name else mean_of, rounding=rounding)


class Given(nn.Module):
    """Gives every parameter the gradient that it is called with."""

    def __init__(self, shapes):
        super().__init__()
        self.values = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, gradients):
        return sum((value * gradient).sum() for value, gradient in zip(self.values, gradients, strict=True))


def exchange(strategy, phase, gradients, **how):
    phase.optimizer.zero_grad()
    with strategy.micro_batch(phase, synchronize=True, **how):
        strategy.backward(phase, phase.module(gradients))
    strategy.finish(phase)
    return [p.grad.clone() for p in phase.parameters()]


class _Waits(torch.autograd.Function):
    """The identity, whose backward waits until `done()`; raises where that does not come."""

    @staticmethod
    def forward(ctx, tensor, done):
        ctx.done = done
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        deadline = time.monotonic() + 40
        while not ctx.done():
            assert time.monotonic() < deadline, "the reduction does not go on while the backward pass runs"
            time.sleep(0.001)
        return gradient, None


def overlap(world, configs):
    """Rank 0 goes on with its backward pass before the others start theirs, and none gets to its lower layer before the
    upper layer's bucket is reduced.
    """
    world, store = in_nodes(world, 2), dist.distributed_c10d._get_default_store()
    for number, config in enumerate(configs):
        lower, upper = nn.Linear(16, 16), nn.Linear(16, 16)
        strategy, phase, _ = prepared(world, config, nn.Sequential(lower, upper))
        exchange = strategy._exchanges["p"]
        order = []

        def top_is_reduced(exchange=exchange, order=order, number=number):
            buckets = exchange._buckets
            if not buckets:  # the first step learns the order, and exchanges at its end
                return True
            if world.is_first:
                store.set(f"went on {number}", "")
            done = buckets[0].pending is not None and buckets[0].pending._work.is_completed()
            if done:
                order.append(sum(bucket.pending is not None for bucket in buckets))
            return done

        for step in range(2):
            phase.optimizer.zero_grad()
            with strategy.micro_batch(phase, synchronize=True):
                loss = upper(_Waits.apply(lower(torch.ones(2, 16)), top_is_reduced)).sum()
                if step == 1 and not world.is_first:
                    store.wait([f"went on {number}"], timedelta(seconds=40))
                strategy.backward(phase, loss)
            strategy.finish(phase)
        assert len(exchange._buckets) > 1
        assert order == [1], "the upper bucket was reduced before the lower one was started"
        strategy.close()
    return True
