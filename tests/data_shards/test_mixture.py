"""Sets are mixed at shares that hold in any stretch, and each set goes through its own epochs as if it were alone."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.interleaving import Interleaving, whole_shares
from data_shards.mixture import Mixture, as_mixture
from data_shards.sample_order import OrderConfig, make_order
from tests.data_shards.packed import make_split

SHARES = st.lists(st.floats(1e-3, 1.0).map(lambda share: round(share, 3)), min_size=1, max_size=9)
SEEDS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=150)
@given(shares=SHARES, seed=SEEDS, start=st.one_of(st.just(0), st.integers(0, 2**50)), length=st.integers(1, 3000))
def test_shares_hold_in_any_stretch_and_no_element_of_a_stream_is_left_out(shares, seed, start, length):
    interleaving = Interleaving(shares, seed=seed)
    streams, places = interleaving.split(np.arange(start, start + length))
    for stream, share in enumerate(shares):
        members = np.flatnonzero(streams == stream)
        assert (np.diff(places[members]) == 1).all()
        if start == 0 and members.size:
            assert places[members[0]] == 0
        expected = length * float(Fraction(interleaving.shares[stream], sum(interleaving.shares)))
        assert abs(members.size - expected) < max(interleaving.max_deviation, 1e-6), share


@settings(deadline=None, max_examples=60)
@given(shares=SHARES, seed=SEEDS, start=st.integers(0, 10**12))
def test_a_look_up_does_not_depend_on_its_neighbours(shares, seed, start):
    interleaving = Interleaving(shares, seed=seed)
    positions = np.arange(start, start + 50)
    together = np.stack(interleaving.split(positions))
    for place in (0, 17, 49):
        assert np.stack(interleaving.split(positions[place : place + 1]))[:, 0].tolist() == together[:, place].tolist()


def test_no_deviation_is_large_for_shares_that_people_choose():
    assert Interleaving([1]).max_deviation == 0
    assert Interleaving([0.5, 0.5]).max_deviation == 1
    for shares in ([0.7, 0.2, 0.1], [1] * 400, [2.0**-n for n in range(20)], [0.98, 0.01, 0.01]):
        assert Interleaving(shares).max_deviation <= 2.5
    hard = [Fraction(1, n * n) for n in range(1, 60)]
    assert Interleaving([float(share) for share in hard]).max_deviation < 4


def test_shares_are_the_decimals_they_are_written_as():
    assert whole_shares([0.7, 0.3]) == (7, 3)
    assert whole_shares([1, 1, 2]) == (1, 1, 2)
    assert whole_shares([np.float64(0.1), 1e-3]) == (100, 1)
    rounded = whole_shares([1.0, 1e-30, 1 / 3])
    assert sum(rounded) < 2**31
    assert rounded[1] == 1


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 200), min_size=2, max_size=5), seed=SEEDS, epoch=st.integers(0, 1000))
def test_sets_mixed_by_size_end_their_epochs_together(sizes, seed, epoch):
    order = make_order([np.zeros(size, int) for size in sizes], OrderConfig(), seed=seed, global_batch_clips=1)
    total = sum(sizes)
    assert order.epoch_positions == total
    found = order.at(np.arange(epoch * total, (epoch + 1) * total))
    assert set(found.epochs.tolist()) == {epoch}
    for number, size in enumerate(sizes):
        assert sorted(found.samples[found.sets == number].tolist()) == list(range(size))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    seed=SEEDS,
    block_samples=st.sampled_from([0, 4]),
    data=st.data(),
)
def test_a_set_in_a_mixture_goes_through_its_epochs_as_if_it_were_alone(sizes, seed, block_samples, data):
    shares = data.draw(st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes)))
    config = OrderConfig(block_samples=block_samples)
    order = make_order([np.zeros(n) for n in sizes], config, seed=seed, global_batch_clips=1, shares=shares)
    found = order.at(np.arange(1000))
    assert order.set_seeds[0] == seed
    assert len(set(order.set_seeds)) == len(sizes)
    for number, size in enumerate(sizes):
        alone = make_order([np.zeros(size)], config, seed=order.set_seeds[number], global_batch_clips=1)
        chosen = found.sets == number
        expected = alone.at(np.arange(chosen.sum()))
        assert (found.samples[chosen] == expected.samples).all()
        assert (found.epochs[chosen] == expected.epochs).all()


def test_classes_can_be_balanced_within_each_set_of_a_mixture():
    labels = [np.repeat([0, 1], [9, 1]), np.repeat([0, 1], [2, 4])]
    order = make_order(labels, OrderConfig(balance="classes"), seed=0, global_batch_clips=1, shares=(1, 3))
    found = order.at(np.arange(400))
    assert np.bincount(found.sets).tolist() == [100, 300]
    for number in range(2):
        of_set = labels[number][found.samples[found.sets == number]]
        assert np.bincount(of_set).tolist() == [len(of_set) // 2] * 2


@pytest.fixture
def sets(tmp_path):
    return [
        make_split(tmp_path / name, {f"{name}{n}": b"not a video" for n in range(count)})
        for name, count in (("a", 5), ("b", 3), ("c", 4))
    ]


def test_ids_count_through_the_sets_and_back(sets):
    mixture = Mixture(sets, shares=(1, 2, 3))
    assert len(mixture) == 12
    assert mixture.classes == sets[0].classes
    assert [len(labels) for labels in mixture.labels] == [5, 3, 4]
    places = [(0, sample) for sample in range(5)] + [(1, s) for s in range(3)] + [(2, s) for s in range(4)]
    assert [mixture.locate(sample_id) for sample_id in range(12)] == places
    ids = mixture.sample_ids(*(np.array(column) for column in zip(*places, strict=True)))
    assert ids.tolist() == list(range(12))
    assert mixture.sample_ids(np.array([2, 1]), np.array([-1, 0])).tolist() == [-1, 5]
    assert mixture.key(6) == "b1"
    assert mixture.describe(11) == f"{sets[2].root}/shard-000000.tar:c3"


def test_one_set_is_a_mixture_of_one_with_its_own_ids(sets):
    mixture = as_mixture(sets[0])
    assert as_mixture(mixture) is mixture
    assert [mixture.locate(sample_id) for sample_id in range(5)] == [(0, sample) for sample in range(5)]


def test_sets_that_cannot_be_mixed_say_why(sets, tmp_path):
    videos = {f"d{n}": b"x" for n in range(4)}
    fewer = make_split(tmp_path / "d", videos, labels=[0, 1, 1, 0])
    more = make_split(tmp_path / "e", videos, labels=[0, 1, 2, 3])
    for call, message in (
        (lambda: Mixture([]), "needs at least one packed split"),
        (lambda: Mixture(sets, shares=(1, 2)), "2 shares are given for 3 sets"),
        (lambda: Mixture([sets[0], fewer]), "cannot be mixed: the second lacks class 'class2'"),
        (lambda: Mixture([sets[0], more]), "cannot be mixed: the first lacks class 'class3'"),
        (lambda: Mixture(sets).locate(12), "sample 12 does not exist: the sets hold samples 0 to 11"),
        (lambda: Interleaving([0.5, 0]), "a share is 0"),
        (lambda: Interleaving([0.5, float("nan")]), "a share is nan"),
        (lambda: Interleaving([]), "no shares are given"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_neighbouring_stretches_of_a_batch_hold_the_shares_too():
    """Ranks take contiguous parts of a batch: each part is as mixed as the whole."""
    interleaving = Interleaving([0.5, 0.3, 0.2], seed=5)
    streams, _ = interleaving.split(np.arange(64 * 100))
    for part in streams.reshape(-1, 16):
        counts = np.bincount(part, minlength=3)
        assert all(abs(count - 16 * share) < 2 for count, share in zip(counts, (0.5, 0.3, 0.2), strict=True))
