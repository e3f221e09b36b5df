"""StyleGAN2 (Karras et al. 2020, arXiv 1912.04958, configuration F): skip generator, residual discriminator.

    generator, discriminator = StyleGAN2Generator(size=256), StyleGAN2Discriminator(size=256)
    images = generator(torch.randn(4, 512))            # [4, 3, 256, 256], about [-1, 1]
    logits = discriminator(images)                     # [4]

Everything is made of ordinary differentiable operations, so R1 and path-length penalties (which differentiate through a
gradient) need no kernels of their own. A modulated convolution scales its input by the style and its output by the
demodulation instead of making a kernel for each sample: the same numbers, without grouped convolutions.

Learning rates are equalized: weights are N(0, 1) and scaled at run time (Karras et al. 2018, arXiv 1710.10196).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAIN = math.sqrt(2)
"""Follows every leaky ReLU, so that the variance stays 1."""


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * GAIN


class EqualizedLinear(nn.Module):
    """`x @ (weight * scale).T + bias * lr_factor`, with `weight` drawn from N(0, 1) / `lr_factor`."""

    def __init__(self, inputs: int, outputs: int, *, bias_start: float = 0.0, lr_factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_factor)
        self.bias = nn.Parameter(torch.full((outputs,), bias_start / lr_factor))
        self._scale, self._lr_factor = lr_factor / math.sqrt(inputs), lr_factor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self._scale, self.bias * self._lr_factor)


class EqualizedConv(nn.Module):
    """A convolution without bias, its weight drawn from N(0, 1) and scaled by 1 / sqrt(fan-in)."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self._scale = 1 / math.sqrt(inputs * kernel_size**2)
        self._stride, self._padding = stride, kernel_size // 2 if stride == 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self._scale, stride=self._stride, padding=self._padding)


class Blur(nn.Module):
    """The low-pass filter [1, 3, 3, 1] in both directions, after padding by `before` and `after`."""

    kernel: Tensor

    def __init__(self, before: int, after: int, *, gain: float = 1.0) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(line, line) * gain / 64, persistent=False)
        self._padding = (before, after, before, after)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(F.pad(x, self._padding), kernel, groups=channels)


class Upsample(nn.Module):
    """Twice as high and wide: zeros in between, then `Blur`."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = Blur(2, 1, gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        spread = F.pad(x[:, :, :, None, :, None], (0, 1, 0, 0, 0, 1)).reshape(batch, channels, height * 2, width * 2)
        return self.blur(spread)


class ModulatedConv(nn.Module):
    """A convolution whose input channels are scaled by a style, and whose output is brought back to variance 1.

    `demodulate` divides each output channel by the norm of its modulated kernel (equation 3 of the paper); `up` doubles
    height and width. Takes `[B, C, H, W]` and styles `[B, style_size]`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        style_size: int,
        demodulate: bool = True,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.modulation = EqualizedLinear(style_size, inputs, bias_start=1.0)
        self.blur = Blur(1, 1, gain=4.0) if up else None
        self._scale, self._padding = 1 / math.sqrt(inputs * kernel_size**2), kernel_size // 2
        self._demodulate = demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scales, weight = self.modulation(style), self.weight * self._scale
        x = x * scales[:, :, None, None]
        if self.blur is None:
            x = F.conv2d(x, weight, padding=self._padding)
        else:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        if self._demodulate:
            norms = torch.rsqrt(F.linear(scales.square(), weight.square().sum((2, 3))) + 1e-8)
            x = x * norms[:, :, None, None]
        return x


class StyledLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, *, style_size: int, up: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, style_size=style_size, up=up)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        """`noise`: `[B or 1, 1, H, W]` of this layer's output size; None draws it anew."""
        x = self.conv(x, style)
        if noise is None:
            noise = torch.randn(x.shape[0], 1, *x.shape[2:], device=x.device, dtype=x.dtype)
        return _activate(x + self.noise_strength * noise + self.bias[:, None, None])


class ToImage(nn.Module):
    """Features to image channels: a modulated 1x1 convolution without demodulation."""

    def __init__(self, inputs: int, channels: int, *, style_size: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, channels, 1, style_size=style_size, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.conv(x, style) + self.bias[:, None, None]


class MappingNetwork(nn.Module):
    """Latents `[B, latent_size]` to styles `[B, style_size]`: 8 layers that learn at a hundredth of the rate."""

    def __init__(self, *, latent_size: int = 512, style_size: int = 512, num_layers: int = 8) -> None:
        super().__init__()
        sizes = [latent_size] + [style_size] * num_layers
        self.layers = nn.ModuleList(EqualizedLinear(a, b, lr_factor=0.01) for a, b in pairwise(sizes))

    def forward(self, latents: Tensor) -> Tensor:
        x = latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.layers:
            x = _activate(layer(x))
        return x


def channels_at(size: int, *, base: int = 32768, most: int = 512) -> int:
    """Channels of the features of `size` pixels: 512 up to 64 pixels, then half at each doubling."""
    return min(base // size, most)


class StyleGAN2Generator(nn.Module):
    """Latents `[B, latent_size]` to images `[B, channels, size, size]`.

    30,370,060 parameters at 1024 pixels, 30,034,338 at 256, 24,767,458 at 256 with `channel_base` 16384.

    Args:
        size: pixels, a power of two from 8.
        channels: channels of the image.
        latent_size: length of a latent and of a style.
        num_mapping_layers: layers of the mapping network.
        channel_base: channels times pixels, before the bound of `max_channels`.
        max_channels: most channels of a layer.
    """

    mean_style: Tensor

    def __init__(
        self,
        *,
        size: int,
        channels: int = 3,
        latent_size: int = 512,
        num_mapping_layers: int = 8,
        channel_base: int = 32768,
        max_channels: int = 512,
    ) -> None:
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ValueError(f"size is {size}: StyleGAN2 makes images of 8, 16, 32, ... pixels")
        self.size, self.latent_size = size, latent_size
        self.mapping = MappingNetwork(latent_size=latent_size, style_size=latent_size, num_layers=num_mapping_layers)
        widths = [channels_at(2**k, base=channel_base, most=max_channels) for k in range(2, size.bit_length())]
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        layers = [StyledLayer(widths[0], widths[0], style_size=latent_size)]
        for before, after in pairwise(widths):
            layers.append(StyledLayer(before, after, style_size=latent_size, up=True))
            layers.append(StyledLayer(after, after, style_size=latent_size))
        self.layers = nn.ModuleList(layers)
        self.to_image = nn.ModuleList(ToImage(width, channels, style_size=latent_size) for width in widths)
        self.upsample = Upsample()
        self.register_buffer("mean_style", torch.zeros(latent_size))

    @property
    def num_styles(self) -> int:
        """Styles that `synthesize` takes: one for each layer and one for the last image."""
        return len(self.layers) + 1

    def noise_shapes(self) -> list[tuple[int, int]]:
        """Height and width of the noise of each layer."""
        return [(4, 4)] + [(2**k, 2**k) for k in range(3, self.size.bit_length()) for _ in range(2)]

    def forward(self, latents: Tensor, *, truncation: float = 1.0, noise: list[Tensor] | None = None) -> Tensor:
        """Images of the latents.

        Args:
            latents: `[B, latent_size]`.
            truncation: 1 leaves the styles; below 1 moves them towards their mean (`mean_style`).
            noise: one `[B or 1, 1, H, W]` for each of `noise_shapes`; None draws it anew.
        """
        styles = self.mapping(latents)
        if truncation != 1:
            styles = torch.lerp(self.mean_style, styles, truncation)
        return self.synthesize(styles[:, None].expand(-1, self.num_styles, -1), noise=noise)

    def synthesize(self, styles: Tensor, *, noise: list[Tensor] | None = None) -> Tensor:
        """Images of styles `[B, num_styles, latent_size]` (one for each layer, so that they can be mixed)."""
        chosen = noise if noise is not None else [None] * len(self.layers)
        x = self.layers[0](self.constant.expand(len(styles), -1, -1, -1), styles[:, 0], chosen[0])
        image = self.to_image[0](x, styles[:, 1])
        for level, to_image in enumerate(self.to_image[1:]):
            first = 1 + 2 * level
            x = self.layers[first](x, styles[:, first], chosen[first])
            x = self.layers[first + 1](x, styles[:, first + 1], chosen[first + 1])
            image = self.upsample(image) + to_image(x, styles[:, first + 2])
        return image

    @torch.no_grad()
    def track_mean_style(self, styles: Tensor, *, decay: float = 0.995) -> None:
        """Moves `mean_style` towards the mean of styles `[B, latent_size]`."""
        self.mean_style.lerp_(styles.mean(0).to(self.mean_style), 1 - decay)


def minibatch_stddev(x: Tensor, *, group_size: int = 4) -> Tensor:
    """`[B, C, H, W]` with one more channel: the standard deviation over a group of samples, averaged over all else.

    A group is `group_size` *neighbouring* samples, where the original takes every (B / group_size)-th. So the result of
    a batch cut into equal runs, one a rank, is that of the whole batch wherever a rank holds whole groups.

    Raises:
        ValueError: the batch is not a multiple of the group.
    """
    batch, channels, height, width = x.shape
    if batch % group_size:
        raise ValueError(f"minibatch stddev: a batch of {batch} is not a multiple of the group of {group_size}")
    groups = x.reshape(batch // group_size, group_size, channels, height, width)
    deviation = torch.sqrt(groups.var(1, unbiased=False) + 1e-8).mean((1, 2, 3))
    return torch.cat([x, deviation.repeat_interleave(group_size)[:, None, None, None].expand(-1, 1, height, width)], 1)


class _DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions, the second with a blur and a stride of 2, and a 1x1 shortcut; their sum over sqrt(2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = EqualizedConv(inputs, inputs, 3)
        self.first_bias = nn.Parameter(torch.zeros(inputs))
        self.blur = Blur(2, 2)
        self.second = EqualizedConv(inputs, outputs, 3, stride=2)
        self.second_bias = nn.Parameter(torch.zeros(outputs))
        self.skip_blur = Blur(1, 1)
        self.skip = EqualizedConv(inputs, outputs, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = _activate(self.first(x) + self.first_bias[:, None, None])
        y = _activate(self.second(self.blur(y)) + self.second_bias[:, None, None])
        return (y + self.skip(self.skip_blur(x))) / GAIN


class StyleGAN2Discriminator(nn.Module):
    """Images `[B, channels, size, size]` to logits `[B]`, positive for real.

    29,012,513 parameters at 1024 pixels, 28,864,129 at 256, 24,001,089 at 256 with `channel_base` 16384.
    """

    def __init__(
        self,
        *,
        size: int,
        channels: int = 3,
        channel_base: int = 32768,
        max_channels: int = 512,
        stddev_group: int = 4,
    ) -> None:
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ValueError(f"size is {size}: StyleGAN2 judges images of 8, 16, 32, ... pixels")
        widths = [channels_at(2**k, base=channel_base, most=max_channels) for k in range(size.bit_length() - 1, 1, -1)]
        self.from_image = EqualizedConv(channels, widths[0], 1)
        self.from_image_bias = nn.Parameter(torch.zeros(widths[0]))
        self.blocks = nn.Sequential(*(_DiscriminatorBlock(a, b) for a, b in pairwise(widths)))
        self.last = EqualizedConv(widths[-1] + 1, widths[-1], 3)
        self.last_bias = nn.Parameter(torch.zeros(widths[-1]))
        self.hidden = EqualizedLinear(widths[-1] * 16, widths[-1])
        self.logit = EqualizedLinear(widths[-1], 1)
        self._stddev_group = stddev_group

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images; the batch must hold whole groups of `stddev_group`."""
        x = self.blocks(_activate(self.from_image(images) + self.from_image_bias[:, None, None]))
        x = minibatch_stddev(x, group_size=self._stddev_group)
        x = _activate(self.last(x) + self.last_bias[:, None, None])
        return self.logit(_activate(self.hidden(x.flatten(1)))).squeeze(1)
