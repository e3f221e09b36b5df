"""DCGAN (Radford, Metz, Chintala 2015, arXiv 1511.06434), as in PyTorch's examples: 64 pixels, batch norm.

    generator, discriminator = DCGANGenerator(channels=1), DCGANDiscriminator(channels=1)
    fakes = generator(torch.randn(16, 100))           # [16, 1, 64, 64] in [-1, 1]
    logits = discriminator(fakes)                     # [16]

Weights start at N(0, 0.02), batch-norm scales at N(1, 0.02). The discriminator ends in a logit, not in a sigmoid:
`BCELoss` on probabilities has no second derivative, which gradient penalties need.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

SIZE = 64


def _initialize(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)


class DCGANGenerator(nn.Module):
    """Latents `[B, latent_size]` to images `[B, channels, 64, 64]` in [-1, 1].

    3,574,656 parameters with one channel, 3,576,704 with three, at the defaults.
    """

    def __init__(self, *, channels: int = 3, latent_size: int = 100, width: int = 64) -> None:
        super().__init__()
        self.latent_size = latent_size
        sizes = [latent_size, width * 8, width * 4, width * 2, width]
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            stride, padding = (1, 0) if number == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        _initialize(self)

    def forward(self, latents: Tensor) -> Tensor:
        """Images of the latents."""
        return self.layers(latents[:, :, None, None])


class DCGANDiscriminator(nn.Module):
    """Images `[B, channels, 64, 64]` to logits `[B]`, positive for real.

    2,763,520 parameters with one channel, 2,765,568 with three, at the defaults.
    """

    def __init__(self, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for factor in (1, 2, 4):
            layers += [
                nn.Conv2d(width * factor, width * factor * 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width * factor * 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(width * 8, 1, 4, 1, 0, bias=False))
        self.layers = nn.Sequential(*layers)
        _initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the images."""
        return self.layers(images).flatten()
