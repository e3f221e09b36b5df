"""Each way to reduce a bucket gives what its formula says, beside the backward pass, whatever each rank's graph was."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_train.collectives import Collectives
from dist_train.ledger import NullLedger
from dist_train.phases import Phase
from dist_train.reduction.lane import Lane
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.strategies.uneven import join
from tests.dist_train.test_reduction_adasum import _tree
from tests.ranks import run_ranks

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


class _Model(nn.Module):
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


def _images(step, rank):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)


def _in_nodes(world, ranks_per_node):
    return replace(
        world,
        node_rank=world.rank // ranks_per_node,
        num_nodes=-(-world.world_size // ranks_per_node),
        local_rank=world.rank % ranks_per_node,
        local_world_size=ranks_per_node,
    )


def _strategy(world, config, model=None):
    model = model or _Model().double()
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(config, Collectives(world))
    strategy.prepare([phase])
    return strategy, phase, model


def _gradients(world, configs, ranks_per_node):
    """The gradients of each step under each of `configs`; every rank has its own heads in each step."""
    world, found = _in_nodes(world, ranks_per_node), {}
    for name, config in configs.items():
        strategy, phase, model = _strategy(world, config)
        found[name] = []
        for step, heads in enumerate(STEPS):
            phase.optimizer.zero_grad()
            with strategy.micro_batch(phase, synchronize=True):
                strategy.backward(phase, model(_images(step, world.rank), heads[world.rank]))
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
            model = _Model().double()
            model(_images(step, rank), heads[rank]).backward()
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


def _sum(gradients):
    return torch.stack(gradients).sum(0)


def _mean(gradients):
    return torch.stack(gradients).mean(0)


# A unit in the last place: half of it for each rank's value, and half for each partial sum of the transport.
ULP = {"fp16": 2.0**-11, "bf16": 2.0**-8}


def _check(name, by_rank, world_size):
    if name == "adasum":
        _compare(by_rank, world_size, _tree)
        return
    scale = world_size if "sum" in name else 1
    rounding = scale * next((ulp for word, ulp in ULP.items() if word in name), 0.0)
    _compare(by_rank, world_size, _sum if "sum" in name else _mean, rounding=rounding)


@pytest.mark.parametrize("world_size,ranks_per_node", [(2, 2), pytest.param(3, 3, marks=pytest.mark.thorough), (4, 2)])
def test_every_reduction_keeps_its_formula_when_ranks_have_different_graphs(world_size, ranks_per_node):
    def fits(name):
        return "hierarchical" not in name or world_size > ranks_per_node

    configs = {name: config for name, config in {**EXACT, **ROUNDED}.items() if fits(name)} | {"adasum": ADASUM}
    by_rank = run_ranks(_gradients, world_size, configs, ranks_per_node)
    for name in configs:
        _check(name, [rank[name] for rank in by_rank], world_size)


# -- 16 bits -------------------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Gives every parameter the gradient that it is called with."""

    def __init__(self, shapes):
        super().__init__()
        self.values = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self, gradients):
        return sum((value * gradient).sum() for value, gradient in zip(self.values, gradients, strict=True))


def _exchange(strategy, phase, gradients, **how):
    phase.optimizer.zero_grad()
    with strategy.micro_batch(phase, synchronize=True, **how):
        strategy.backward(phase, phase.module(gradients))
    strategy.finish(phase)
    return [p.grad.clone() for p in phase.parameters()]


def _near_the_end_of_float16(world):
    found = []
    for reduction in ("average", "sum"):
        config = ExchangeConfig(compression="fp16", reduction=reduction)
        strategy, phase, _ = _strategy(world, config, _Given([(3,)]))
        found += _exchange(strategy, phase, [torch.full((3,), 60000.0)])
    return found


def test_a_sum_of_large_gradients_does_not_overflow_in_float16():
    for mean, total in run_ranks(_near_the_end_of_float16, 3):
        assert torch.equal(mean, torch.full((3,), 60000.0))
        assert torch.equal(total, torch.full((3,), 180000.0))


# -- PowerSGD ------------------------------------------------------------------------------------------------------

SHAPES = [(12, 10), (9,), (8, 3, 3), (2, 2)]  # two matrices that shrink, a vector, and one that would not shrink
ROUNDS = 5


def _random_gradients(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _powersgd(world):
    strategy, phase, _ = _strategy(world, POWERSGD, _Given(SHAPES))
    return [_exchange(strategy, phase, _random_gradients(step, world.rank)) for step in range(ROUNDS)]


def _powersgd_slowly(world_size):
    """Algorithms 1 and 2 for one matrix at a time, in float64."""
    steps = [[] for _ in range(ROUNDS)]
    for index, shape in enumerate(SHAPES):
        gradients = [[_random_gradients(step, rank)[index] for rank in range(world_size)] for step in range(ROUNDS)]
        if shape not in ((12, 10), (8, 3, 3)):
            for step in range(ROUNDS):
                steps[step].append(_mean(gradients[step]))
            continue
        rows, columns = shape[0], gradients[0][0].numel() // shape[0]
        query = torch.randn(columns, 2, generator=torch.Generator().manual_seed(index)).double()
        errors = [torch.zeros(rows, columns, dtype=torch.float64)] * world_size
        for step in range(ROUNDS):
            own = [g.double().view(rows, columns) + e for g, e in zip(gradients[step], errors, strict=True)]
            basis = torch.linalg.qr(_mean([matrix @ query for matrix in own])).Q
            query = _mean([matrix.t() @ basis for matrix in own])
            result = basis @ query.t()
            errors = [matrix - result for matrix in own]
            steps[step].append(result.view(shape).float())
    return steps


@pytest.mark.parametrize("world_size", [2, 3])
def test_powersgd_is_the_papers_algorithm_with_warm_start_and_error_feedback(world_size):
    expected = _powersgd_slowly(world_size)
    ranks = run_ranks(_powersgd, world_size)
    for step in range(ROUNDS):
        for index, value in enumerate(expected[step]):
            torch.testing.assert_close(ranks[0][step][index], value, rtol=0, atol=1e-5)
            for rank in ranks:
                assert torch.equal(rank[step][index], ranks[0][step][index])
    sent = _sum([step[0] for step in ranks[0]])
    wanted = _sum([_mean([_random_gradients(s, r)[0] for r in range(world_size)]) for s in range(ROUNDS)])
    assert (sent - wanted).norm() < wanted.norm(), "what one step leaves out, the next ones bring"


def _powersgd_where_ranks_skip(world):
    """Two heads of low-rank gradients; the second is used by rank 1 alone, and in step 1 by nobody."""
    strategy, phase, _ = _strategy(world, POWERSGD, _Given([(12, 10), (12, 10)]))
    found = []
    for step in range(3):
        first, second = (g for g in (torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(step))))
        values = list(phase.module.values)
        phase.optimizer.zero_grad()
        with strategy.micro_batch(phase, synchronize=True):
            loss = (values[0] * first).sum()
            if world.rank == 1 and step != 1:
                loss = loss + (values[1] * second).sum()
            strategy.backward(phase, loss)
        strategy.finish(phase)
        found.append([None if p.grad is None else p.grad.clone() for p in phase.parameters()])
    errors = strategy._exchanges["p"]._reducer._errors
    return found, {index: error.clone() for index, error in errors.items()}


def test_powersgd_loses_nothing_where_a_parameter_is_not_used():
    (first, errors_0), (second, errors_1) = run_ranks(_powersgd_where_ranks_skip, 2)
    assert first[1][1] is None
    assert second[1][1] is None
    second_head = [torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(step))[1] for step in range(3)]
    sent = first[0][1] + first[2][1]
    left = errors_0[1] + errors_1[1]
    torch.testing.assert_close(sent + left, (second_head[0] + second_head[2]) / 2, rtol=0, atol=1e-5)


# -- weights and uneven inputs -------------------------------------------------------------------------------------

NUM_BATCHES = [3, 1, 0]
WEIGHTED = {
    "average": EXACT["average"],
    "sum": EXACT["sum"],
    "fp16": ROUNDED["fp16"],
    "powersgd": replace(POWERSGD, powersgd_rank=80),  # full rank: everything travels as it is
}


def _clips(rank, batch):
    return torch.randn(
        1 + rank + batch, 3, 6, 6, generator=torch.Generator().manual_seed(10 * rank + batch), dtype=torch.float64
    )


def _join(world):
    found = {}
    for name, config in WEIGHTED.items():
        strategy, phase, model = _strategy(world, config)
        batches = [_clips(world.rank, number) for number in range(NUM_BATCHES[world.rank])]
        found[name] = []
        for batch in join(batches, Collectives(world)):
            phase.optimizer.zero_grad()
            weight = 0 if batch is None else len(batch)
            with strategy.micro_batch(phase, synchronize=True, weight=weight):
                if batch is not None:
                    strategy.backward(phase, model(batch, [0]))
            strategy.finish(phase)
            found[name].append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_run_out_neither_hang_nor_bias_the_mean_over_all_clips(world_size):
    ranks = run_ranks(_join, world_size)
    for step in range(max(NUM_BATCHES)):
        clips = torch.cat([_clips(rank, step) for rank in range(world_size) if step < NUM_BATCHES[rank]])
        model = _Model().double()
        model(clips, [0]).backward()
        for name in WEIGHTED:
            scale = len(clips) if name == "sum" else 1
            for rank in ranks:
                assert len(rank[name]) == max(NUM_BATCHES[:world_size])
                for parameter, gradient in zip(model.parameters(), rank[name][step], strict=True):
                    assert (parameter.grad is None) == (gradient is None)
                    if gradient is not None:
                        largest = float(parameter.grad.abs().max())
                        atol = world_size * ULP["fp16"] * largest + 1e-7 if name == "fp16" else 1e-14
                        torch.testing.assert_close(gradient, parameter.grad * scale, rtol=0, atol=atol)


def _wrong_weights(world):
    words = []
    strategy, phase, _ = _strategy(world, ADASUM, _Given([(2,)]))
    with pytest.raises(ValueError, match="Adasum has no weights"):
        _exchange(strategy, phase, [torch.ones(2)], weight=2)
    words.append("adasum")
    strategy, phase, _ = _strategy(world, EXACT["average"], _Given([(2,)]))
    with pytest.raises(ValueError, match="number of clips, 0 or more"):
        _exchange(strategy, phase, [torch.ones(2)], weight=-1)
    assert all(g.eq(0).all() for g in _exchange(strategy, phase, [torch.ones(2)], weight=0)), "nobody has a clip"
    return words


def test_weights_without_a_meaning_are_refused():
    assert run_ranks(_wrong_weights, 2) == [["adasum"]] * 2


# -- overlap -------------------------------------------------------------------------------------------------------


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


def _overlap(world, configs):
    """Rank 0 goes on with its backward pass before the others start theirs, and none gets to its lower layer before the
    upper layer's bucket is reduced.
    """
    world, store = _in_nodes(world, 2), dist.distributed_c10d._get_default_store()
    for number, config in enumerate(configs):
        lower, upper = nn.Linear(16, 16), nn.Linear(16, 16)
        strategy, phase, _ = _strategy(world, config, nn.Sequential(lower, upper))
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


def test_every_reduction_ends_beside_the_backward_pass():
    configs = [
        replace(EXACT["average"], bucket_megabytes=0.0011),
        replace(ROUNDED["bf16"], bucket_megabytes=0.0011),
        replace(EXACT["hierarchical"], bucket_megabytes=0.0011),
        replace(ROUNDED["hierarchical fp16"], bucket_megabytes=0.0011),
        replace(POWERSGD, bucket_megabytes=0.0011),
        replace(ADASUM, bucket_megabytes=0.0011),
    ]
    assert run_ranks(_overlap, 4, configs) == [True] * 4


def test_a_lane_keeps_the_order_and_stops_at_the_first_error():
    lane, order = Lane(torch.device("cpu")), []

    def fails():
        raise RuntimeError("a peer is gone")

    works = [
        lane.start(job) for job in (lambda: order.append(1), lambda: order.append(2), fails, lambda: order.append(3))
    ]
    works[1].wait()
    assert order == [1, 2]
    for work in works[2:]:
        with pytest.raises(RuntimeError, match="a peer is gone"):
            work.wait()
    assert order == [1, 2], "after an error no further collective is started: it would meet another rank's"
    lane.close()


# -- bytes ---------------------------------------------------------------------------------------------------------


class _CountsBytes(NullLedger):
    def __init__(self):
        self.wire = 0

    def launch(self, name, *, num_bytes, **_):
        self.wire += num_bytes


def _bytes_of_micro_batches(world):
    ledger = _CountsBytes()
    model = _Model().double()
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(EXACT["average"], Collectives(world, ledger))
    strategy.prepare([phase])
    counts = []
    for step in range(2):
        phase.optimizer.zero_grad()
        before = ledger.wire
        for number in range(3):
            with strategy.micro_batch(phase, synchronize=number == 2):
                strategy.backward(phase, model(_images(step, world.rank), [0, 1, 2]) / 3)
            counts.append(ledger.wire - before)
        strategy.finish(phase)
        counts.append(ledger.wire - before)
    return counts, sum(p.numel() * p.element_size() for p in model.parameters())


def test_no_byte_moves_before_the_last_micro_batch():
    for counts, size in run_ranks(_bytes_of_micro_batches, 2):
        first, second = counts[:4], counts[4:]
        assert first[:3] == [0, 0, 0], "the first step learns the order and exchanges in finish"
        assert second[:2] == [0, 0]
        assert 0 < second[2] < size, "most buckets leave during the last backward pass"
        assert size < second[3] <= size + 200, "each gradient once, and which parameters were used"


# -- what does not work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values,words",
    [
        ({"bucket_megabytes": -1.0}, "positive number"),
        ({"powersgd_rank": 0}, "powersgd_rank is 0"),
        ({"average_every_steps": 0}, "average_every_steps is 0"),
        ({"local_after_epochs": 3.0}, "average_every_steps is 1"),
        ({"strategy": "ddp", "compression": "fp16"}, "needs exchange.strategy allreduce"),
        ({"strategy": "fsdp2", "reduction": "adasum"}, "needs exchange.strategy allreduce"),
        ({"strategy": "ddp", "bucket_megabytes": "auto"}, "needs exchange.strategy allreduce"),
        ({"strategy": "zero1", "hierarchical": "on"}, "needs exchange.strategy allreduce"),
        ({"strategy": "fsdp2", "bucket_megabytes": 10.0}, "fsdp2 has no buckets"),
        ({"powersgd_rank": 2}, "exchange.compression is none: use powersgd"),
        ({"strategy": "fsdp2", "average_every_steps": 4}, "whole model on each rank"),
        ({"reduction": "adasum", "compression": "fp16"}, "use one of the two"),
        ({"reduction": "adasum", "hierarchical": "on"}, "tree of its own"),
        ({"compression": "powersgd", "hierarchical": "on"}, "use off"),
    ],
)
def test_what_does_not_combine_is_said_before_anything_starts(values, words):
    (problem,) = ExchangeConfig(**values).problems()
    assert words in problem


def _no_hierarchy(world, ranks_per_node):
    world = _in_nodes(world, ranks_per_node)
    with pytest.raises(ValueError, match="no hierarchy") as error:
        _strategy(world, EXACT["hierarchical"])
    strategy, phase, _ = _strategy(world, replace(EXACT["average"], hierarchical="auto"), _Given([(2,)]))
    (gradient,) = _exchange(strategy, phase, [torch.full((2,), float(world.rank))])
    return str(error.value), gradient.tolist()


@pytest.mark.parametrize(
    "ranks_per_node,words", [(3, "on one node"), (1, "each node has one rank"), (2, "between 1 and 2 ranks")]
)
def test_nodes_without_a_hierarchy_are_refused_or_left_alone_under_auto(ranks_per_node, words):
    for message, gradient in run_ranks(_no_hierarchy, 3, ranks_per_node):
        assert words in message
        assert gradient == [1.0, 1.0]


def _sparse(world):
    model = nn.Embedding(5, 3, sparse=True)
    strategy, phase, _ = _strategy(world, EXACT["average"], model)
    with strategy.micro_batch(phase, synchronize=True):
        strategy.backward(phase, model(torch.tensor([1, 2])).sum())
    with pytest.raises(ValueError, match="sparse=False"):
        strategy.finish(phase)
    dist.barrier()
    return True


def test_a_sparse_gradient_is_refused():
    assert run_ranks(_sparse, 2) == [True] * 2
