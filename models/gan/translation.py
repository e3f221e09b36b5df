"""Image to image: the networks of pix2pix (Isola et al. 2017, arXiv 1611.07004) and CycleGAN (Zhu et al. 2017, arXiv
1703.10593).

`UNetGenerator` with batch norm and dropout is pix2pix's, `ResNetGenerator` with instance norm is CycleGAN's, and
`PatchDiscriminator` judges patches of 70 pixels for both. Weights start at N(0, 0.02), batch-norm scales at N(1, 0.02).
Images are in [-1, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "instance"]


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.InstanceNorm2d(channels)


def _initialize(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)


class _UNetLevel(nn.Module):
    """One level of the U: down, the levels below, up; its input is joined to its output."""

    def __init__(self, channels: int, inner: int, below: _UNetLevel | None, norm: Norm, dropout: float) -> None:
        super().__init__()
        bias = norm == "instance"
        self.down = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(channels, inner, 4, 2, 1, bias=bias))
        if below is not None:
            self.down.append(_norm(norm, inner))
        self.below = below
        self.up = nn.Sequential(
            nn.ReLU(),
            nn.ConvTranspose2d(inner * (1 if below is None else 2), channels, 4, 2, 1, bias=bias),
            _norm(norm, channels),
        )
        if dropout:
            self.up.append(nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.down(x)
        if self.below is not None:
            inside = self.below(inside)
        return torch.cat([x, self.up(inside)], dim=1)


class UNetGenerator(nn.Module):
    """pix2pix's generator: `[B, in_channels, S, S]` to `[B, out_channels, S, S]` with S a multiple of 2 ** `num_downs`.

    54,413,955 parameters with 8 levels (256 pixels), 41,828,995 with 7 (128 pixels), at the defaults. Its dropout is
    the noise of the conditional GAN, in training and in testing alike.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        num_downs: int = 8,
        width: int = 64,
        norm: Norm = "batch",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if num_downs < 5:
            raise ValueError(f"num_downs is {num_downs}: the U-Net has at least 5 levels (images of 32 pixels)")
        self.multiple = 2**num_downs
        level = _UNetLevel(width * 8, width * 8, None, norm, 0.0)
        for _ in range(num_downs - 5):
            level = _UNetLevel(width * 8, width * 8, level, norm, dropout)
        for factor in (4, 2, 1):
            level = _UNetLevel(width * factor, width * factor * 2, level, norm, 0.0)
        self.down = nn.Conv2d(in_channels, width, 4, 2, 1, bias=norm == "instance")
        self.below = level
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(width * 2, out_channels, 4, 2, 1), nn.Tanh())
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Translated images, in [-1, 1]."""
        if images.shape[-1] % self.multiple or images.shape[-2] % self.multiple:
            raise ValueError(f"the U-Net takes sides that are multiples of {self.multiple}, got {tuple(images.shape)}")
        return self.up(self.below(self.down(images)))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "instance"
        self.branch = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            _norm(norm, channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=bias),
            _norm(norm, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ResNetGenerator(nn.Module):
    """CycleGAN's generator: `[B, in_channels, S, S]` to `[B, out_channels, S, S]` with S a multiple of 4.

    11,378,179 parameters and 49.55 GMACs at 256 pixels with 9 blocks and instance norm, the defaults.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        num_blocks: int = 9,
        width: int = 64,
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(in_channels, width, 7, bias=bias),
            _norm(norm, width),
            nn.ReLU(),
        ]
        for channels in (width, width * 2):
            layers += [
                nn.Conv2d(channels, channels * 2, 3, 2, 1, bias=bias),
                _norm(norm, channels * 2),
                nn.ReLU(),
            ]
        layers += [_ResidualBlock(width * 4, norm) for _ in range(num_blocks)]
        for channels in (width * 4, width * 2):
            layers += [
                nn.ConvTranspose2d(channels, channels // 2, 3, 2, 1, output_padding=1, bias=bias),
                _norm(norm, channels // 2),
                nn.ReLU(),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, out_channels, 7), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Translated images, in [-1, 1]."""
        return self.layers(images)


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches, `[B, in_channels, S, S]` to `[B, 1, S/8 - 2, S/8 - 2]`; 70 pixels each by default.

    2,764,737 parameters for 3 channels with instance norm (CycleGAN), 2,768,705 for 6 with batch norm (pix2pix, which
    judges input and output side by side).
    """

    def __init__(self, *, in_channels: int = 3, width: int = 64, num_layers: int = 3, norm: Norm = "instance") -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for number in range(1, num_layers + 1):
            wider, stride = width * min(2**number, 8), 2 if number < num_layers else 1
            layers += [nn.Conv2d(channels, wider, 4, stride, 1, bias=bias), _norm(norm, wider), nn.LeakyReLU(0.2)]
            channels = wider
        layers.append(nn.Conv2d(channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the patches, positive for real."""
        return self.layers(images)
