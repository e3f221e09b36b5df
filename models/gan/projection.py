"""A class-conditional ResNet GAN: spectral norm (Miyato et al. 2018, arXiv 1802.05957) and projection (Miyato and
Koyama 2018, arXiv 1802.05637), with the networks that the papers use at 32 pixels, for any power of two.

    generator = ProjectionGenerator(size=32, num_classes=10, channels=1)
    discriminator = ProjectionDiscriminator(size=32, num_classes=10, channels=1)
    images = generator(torch.randn(8, 128), labels)    # [8, 1, 32, 32] in [-1, 1]
    logits = discriminator(images, labels)             # [8]

The generator is told the class by the scales and shifts of its batch norm, the discriminator by an inner product of its
features with an embedding of the class. Every weight of the discriminator has spectral norm 1 by one step of power
iteration at each forward pass in training (its vectors u are buffers: ranks that see the same number of forward
passes keep the same u, since the iteration looks at the weight alone).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift are rows of an embedding: `[B, C, H, W]` and labels `[B]` to `[B, C, H, W]`."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Embedding(num_classes, channels)
        self.shift = nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.norm(x) * self.scale(labels)[:, :, None, None] + self.shift(labels)[:, :, None, None]


def _xavier(layer: nn.Conv2d, gain: float) -> nn.Conv2d:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class _GeneratorBlock(nn.Module):
    """Twice the size: norm, ReLU, upsample, 3x3; norm, ReLU, 3x3; the shortcut upsampled through a 1x1."""

    def __init__(self, inputs: int, outputs: int, num_classes: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(inputs, num_classes), ConditionalBatchNorm(outputs, num_classes)
        self.conv1 = _xavier(nn.Conv2d(inputs, outputs, 3, padding=1), math.sqrt(2))
        self.conv2 = _xavier(nn.Conv2d(outputs, outputs, 3, padding=1), math.sqrt(2))
        self.skip = _xavier(nn.Conv2d(inputs, outputs, 1), 1.0)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.conv1(F.interpolate(F.relu(self.norm1(x, labels)), scale_factor=2))
        y = self.conv2(F.relu(self.norm2(y, labels)))
        return y + self.skip(F.interpolate(x, scale_factor=2))


class ProjectionGenerator(nn.Module):
    """Latents `[B, latent_size]` and labels `[B]` to images `[B, channels, size, size]` in [-1, 1]."""

    def __init__(
        self, *, size: int, num_classes: int, channels: int = 3, latent_size: int = 128, width: int = 256
    ) -> None:
        super().__init__()
        self.latent_size, self.width = latent_size, width
        self.first = nn.Linear(latent_size, 16 * width)
        nn.init.xavier_uniform_(self.first.weight)
        self.blocks = nn.ModuleList(_GeneratorBlock(width, width, num_classes) for _ in range(_doublings(size)))
        self.norm = nn.BatchNorm2d(width)
        self.last = _xavier(nn.Conv2d(width, channels, 3, padding=1), 1.0)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        x = self.first(latents).unflatten(1, (self.width, 4, 4))
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.last(F.relu(self.norm(x))))


class _DiscriminatorBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, and half the size where `down`; a 1x1 shortcut where shape changes.

    The first block of the network has no ReLU in front: its input is the image.
    """

    def __init__(self, inputs: int, outputs: int, *, down: bool, first: bool = False) -> None:
        super().__init__()
        self.conv1 = spectral_norm(_xavier(nn.Conv2d(inputs, outputs, 3, padding=1), math.sqrt(2)))
        self.conv2 = spectral_norm(_xavier(nn.Conv2d(outputs, outputs, 3, padding=1), math.sqrt(2)))
        self.skip = spectral_norm(_xavier(nn.Conv2d(inputs, outputs, 1), 1.0)) if down or inputs != outputs else None
        self._down, self._first = down, first

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x if self._first else F.relu(x))))
        skip = x if self.skip is None else self.skip(x)
        if self._down:
            y, skip = F.avg_pool2d(y, 2), F.avg_pool2d(skip, 2)
        return y + skip


class ProjectionDiscriminator(nn.Module):
    """Images `[B, channels, size, size]` and labels `[B]` to logits `[B]`, positive for real.

    Blocks halve the size down to 8 pixels, two more keep it; features are summed over the image.
    """

    def __init__(self, *, size: int, num_classes: int, channels: int = 3, width: int = 128) -> None:
        super().__init__()
        halvings = _doublings(size) - 1
        sizes = [channels] + [width] * (halvings + 2)
        self.blocks = nn.Sequential(
            *(
                _DiscriminatorBlock(inputs, outputs, down=number < halvings, first=number == 0)
                for number, (inputs, outputs) in enumerate(pairwise(sizes))
            )
        )
        self.logit = spectral_norm(nn.Linear(width, 1))
        self.embedding = spectral_norm(nn.Embedding(num_classes, width))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = F.relu(self.blocks(images)).sum((2, 3))
        return self.logit(features).squeeze(1) + (self.embedding(labels) * features).sum(1)


def _doublings(size: int) -> int:
    """Doublings from 4 pixels to `size`."""
    if size < 16 or size & (size - 1):
        raise ValueError(f"size is {size}: use 16, 32, 64, ... pixels")
    return size.bit_length() - 3
