"""Each way to reduce a bucket gives what its formula says, beside the backward pass, whatever each rank's graph was."""

from __future__ import annotations

from dataclasses import replace

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
from tests.dist_train.reductions import (
    ADASUM,
    EXACT,
    POWERSGD,
    ROUNDED,
    ULP,
    Given,
    Model,
    check,
    exchange,
    gradients_under,
    images_of,
    in_nodes,
    overlap,
    prepared,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("world_size,ranks_per_node", [(2, 2), pytest.param(3, 3, marks=pytest.mark.thorough), (4, 2)])
def test_every_reduction_keeps_its_formula_when_ranks_have_different_graphs(world_size, ranks_per_node):
    def fits(name):
        return "hierarchical" not in name or world_size > ranks_per_node

    configs = {name: config for name, config in {**EXACT, **ROUNDED}.items() if fits(name)} | {"adasum": ADASUM}
    by_rank = run_ranks(gradients_under, world_size, configs, ranks_per_node)
    for name in configs:
        check(name, [rank[name] for rank in by_rank], world_size)


# -- 16 bits -------------------------------------------------------------------------------------------------------


def _near_the_end_of_float16(world):
    found = []
    for reduction in ("average", "sum"):
        config = ExchangeConfig(compression="fp16", reduction=reduction)
        strategy, phase, _ = prepared(world, config, Given([(3,)]))
        found += exchange(strategy, phase, [torch.full((3,), 60000.0)])
    return found


def test_a_sum_of_large_gradients_does_not_overflow_in_float16():
    for mean, total in run_ranks(_near_the_end_of_float16, 3):
        assert torch.equal(mean, torch.full((3,), 60000.0))
        assert torch.equal(total, torch.full((3,), 180000.0))


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
        strategy, phase, model = prepared(world, config)
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
        model = Model().double()
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
    strategy, phase, _ = prepared(world, ADASUM, Given([(2,)]))
    with pytest.raises(ValueError, match="Adasum has no weights"):
        exchange(strategy, phase, [torch.ones(2)], weight=2)
    words.append("adasum")
    strategy, phase, _ = prepared(world, EXACT["average"], Given([(2,)]))
    with pytest.raises(ValueError, match="number of clips, 0 or more"):
        exchange(strategy, phase, [torch.ones(2)], weight=-1)
    assert all(g.eq(0).all() for g in exchange(strategy, phase, [torch.ones(2)], weight=0)), "nobody has a clip"
    return words


def test_weights_without_a_meaning_are_refused():
    assert run_ranks(_wrong_weights, 2) == [["adasum"]] * 2


# -- overlap -------------------------------------------------------------------------------------------------------


def test_every_reduction_ends_beside_the_backward_pass():
    configs = [
        replace(EXACT["average"], bucket_megabytes=0.0011),
        replace(ROUNDED["bf16"], bucket_megabytes=0.0011),
        replace(EXACT["hierarchical"], bucket_megabytes=0.0011),
        replace(ROUNDED["hierarchical fp16"], bucket_megabytes=0.0011),
        replace(POWERSGD, bucket_megabytes=0.0011),
        replace(ADASUM, bucket_megabytes=0.0011),
    ]
    assert run_ranks(overlap, 4, configs) == [True] * 4


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
    model = Model().double()
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(EXACT["average"], Collectives(world, ledger))
    strategy.prepare([phase])
    counts = []
    for step in range(2):
        phase.optimizer.zero_grad()
        before = ledger.wire
        for number in range(3):
            with strategy.micro_batch(phase, synchronize=number == 2):
                strategy.backward(phase, model(images_of(step, world.rank), [0, 1, 2]) / 3)
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
    world = in_nodes(world, ranks_per_node)
    with pytest.raises(ValueError, match="no hierarchy") as error:
        prepared(world, EXACT["hierarchical"])
    strategy, phase, _ = prepared(world, replace(EXACT["average"], hierarchical="auto"), Given([(2,)]))
    (gradient,) = exchange(strategy, phase, [torch.full((2,), float(world.rank))])
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
    strategy, phase, _ = prepared(world, EXACT["average"], model)
    with strategy.micro_batch(phase, synchronize=True):
        strategy.backward(phase, model(torch.tensor([1, 2])).sum())
    with pytest.raises(ValueError, match="sparse=False"):
        strategy.finish(phase)
    dist.barrier()
    return True


def test_a_sparse_gradient_is_refused():
    assert run_ranks(_sparse, 2) == [True] * 2
