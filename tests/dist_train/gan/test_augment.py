"""Differentiable augmentation: what each part does to an image, its ranges, and its gradient."""

from __future__ import annotations

import pytest
import torch

from dist_train.gan.augment import NUM_DRAWS, augment


def _images(count: int = 400) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def _draws(count: int) -> torch.Tensor:
    return torch.rand(count, NUM_DRAWS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_translation_moves_each_image_by_at_most_an_eighth_and_fills_with_zeros():
    images = _images()
    moved = augment(images, ["translation"], _draws(400))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        shifts = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                expected = torch.zeros_like(before)
                rows, columns = slice(max(-down, 0), 16 - max(down, 0)), slice(max(-right, 0), 16 - max(right, 0))
                into = (slice(max(down, 0), 16 - max(-down, 0)), slice(max(right, 0), 16 - max(-right, 0)))
                expected[:, into[0], into[1]] = before[:, rows, columns]
                if torch.equal(after, expected):
                    shifts.append((down, right))
        assert len(shifts) == 1
        seen.update(shifts)
    assert len(seen) == 25


def test_cutout_zeroes_one_square_of_half_the_side_that_may_reach_over_the_edge():
    holes = augment(_images(), ["cutout"], _draws(400)) == 0
    sizes = set()
    for hole in holes.all(1):
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert int(hole.sum()) == len(rows) * len(columns)
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (8, 8)
    assert min(min(size) for size in sizes) >= 4


def test_color_changes_brightness_saturation_and_contrast_within_their_ranges():
    images = _images(3000)
    changed = augment(images, ["color"], _draws(3000))
    brightness = (changed - images).mean((1, 2, 3))
    assert -0.5 <= brightness.min() < -0.45
    assert 0.45 < brightness.max() <= 0.5
    gray = images.mean(1, keepdim=True)
    contrast = (changed.mean(1) - changed.mean((1, 2, 3))[:, None, None]).std((1, 2)) / (
        gray[:, 0] - gray.mean((1, 2, 3))[:, None, None]
    ).std((1, 2))
    assert 0.5 <= contrast.min() < 0.55
    assert 1.45 < contrast.max() <= 1.5
    saturation = (changed - changed.mean(1, keepdim=True)).std((1, 2, 3)) / (images - gray).std((1, 2, 3)) / contrast
    assert 0 <= saturation.min() < 0.05
    assert 1.95 < saturation.max() <= 2


def test_the_gradient_reaches_the_images():
    images = _images(4).requires_grad_()
    policy = ("color", "translation", "cutout")
    augment(images, policy, _draws(4)).square().sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert torch.autograd.gradcheck(
        lambda x: augment(x, policy, _draws(1)), images[:1, :, :4, :4].detach().requires_grad_()
    )


def test_an_unknown_augmentation_is_named():
    with pytest.raises(ValueError, match="'colour' is unknown"):
        augment(_images(1), ["colour"], _draws(1))
