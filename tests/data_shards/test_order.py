"""The sample order is a bijection of every epoch, and ranks share a batch without gap or overlap."""

import math
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order import evaluation_positions, rank_positions, sample_at
from data_shards.permutation import derive_keys, permute

SEEDS = st.integers(min_value=-(2**63), max_value=2**64)


def epoch_order(epoch: int, **stream: int) -> list[int]:
    num_samples = stream["num_samples"]
    return sample_at(np.arange(epoch * num_samples, (epoch + 1) * num_samples), **stream).tolist()


def test_every_set_of_up_to_5000_samples_is_permuted_without_loss():
    for num_samples in range(1, 5001):
        order = sample_at(np.arange(num_samples), seed=num_samples % 7, num_samples=num_samples)
        assert np.array_equal(np.sort(order), np.arange(num_samples)), num_samples


@settings(deadline=None, max_examples=150)
@given(
    num_samples=st.integers(1, 5000),
    seed=SEEDS,
    epoch=st.integers(0, 2**31),
    block_samples=st.integers(1, 700),
    window_blocks=st.integers(1, 40),
)
def test_block_shuffle_is_a_bijection_of_every_epoch(num_samples, seed, epoch, block_samples, window_blocks):
    order = epoch_order(
        epoch, seed=seed, num_samples=num_samples, block_samples=block_samples, window_blocks=window_blocks
    )
    assert sorted(order) == list(range(num_samples))


@settings(deadline=None, max_examples=40)
@given(num_samples=st.integers(5001, 10**12), seed=SEEDS, block_samples=st.sampled_from([0, 1, 1000, 10**6]))
def test_a_huge_set_maps_distinct_positions_to_distinct_samples(num_samples, seed, block_samples):
    positions = np.unique(np.random.default_rng(0).integers(0, num_samples, 20_000)) + 3 * num_samples
    samples = sample_at(positions, seed=seed, num_samples=num_samples, block_samples=block_samples)
    assert len(np.unique(samples)) == len(positions)
    assert samples.min() >= 0
    assert samples.max() < num_samples


@settings(deadline=None, max_examples=100)
@given(
    num_samples=st.integers(1, 300),
    seed=SEEDS,
    block_samples=st.sampled_from([0, 1, 7, 64]),
    start=st.integers(0, 5000),
    data=st.data(),
)
def test_a_lookup_does_not_depend_on_its_neighbors(num_samples, seed, block_samples, start, data):
    stream = {"seed": seed, "num_samples": num_samples, "block_samples": block_samples}
    positions = np.arange(start, start + 200)
    together = sample_at(positions, **stream)
    chosen = data.draw(st.lists(st.integers(0, 199), max_size=20))
    assert sample_at(positions[chosen], **stream).tolist() == together[chosen].tolist()
    for place in chosen[:3]:
        alone = sample_at(int(positions[place]), **stream)
        assert alone.shape == ()
        assert int(alone) == together[place]


@settings(deadline=None, max_examples=80)
@given(
    num_samples=st.integers(1, 97),
    legs=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.integers(0, 6)),
        min_size=1,
        max_size=5,
    ),
    start_epoch=st.integers(0, 3),
)
def test_each_sample_comes_once_an_epoch_through_resumes_at_other_world_sizes(num_samples, legs, start_epoch):
    """A leg is a run of (world size, micro-batches, clips a micro-batch, steps) from where the last one was stopped."""
    position = start_epoch * num_samples
    taken = []
    for world_size, micro_batches, clips, steps in legs:
        global_batch = world_size * micro_batches * clips
        for _ in range(steps):
            parts = [rank_positions(position, global_batch, r, world_size, micro_batches) for r in range(world_size)]
            assert {part.shape for part in parts} == {(micro_batches, clips)}
            taken += np.concatenate([part.ravel() for part in parts]).tolist()
            position += global_batch
    assert taken == list(range(start_epoch * num_samples, position))
    samples = sample_at(np.array(taken, dtype=np.int64), seed=5, num_samples=num_samples).tolist()
    for first in range(0, len(samples) - num_samples + 1, num_samples):
        assert sorted(samples[first : first + num_samples]) == list(range(num_samples))


@settings(deadline=None)
@given(num_samples=st.integers(0, 10**6), world_size=st.integers(1, 600))
def test_evaluation_counts_each_sample_once_at_any_world_size(num_samples, world_size):
    parts = [evaluation_positions(num_samples, rank, world_size) for rank in range(world_size)]
    assert parts[0].start == 0
    assert parts[-1].stop == num_samples
    assert all(before.stop == after.start for before, after in pairwise(parts))
    lengths = {len(part) for part in parts}
    assert max(lengths) - min(lengths) <= 1


def test_the_order_of_a_seed_never_changes():
    """Checkpoints hold a position only: another order under the same seed would break each resume."""
    assert epoch_order(0, seed=0, num_samples=10) == GOLDEN_FIRST_EPOCH
    assert epoch_order(1, seed=0, num_samples=10) == GOLDEN_SECOND_EPOCH
    blocks = {"seed": 7, "num_samples": 14, "block_samples": 3, "window_blocks": 2}
    assert epoch_order(0, **blocks) == GOLDEN_BLOCKS
    far = sample_at(np.array([0, 10**9 - 1, 10**11]), seed=-1, num_samples=10**9)
    assert far.tolist() == GOLDEN_FAR
    assert sample_at(np.arange(8), seed=0, num_samples=2**16).tolist() == GOLDEN_POWER_OF_TWO


def test_epochs_and_seeds_have_different_orders():
    orders = {
        tuple(epoch_order(epoch, seed=seed, num_samples=50, block_samples=block))
        for epoch in range(4)
        for seed in range(4)
        for block in (0, 8)
    }
    assert len(orders) == 32


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 6])
def test_all_orders_of_a_small_set_are_equally_likely(num_samples):
    num_orders = math.factorial(num_samples)
    num_keys = 60 * num_orders
    keys = derive_keys(3, np.repeat(np.arange(num_keys), num_samples))
    images = permute(np.tile(np.arange(num_samples), num_keys), num_samples, keys=keys).reshape(num_keys, num_samples)
    counts = Counter(map(tuple, images.tolist()))
    statistic = sum((counts[order] - 60) ** 2 / 60 for order in permutations(range(num_samples)))
    freedom = num_orders - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_neighbors_are_not_kept_together_by_a_full_shuffle():
    n = 10_007
    order = sample_at(np.arange(n), seed=1, num_samples=n).astype(float)
    following = sample_at(np.arange(n, 2 * n), seed=1, num_samples=n).astype(float)
    for a, b in ((order[:-1], order[1:]), (order, np.arange(n)), (order, following)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)
    assert (np.diff(order) == 1).sum() < 8  # one is expected


def test_block_shuffle_reads_few_runs_of_neighbors_in_a_window():
    order = sample_at(np.arange(6400), seed=2, num_samples=64_000, block_samples=100, window_blocks=8)
    for window in order.reshape(8, 800):
        runs = 1 + (np.diff(np.sort(window)) > 1).sum()
        assert runs <= 8
        assert abs(np.corrcoef(window[:-1], window[1:])[0, 1]) < 0.3


def test_the_short_block_is_another_one_in_each_epoch():
    last = {epoch_order(e, seed=0, num_samples=101, block_samples=10, window_blocks=1)[-1] for e in range(20)}
    assert len(last) > 10


def test_two_ranks_with_micro_batches_take_what_one_takes():
    whole = rank_positions(100, 24, 0, 1, 1).ravel().tolist()
    parts = [rank_positions(100, 24, rank, 2, 3) for rank in range(2)]
    assert np.concatenate([part.ravel() for part in parts]).tolist() == whole == list(range(100, 124))
    assert parts[1].tolist() == [[112, 113, 114, 115], [116, 117, 118, 119], [120, 121, 122, 123]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_at(-1, seed=0, num_samples=3), "position -1 is negative"),
        (lambda: sample_at(0, seed=0, num_samples=0), "a set of 0 samples"),
        (lambda: sample_at(0, seed=0, num_samples=3, block_samples=-2), "block_samples is -2"),
        (lambda: sample_at(0, seed=0, num_samples=3, block_samples=1, window_blocks=0), "window_blocks is 0"),
        (lambda: rank_positions(0, 30, 0, 4, 2), "multiple of 8, for example 32"),
        (lambda: rank_positions(0, 0, 0, 1, 1), "a global batch of 0 clips"),
        (lambda: rank_positions(0, 8, 4, 4, 2), "rank 4 does not exist in a world of 4"),
        (lambda: rank_positions(0, 8, 0, 4, 0), "micro_batches is 0"),
        (lambda: rank_positions(-8, 8, 0, 4, 2), "start position -8 is negative"),
        (lambda: evaluation_positions(8, -1, 4), "rank -1 does not exist"),
    ],
)
def test_impossible_requests_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


GOLDEN_FIRST_EPOCH = [2, 9, 1, 6, 0, 7, 5, 8, 3, 4]
GOLDEN_SECOND_EPOCH = [6, 4, 2, 3, 0, 8, 5, 7, 1, 9]
GOLDEN_BLOCKS = [8, 7, 9, 10, 12, 11, 13, 3, 0, 1, 4, 2, 5, 6]
GOLDEN_FAR = [486734721, 777988965, 143509909]
GOLDEN_POWER_OF_TWO = [61941, 327, 21056, 61619, 59662, 36145, 45293, 11168]
