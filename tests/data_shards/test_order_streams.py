"""Every kind of stream is exactly-once in its own epochs, whoever reads it, in whatever batches, from wherever."""

import pickle
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order import evaluation_requests, rank_positions, sample_at
from data_shards.permutation import derive_keys, permute
from data_shards.sample_order import (
    PADDING,
    BalancedOrder,
    EpochOrder,
    ManifestOrder,
    OrderConfig,
    SampleOrder,
    check_start,
    epoch_positions,
    make_order,
)

SEEDS = st.integers(min_value=-(2**63), max_value=2**64)
LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)


def visits(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int, int, float]]:
    """(set, sample, epoch, weight) at each position."""
    return list(zip(*(column.tolist() for column in order.at(np.arange(start, stop))), strict=True))


def epochs_of(found: list[tuple[int, int, int, float]]) -> dict[tuple[int, int], list[int]]:
    """(set, epoch) -> its samples that count, sorted."""
    epochs: dict[tuple[int, int], list[int]] = {}
    for number, sample, epoch, weight in found:
        if weight:
            epochs.setdefault((number, epoch), []).append(sample)
    return {key: sorted(samples) for key, samples in epochs.items()}


@st.composite
def streams(draw: st.DrawFn) -> tuple[SampleOrder, int]:
    """An order of any kind, and the global batch it was made for."""
    global_batch = draw(st.integers(1, 24))
    balance = draw(st.sampled_from(["none", "classes"]))
    labels = draw(st.lists(LABELS, min_size=1, max_size=3))
    simple = balance == "none" and len(labels) == 1
    tail = draw(st.sampled_from(["wrap", "pad", "drop_last"])) if simple else "wrap"
    if tail == "drop_last" and len(labels[0]) < global_batch:
        tail = "wrap"
    config = OrderConfig(
        block_samples=draw(st.sampled_from([0, 1, 5])) if balance == "none" else 0,
        window_blocks=draw(st.integers(1, 4)),
        tail=tail,
        balance=balance,
    )
    shares = draw(st.sampled_from([(), (3, 2, 1), (0.5, 0.25, 0.01)]))[: len(labels)]
    return make_order(labels, config, seed=draw(SEEDS), global_batch_clips=global_batch, shares=shares), global_batch


LEGS = st.lists(  # (world size, micro-batches, workers, steps), each going on where the last one was stopped
    st.tuples(st.sampled_from([1, 2, 3, 8]), st.integers(1, 2), st.integers(1, 4), st.integers(0, 3)),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=12)
@given(stream=streams(), legs=LEGS, start=st.integers(0, 10**6))
def test_any_world_size_workers_and_resume_point_give_one_stream(stream, legs, start):
    check_legs(stream, legs, start)


@pytest.mark.thorough
@settings(deadline=None, max_examples=200)
@given(stream=streams(), legs=LEGS, start=st.integers(0, 10**9))
def test_many_world_sizes_workers_and_resume_points_give_one_stream(stream, legs, start):
    check_legs(stream, legs, start)


def check_legs(stream: tuple[SampleOrder, int], legs: list[tuple[int, int, int, int]], start: int) -> None:
    order, global_batch = stream
    position, taken = start * global_batch, []
    for world_size, micro_batches, workers, steps in legs:
        batch = global_batch * world_size * micro_batches  # divides evenly, and the stream does not depend on it
        requests = []
        for step in range(steps):
            for rank in range(world_size):
                requests += list(rank_positions(position + step * batch, batch, rank, world_size, micro_batches))
        by_worker = [requests[worker::workers] for worker in range(workers)]
        made = {int(request[0]): order.at(request) for worker in by_worker for request in worker}
        for request in requests:
            taken += list(zip(*(column.tolist() for column in made[int(request[0])]), strict=True))
        position += steps * batch
    assert taken == visits(order, start * global_batch, position)


@settings(deadline=None, max_examples=100)
@given(
    num_samples=st.integers(1, 200),
    global_batch=st.integers(1, 32),
    block_samples=st.sampled_from([0, 3]),
    seed=SEEDS,
    first_epoch=st.integers(0, 10**6),
)
def test_an_epoch_with_padding_has_each_sample_once_and_whole_batches(
    num_samples, global_batch, block_samples, seed, first_epoch
):
    config = OrderConfig(tail="pad", block_samples=block_samples)
    order = EpochOrder(num_samples, config, seed=seed, global_batch_clips=global_batch)
    length = order.epoch_positions
    assert length % global_batch == 0
    assert 0 <= length - num_samples < global_batch
    found = visits(order, first_epoch * length, (first_epoch + 2) * length)
    expected = list(range(num_samples))
    assert epochs_of(found) == {(0, first_epoch): expected, (0, first_epoch + 1): expected}
    filling = found[num_samples:length]
    assert [(sample, weight) for _, sample, _, weight in filling] == [
        (found[place % num_samples][1], 0.0) for place in range(len(filling))
    ]


@settings(deadline=None, max_examples=100)
@given(global_batch=st.integers(1, 32), more=st.integers(0, 200), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_an_epoch_that_drops_its_tail_has_whole_batches_of_samples_that_are_all_different(
    global_batch, more, seed, epoch
):
    num_samples = global_batch + more
    order = EpochOrder(num_samples, OrderConfig(tail="drop_last"), seed=seed, global_batch_clips=global_batch)
    length = order.epoch_positions
    assert length == num_samples // global_batch * global_batch
    found = visits(order, epoch * length, (epoch + 1) * length)
    assert {e for _, _, e, _ in found} == {epoch}
    assert len({sample for _, sample, _, _ in found}) == length
    alone = sample_at(np.arange(epoch * num_samples, epoch * num_samples + length), seed=seed, num_samples=num_samples)
    assert [sample for _, sample, _, _ in found] == alone.tolist()  # the same shuffle, cut short


def test_the_dropped_tail_is_another_one_in_each_epoch():
    order = EpochOrder(100, OrderConfig(tail="drop_last"), seed=0, global_batch_clips=64)
    dropped = [set(range(100)) - {s for _, s, _, _ in visits(order, e * 64, (e + 1) * 64)} for e in range(40)]
    assert set.union(*dropped) == set(range(100))
    assert all(len(tail) == 36 for tail in dropped)


@settings(deadline=None, max_examples=100)
@given(labels=LABELS, seed=SEEDS)
def test_balanced_classes_come_once_a_round_and_their_samples_once_an_epoch_of_the_class(labels, seed):
    order = BalancedOrder(labels, seed=seed)
    present, sizes = np.unique(labels, return_counts=True)
    rounds = 2 * int(sizes.max())
    found = order.at(np.arange(rounds * len(present)))
    by_round = labels[found.samples].reshape(rounds, len(present))
    assert (np.sort(by_round, axis=1) == present).all()
    for label, size in zip(present, sizes, strict=True):
        of_class = labels[found.samples] == label
        samples, epochs = found.samples[of_class], found.epochs[of_class]
        assert (epochs == np.arange(rounds) // size).all()
        for epoch in range(rounds // int(size)):
            assert (np.sort(samples[epochs == epoch]) == np.flatnonzero(labels == label)).all()


def test_balanced_classes_change_their_order_from_round_to_round_and_epoch_to_epoch():
    labels = np.repeat(np.arange(10), 20)
    found = BalancedOrder(labels, seed=3).at(np.arange(10 * 40))
    assert len({tuple(row) for row in labels[found.samples].reshape(40, 10).tolist()}) == 40
    of_class = found.samples[labels[found.samples] == 4]
    assert sorted(of_class[:20]) == sorted(of_class[20:])
    assert of_class[:20].tolist() != of_class[20:].tolist()


def test_a_balanced_round_far_away_is_as_cheap_and_as_exact():
    labels = np.repeat(np.arange(7), [1, 2, 3, 50, 60, 700, 8000])
    order = BalancedOrder(labels, seed=1)
    found = order.at(np.arange(7 * 10**15, 7 * 10**15 + 7 * 8000))
    assert np.bincount(labels[found.samples]).tolist() == [8000] * 7
    largest = found.samples[labels[found.samples] == 6]
    assert np.bincount(largest, minlength=len(labels))[labels == 6].max() <= 2  # a part of two epochs of the class


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=30), seed=SEEDS)
def test_a_permutation_of_sizes_in_one_call_is_that_of_each_alone(sizes, seed):
    indices = np.array([size - 1 for size in sizes])
    keys = derive_keys(seed, np.arange(len(sizes)))
    together = permute(indices, np.array(sizes), keys=keys)
    alone = [int(permute(indices[n : n + 1], sizes[n], keys=keys[n : n + 1])[0]) for n in range(len(sizes))]
    assert together.tolist() == alone


def test_a_padded_evaluation_gives_all_ranks_as_many_equal_batches_and_counts_each_sample_once():
    for num_samples, world_size, batch in ((100, 3, 8), (5, 4, 2), (2, 4, 4), (64, 2, 16), (0, 2, 4), (1, 1, 1)):
        seen, shapes = [], set()
        for rank in range(world_size):
            requests = evaluation_requests(num_samples, rank, world_size, batch, pad=True)
            stop = num_samples * (rank + 1) // world_size
            order = ManifestOrder([num_samples], stop=stop)
            found = [order.at(np.arange(start, start + clips)) for start, clips in requests]
            shapes.add(tuple(len(part.samples) for part in found))
            seen += [sample for part in found for sample in part.samples.tolist() if sample != PADDING]
            assert all(((part.samples != PADDING) == part.weights).all() for part in found)
        assert seen == list(range(num_samples))
        assert len(shapes) == 1
        assert set(*shapes) <= {batch}


def test_an_evaluation_without_padding_ends_with_a_smaller_batch():
    assert evaluation_requests(10, 1, 2, 4, pad=False) == [(5, 4), (9, 1)]
    assert evaluation_requests(1, 0, 2, 4, pad=False) == []


def test_an_evaluation_of_several_sets_goes_through_one_after_the_other():
    found = ManifestOrder([2, 1, 3]).at(np.arange(6))
    assert found.sets.tolist() == [0, 0, 1, 2, 2, 2]
    assert found.samples.tolist() == [0, 1, 0, 0, 1, 2]


def test_the_orders_of_a_seed_never_change():
    """Checkpoints hold a position only: another order under the same seed would break each resume."""
    labels = np.array([0, 1, 1, 0, 2, 1])
    balanced = BalancedOrder(labels, seed=0).at(np.arange(9)).samples.tolist()
    mixed = make_order([labels, labels[:3]], OrderConfig(), seed=0, global_batch_clips=4, shares=(0.6, 0.4))
    found = mixed.at(np.arange(10))
    assert balanced == GOLDEN_BALANCED
    assert found.sets.tolist() == GOLDEN_SETS
    assert found.samples.tolist() == GOLDEN_SAMPLES
    many = BalancedOrder(np.arange(6000) % 7 % 5, seed=0).at(np.arange(6000)).samples  # one that has to be sorted
    assert zlib.crc32(many.astype("<i8").tobytes()) == GOLDEN_MANY


@pytest.mark.parametrize("config", [OrderConfig(), OrderConfig(block_samples=1000), OrderConfig(tail="pad")])
def test_a_billion_samples_take_no_memory(config):
    order = EpochOrder(10**9, config, seed=0, global_batch_clips=64)
    assert len(pickle.dumps(order)) < 1000
    positions = np.arange(9 * 10**8, 9 * 10**8 + 64)
    order.at(positions)
    tracemalloc.start()
    order.at(positions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrderConfig(tail="stop"), "tail is 'stop', it must be"),
        (lambda: OrderConfig(balance="yes", block_samples=-1), "block_samples is -1.*; balance is 'yes'"),
        (lambda: OrderConfig(window_blocks=0), "window_blocks is 0"),
        (lambda: OrderConfig(balance="classes", tail="pad"), 'tail is "pad", but classes end their epochs'),
        (lambda: OrderConfig(balance="classes", block_samples=8), "block_samples is 8, but neighbours"),
        (lambda: epoch_positions(7, "drop_last", 8), "7 samples are less than one global batch of 8"),
        (lambda: epoch_positions(0, "wrap", 8), "a set of 0 samples has no order"),
        (lambda: BalancedOrder(np.zeros(0, int), seed=0), "a set of 0 samples has no order"),
        (
            lambda: make_order([np.zeros(3)] * 2, OrderConfig(tail="pad"), seed=0, global_batch_clips=1),
            "2 sets end their epochs at different places",
        ),
        (
            lambda: make_order([np.zeros(3)] * 2, OrderConfig(), seed=0, global_batch_clips=1, shares=[1]),
            "1 shares are given for 2 sets",
        ),
        (lambda: check_start(12, OrderConfig(tail="drop_last"), 8), "position 12 is not the start of a global batch"),
    ],
)
def test_orders_that_cannot_be_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stream_that_wraps_may_start_anywhere():
    check_start(13, OrderConfig(), 8)
    check_start(16, OrderConfig(tail="pad"), 8)


GOLDEN_BALANCED = [4, 0, 5, 3, 4, 1, 3, 4, 2]
GOLDEN_SETS = [1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
GOLDEN_SAMPLES = [1, 2, 4, 0, 1, 2, 5, 0, 0, 3]
GOLDEN_MANY = 766508059
