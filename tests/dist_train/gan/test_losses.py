"""GAN losses and penalties against their formulas in the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_train.gan.losses import discriminator_loss, generator_loss, path_lengths, r1_penalty

REAL = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
FAKE = torch.tensor([-1.0, 0.0, 2.5], dtype=torch.float64)


def _mean(values) -> float:
    return sum(values) / len(values)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


DISCRIMINATOR = {
    "saturating": lambda r, f: (
        _mean([-math.log(_sigmoid(x)) for x in r]) - _mean([math.log(1 - _sigmoid(x)) for x in f])
    ),
    "non_saturating": lambda r, f: (
        _mean([-math.log(_sigmoid(x)) for x in r]) - _mean([math.log(1 - _sigmoid(x)) for x in f])
    ),
    "hinge": lambda r, f: _mean([max(0, 1 - x) for x in r]) + _mean([max(0, 1 + x) for x in f]),
    "least_squares": lambda r, f: (_mean([(x - 1) ** 2 for x in r]) + _mean([x**2 for x in f])) / 2,
}
GENERATOR = {
    "saturating": lambda f: _mean([math.log(1 - _sigmoid(x)) for x in f]),
    "non_saturating": lambda f: _mean([-math.log(_sigmoid(x)) for x in f]),
    "hinge": lambda f: _mean([-x for x in f]),
    "least_squares": lambda f: _mean([(x - 1) ** 2 for x in f]) / 2,
}


@pytest.mark.parametrize("kind", DISCRIMINATOR)
def test_losses_are_the_papers(kind):
    expected = DISCRIMINATOR[kind](REAL.tolist(), FAKE.tolist())
    assert discriminator_loss(kind, REAL, FAKE).item() == pytest.approx(expected)
    assert generator_loss(kind, FAKE).item() == pytest.approx(GENERATOR[kind](FAKE.tolist()))


@pytest.mark.parametrize("kind", DISCRIMINATOR)
def test_losses_and_their_gradients_are_finite_for_a_player_that_is_sure(kind):
    for value in (-200.0, 200.0):
        logits = torch.full((2,), value, requires_grad=True)
        (discriminator_loss(kind, logits, -logits) + generator_loss(kind, logits)).backward()
        assert torch.isfinite(logits.grad).all()


def test_r1_of_a_quadratic_discriminator_is_known():
    images = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    penalty = r1_penalty(scale * images.square().sum((1, 2, 3)), images)
    expected = (2 * 3.0 * images).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty, expected.detach())
    penalty.backward()
    torch.testing.assert_close(scale.grad, (2 * expected / 3.0).detach())


def test_path_length_of_a_linear_generator_is_the_norm_of_its_projected_jacobian():
    torch.manual_seed(0)
    jacobian = torch.randn(1 * 4 * 4, 6, dtype=torch.float64)
    styles = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    images = (styles.sum(1) @ jacobian.T).view(3, 1, 4, 4)
    noise = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    expected = [(jacobian.T @ sample.flatten() / 4).norm() for sample in noise]
    torch.testing.assert_close(path_lengths(images, styles, noise), torch.stack(expected))
