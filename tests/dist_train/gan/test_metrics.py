"""FID and KID against direct computation on all samples, on one rank and on several."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_train.collectives import Collectives
from dist_train.gan.metrics import MomentMeter, frechet_distance, kernel_distance
from dist_train.world import World
from tests.ranks import run_ranks


def _features(count: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 5, generator=generator) @ torch.diag(torch.arange(1.0, 6.0)) + shift


def _moments(world, features):
    meter = MomentMeter("toy", features.shape[1])
    for part in features[world.rank :: world.world_size].split(7):
        meter.add(part)
    return meter.moments(Collectives(world))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_moments_over_ranks_are_numpys_over_all_samples(world_size):
    features = _features(100, 3.0)
    for moments in run_ranks(_moments, world_size, features):
        assert moments.num_samples == 100
        np.testing.assert_allclose(moments.mean, features.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(features.double().numpy().T), rtol=1e-9)


def test_the_distance_of_gaussians_with_diagonal_covariance_is_known():
    one, other = _moments(World(), _features(50)), _moments(World(), _features(50))
    assert frechet_distance(one, other) == pytest.approx(0.0, abs=1e-9)
    identity = torch.eye(5, dtype=torch.float64)
    moved = type(one)(
        name="toy", num_samples=9, mean=torch.full((5,), 2.0, dtype=torch.float64), covariance=4 * identity
    )
    origin = type(one)(name="toy", num_samples=9, mean=torch.zeros(5, dtype=torch.float64), covariance=identity)
    assert frechet_distance(origin, moved) == pytest.approx(5 * 4 + 5 * (2 - 1) ** 2)


def test_the_root_of_the_product_is_the_general_one():
    one, other = _moments(World(), _features(60)), _moments(World(), _features(80, 1.0))
    values = torch.linalg.eigvals(one.covariance @ other.covariance).real.clamp(min=0).sqrt().sum()
    expected = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * values
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-9)


def test_fewer_samples_than_features_are_fine_and_other_networks_are_not():
    few = _moments(World(), _features(3))
    assert np.isfinite(frechet_distance(few, _moments(World(), _features(4))))
    with pytest.raises(ValueError, match="'toy' and 'inception' do not compare"):
        frechet_distance(few, type(few)(name="inception", num_samples=3, mean=few.mean, covariance=few.covariance))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        _moments(World(), _features(1))


def test_kid_is_the_unbiased_estimate():
    x, y = _features(40).double(), _features(41, 1.0).double()[:40]
    kernel = lambda a, b: (float(a @ b) / 5 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / len(pairs)
    expected = within - 2 * sum(kernel(a, b) for a in x for b in y) / 1600
    mean, spread = kernel_distance(x, y, num_subsets=3, subset_size=100)
    assert mean == pytest.approx(expected)
    assert spread == pytest.approx(0.0, abs=1e-6 * abs(expected))
    same, deviation = kernel_distance(_features(600), _features(601)[:600], num_subsets=50, subset_size=200)
    assert abs(same) < 4 * deviation
    with pytest.raises(ValueError, match="got 1 and 40"):
        kernel_distance(x[:1], y)
