"""Adasum against the formula of the paper, written down slowly."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dist_train.reduction.adasum import adasum_
from tests.ranks import run_ranks

SHAPES = [(3, 5), (1,), (7,), (2, 2, 3), (0,)]


def _gradients(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    if rank == 1:
        found[1].zero_()  # a layer without a gradient on one rank
    return [tensor.to(dtype) for tensor in found]


def _formula(a, b):
    a_b, a_a, b_b = (a * b).sum(), (a * a).sum(), (b * b).sum()
    return (1 - (a_b / (2 * a_a) if a_a else 0)) * a + (1 - (a_b / (2 * b_b) if b_b else 0)) * b


def _tree(vectors):
    """The paper's order: extra ranks into the first ones, then neighbours, then neighbouring pairs."""
    power = 1 << (len(vectors).bit_length() - 1)
    for index, extra in enumerate(vectors[power:]):
        vectors[index] = _formula(vectors[index], extra)
    vectors = vectors[:power]
    while len(vectors) > 1:
        vectors = [_formula(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _run(world, dtypes):
    found = []
    for dtype in dtypes:
        tensors = _gradients(world.rank, dtype)
        adasum_(tensors, group=dist.group.WORLD)
        found.append(tensors)
    mixed = _gradients(world.rank, torch.float32) + _gradients(world.rank, torch.float64)
    adasum_(mixed, group=dist.group.WORLD)
    strided = torch.arange(12.0).view(3, 4).t() * (world.rank + 1)
    adasum_([strided], group=dist.group.WORLD)
    return found, mixed, strided


# float16 and bfloat16: two roundings of the result a level, three levels at most; values are below 8.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_adasum_is_the_papers_formula_layer_by_layer_with_the_same_bits_on_every_rank(world_size):
    dtypes = list(TOLERANCE)
    ranks = run_ranks(_run, world_size, dtypes)
    for number, dtype in enumerate(dtypes):
        for layer in range(len(SHAPES)):
            expected = _tree([_gradients(rank, dtype)[layer].double() for rank in range(world_size)])
            for found, _, _ in ranks:
                torch.testing.assert_close(found[number][layer].double(), expected, rtol=0, atol=TOLERANCE[dtype])
                assert torch.equal(found[number][layer], ranks[0][0][number][layer])
    for _, mixed, _ in ranks:
        for tensor, alone in zip(mixed, ranks[0][0][1] + ranks[0][0][0], strict=True):
            assert torch.equal(tensor, alone)
    parallel = _tree([torch.arange(12.0).view(3, 4).t() * (rank + 1) for rank in range(world_size)])
    for _, _, strided in ranks:
        torch.testing.assert_close(strided, parallel)


def _equal_and_orthogonal(world):
    equal = torch.tensor([1.0, -2.0, 0.3])
    orthogonal = torch.zeros(world.world_size)
    orthogonal[world.rank] = world.rank + 1.0
    nothing = torch.zeros(4)
    broken = torch.full((2,), float("nan") if world.rank == 1 else 1.0)
    adasum_([equal, orthogonal, nothing, broken], group=dist.group.WORLD)
    return equal, orthogonal, nothing, broken


def test_equal_gradients_keep_their_length_orthogonal_ones_add_and_zeros_stay_zero():
    for equal, orthogonal, nothing, broken in run_ranks(_equal_and_orthogonal, 4):
        assert torch.equal(equal, torch.tensor([1.0, -2.0, 0.3]))
        assert torch.equal(orthogonal, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert torch.equal(nothing, torch.zeros(4))
        assert broken.isnan().all(), "a gradient that is not a number must not disappear"


def _refusals(world):
    found = []
    for tensor in (torch.ones(2, dtype=torch.int64), torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match="dense floating-point"):
            adasum_([tensor], group=dist.group.WORLD)
        found.append(True)
    return found


def test_tensors_without_a_meaningful_dot_product_are_refused():
    assert run_ranks(_refusals, 2) == [[True, True]] * 2
