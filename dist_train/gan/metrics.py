"""FID and KID over all ranks: each sample's features are counted once, and the result does not depend on the ranks.

Features come from any network that maps images to `[N, D]`. Only features of Inception-v3 make these the published
measures; whose they were is for the caller to say (`name` of a `Moments`), and two different names do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_train.collectives import Collectives


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean `[D]` and covariance `[D, D]` of features, in float64 on the host."""

    name: str
    """The network that made the features."""
    num_samples: int
    """Samples behind them."""
    mean: Tensor
    """Mean feature."""
    covariance: Tensor
    """Covariance, divided by `num_samples - 1`."""

    @classmethod
    def of_sums(cls, name: str, num_samples: int, total: Tensor, outer: Tensor) -> Moments:
        """From the sum `[D]` and the sum of outer products `[D, D]` over the samples, in float64.

        Raises:
            ValueError: fewer than two samples.
        """
        if num_samples < 2:
            raise ValueError(f"FID needs at least two samples, got {num_samples}")
        mean = total.cpu() / num_samples
        covariance = (outer.cpu() - num_samples * torch.outer(mean, mean)) / (num_samples - 1)
        return cls(name=name, num_samples=num_samples, mean=mean, covariance=covariance)


class MomentMeter:
    """Adds up features batch by batch; `moments` adds up the ranks. Memory: D² + D numbers in float64."""

    def __init__(self, name: str, num_features: int, device: torch.device | None = None) -> None:
        self._name = name
        self._sums = torch.zeros(1 + num_features + num_features**2, dtype=torch.float64, device=device)
        self._size = num_features

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Counts features `[N, D]`."""
        values = features.to(self._sums)
        self._sums[0] += len(values)
        self._sums[1 : 1 + self._size] += values.sum(0)
        self._sums[1 + self._size :] += (values.T @ values).flatten()

    def moments(self, collectives: Collectives) -> Moments:
        """Moments over all ranks, the same on each; ValueError below two samples. Every rank calls it."""
        sums = collectives.sum_(self._sums.clone())
        total, outer = sums[1 : 1 + self._size], sums[1 + self._size :].view(self._size, self._size)
        return Moments.of_sums(self._name, int(sums[0]), total, outer)


def frechet_distance(one: Moments, other: Moments) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) (Heusel et al. 2017, arXiv 1706.08500).

    The trace of the root comes from the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½, so no complex numbers arise and
    singular covariances (fewer samples than features) are fine.

    Raises:
        ValueError: the features come from different networks.
    """
    if one.name != other.name:
        raise ValueError(f"features of {one.name!r} and {other.name!r} do not compare: use one network for both")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    squared = (one.mean - other.mean).square().sum()
    return float(squared + one.covariance.trace() + other.covariance.trace() - 2 * between)


def kernel_distance(
    one: Tensor, other: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD with the kernel (x·y / D + 1)³.

    Args:
        one: features `[N, D]` of all ranks, in an order that does not depend on the ranks.
        other: features `[M, D]`.
        num_subsets: estimates to average.
        subset_size: samples of each set in one estimate; at most N and M.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: a set has fewer than two samples.
    """
    size = min(subset_size, len(one), len(other))
    if size < 2:
        raise ValueError(f"KID needs at least two samples of each set, got {len(one)} and {len(other)}")
    generator = torch.Generator().manual_seed(seed)
    one, other = one.double().cpu(), other.double().cpu()
    found = []
    for _ in range(num_subsets):
        x = one[torch.randperm(len(one), generator=generator)[:size]]
        y = other[torch.randperm(len(other), generator=generator)[:size]]
        within = (_off_diagonal_sum(x) + _off_diagonal_sum(y)) / (size * (size - 1))
        found.append(within - 2 * _kernel(x, y).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(unbiased=False))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_sum(x: Tensor) -> Tensor:
    values = _kernel(x, x)
    return values.sum() - values.diagonal().sum()
