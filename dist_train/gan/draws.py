"""Random numbers of a sample, wherever it is computed: a pure function of (seed, stream, position).

A latent drawn this way belongs to a position of the global batch and not to a rank, so that W processes train on the
latents of one process with the whole batch, and a resumed run on those of the undisturbed one. Philox is counter-based
(Salmon et al. 2011): nothing is kept, and any position is drawn at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def normal_draws(positions: Tensor, size: int, *, seed: int, stream: str) -> Tensor:
    """Standard normal numbers, `[B, size]` float32 on the host, for positions `[B]` of stream `stream`."""
    rows = [generator.standard_normal(size, dtype=np.float32) for generator in _generators(positions, seed, stream)]
    return _stacked(rows, size)


def uniform_draws(positions: Tensor, size: int, *, seed: int, stream: str) -> Tensor:
    """Uniform numbers in [0, 1), `[B, size]` float32 on the host, for positions `[B]` of stream `stream`."""
    rows = [generator.random(size, dtype=np.float32) for generator in _generators(positions, seed, stream)]
    return _stacked(rows, size)


def _generators(positions: Tensor, seed: int, stream: str) -> Iterator[np.random.Generator]:
    key = np.array([seed % 2**64, zlib.crc32(stream.encode())], dtype=np.uint64)
    for position in positions.tolist():
        yield np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, 0]))


def _stacked(rows: list[np.ndarray], size: int) -> Tensor:
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, size)
