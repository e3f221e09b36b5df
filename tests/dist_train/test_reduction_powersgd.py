"""PowerSGD against the algorithms of the paper, written down slowly."""

from __future__ import annotations

import pytest
import torch

from tests.dist_train.reductions import POWERSGD, Given, exchange, mean_of, prepared, sum_of
from tests.ranks import run_ranks

SHAPES = [(12, 10), (9,), (8, 3, 3), (2, 2)]  # two matrices that shrink, a vector, and one that would not shrink
ROUNDS = 5


def _random_gradients(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _powersgd(world):
    strategy, phase, _ = prepared(world, POWERSGD, Given(SHAPES))
    return [exchange(strategy, phase, _random_gradients(step, world.rank)) for step in range(ROUNDS)]


def _powersgd_slowly(world_size):
    """Algorithms 1 and 2 for one matrix at a time, in float64."""
    steps = [[] for _ in range(ROUNDS)]
    for index, shape in enumerate(SHAPES):
        gradients = [[_random_gradients(step, rank)[index] for rank in range(world_size)] for step in range(ROUNDS)]
        if shape not in ((12, 10), (8, 3, 3)):
            for step in range(ROUNDS):
                steps[step].append(mean_of(gradients[step]))
            continue
        rows, columns = shape[0], gradients[0][0].numel() // shape[0]
        query = torch.randn(columns, 2, generator=torch.Generator().manual_seed(index)).double()
        errors = [torch.zeros(rows, columns, dtype=torch.float64)] * world_size
        for step in range(ROUNDS):
            own = [g.double().view(rows, columns) + e for g, e in zip(gradients[step], errors, strict=True)]
            basis = torch.linalg.qr(mean_of([matrix @ query for matrix in own])).Q
            query = mean_of([matrix.t() @ basis for matrix in own])
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
    sent = sum_of([step[0] for step in ranks[0]])
    wanted = sum_of([mean_of([_random_gradients(s, r)[0] for r in range(world_size)]) for s in range(ROUNDS)])
    assert (sent - wanted).norm() < wanted.norm(), "what one step leaves out, the next ones bring"


def _powersgd_where_ranks_skip(world):
    """Two heads of low-rank gradients; the second is used by rank 1 alone, and in step 1 by nobody."""
    strategy, phase, _ = prepared(world, POWERSGD, Given([(12, 10), (12, 10)]))
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
