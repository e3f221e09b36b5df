"""The noise scale is recovered from gradients whose true noise scale is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_train.noise_scale import NUM_BLOCKS, NoiseScaleMeter

DIMENSIONS = 400


def _measure(*, noise: float, ranks: int, clips: int, steps: int, seed: int) -> NoiseScaleMeter:
    """Gradients `1 + noise * N(0, 1)` of each clip in each dimension: S = noise² d, ‖G‖² = d, noise scale noise²."""
    generator, meter = np.random.default_rng(seed), NoiseScaleMeter()
    for _ in range(steps):
        shares = 1 + noise * generator.standard_normal((ranks, DIMENSIONS)) / math.sqrt(clips)
        meter.add(
            small_square=float((shares**2).sum(1).mean()),
            big_square=float((shares.mean(0) ** 2).sum()),
            small_clips=clips,
            big_clips=ranks * clips,
        )
    return meter


@pytest.mark.parametrize("noise,ranks,clips", [(2.0, 2, 4), (10.0, 4, 8), (30.0, 8, 16)])
def test_the_true_noise_scale_lies_in_the_interval_about_as_often_as_it_says(noise, ranks, clips):
    found = [_measure(noise=noise, ranks=ranks, clips=clips, steps=300, seed=seed).estimate() for seed in range(60)]
    inside = sum(estimate.low <= noise**2 <= estimate.high for estimate in found)
    assert inside >= 51  # 57 expected of 60; below 51 in one of 200 such trials
    assert np.median([estimate.clips for estimate in found]) == pytest.approx(noise**2, rel=0.1)


def test_a_gradient_that_drowns_in_noise_has_no_upper_bound():
    estimate = _measure(noise=1000.0, ranks=2, clips=1, steps=40, seed=1).estimate()
    assert estimate.high == math.inf
    assert estimate.low >= 0


def test_memory_is_bounded_and_every_whole_block_counts():
    meter = _measure(noise=1.0, ranks=2, clips=2, steps=639, seed=2)
    assert len(meter._blocks) <= 2 * NUM_BLOCKS
    assert 620 <= meter.estimate().num_steps <= 639


def test_what_was_long_ago_is_forgotten():
    meter = _measure(noise=10.0, ranks=2, clips=2, steps=1_000, seed=2)
    shares = np.ones((2, DIMENSIONS)) + np.random.default_rng(3).standard_normal((700, 2, DIMENSIONS)) / math.sqrt(2)
    for share in shares:
        meter.add(
            small_square=float((share**2).sum(1).mean()),
            big_square=float((share.mean(0) ** 2).sum()),
            small_clips=2,
            big_clips=4,
        )
    estimate = meter.estimate()
    assert 320 <= estimate.num_steps <= 640
    assert estimate.clips == pytest.approx(1.0, rel=0.1)
    assert len(meter._blocks) <= 2 * NUM_BLOCKS


def test_too_few_steps_give_no_estimate_and_a_gradient_that_is_not_finite_is_left_out():
    meter = NoiseScaleMeter()
    assert meter.estimate() is None
    meter.add(small_square=math.nan, big_square=1.0, small_clips=1, big_clips=2)
    meter.add(small_square=2.0, big_square=1.0, small_clips=1, big_clips=2)
    assert meter.estimate() is None
    meter.add(small_square=2.5, big_square=1.5, small_clips=1, big_clips=2)
    assert meter.estimate().num_steps == 2
    meter.clear()
    assert meter.estimate() is None


def test_batches_of_the_same_size_are_refused():
    with pytest.raises(ValueError, match="small batch < big batch, got 4 and 4"):
        NoiseScaleMeter().add(small_square=1.0, big_square=1.0, small_clips=4, big_clips=4)
