"""What a GAN's players minimise. Logits are `[B]`, or `[B, 1, H, W]` of patches, positive for real.

Each loss is a mean over the logits. Everything is written on logits (softplus, not the logarithm of a sigmoid), so that
it is finite where a player is sure of itself and can be differentiated twice.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

GANLoss = Literal["saturating", "non_saturating", "hinge", "least_squares"]


def discriminator_loss(kind: GANLoss, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss, a scalar.

    `saturating` and `non_saturating`: -log D(x) - log(1 - D(G(z))) (Goodfellow et al. 2014, arXiv 1406.2661). `hinge`:
    max(0, 1 - d(x)) + max(0, 1 + d(G(z))) (Lim and Ye 2017, arXiv 1705.02894). `least_squares`: ((d(x) - 1)² +
    d(G(z))²) / 2 (Mao et al. 2017, arXiv 1611.04076).
    """
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    if kind == "least_squares":
        return ((real_logits - 1).square().mean() + fake_logits.square().mean()) / 2
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(kind: GANLoss, fake_logits: Tensor) -> Tensor:
    """The generator's loss, a scalar.

    `saturating`: log(1 - D(G(z))), the minimax game, whose gradient vanishes where the discriminator wins.
    `non_saturating`: -log D(G(z)). `hinge`: -d(G(z)). `least_squares`: (d(G(z)) - 1)² / 2.
    """
    if kind == "saturating":
        return -F.softplus(fake_logits).mean()
    if kind == "hinge":
        return -fake_logits.mean()
    if kind == "least_squares":
        return (fake_logits - 1).square().mean() / 2
    return F.softplus(-fake_logits).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """The mean over the batch of ‖∂ logits / ∂ images‖² (Mescheder et al. 2018, arXiv 1801.04406), a scalar.

    `images` `[B, C, H, W]` must require a gradient and be what the logits were computed from. StyleGAN2 adds it times
    gamma / 2, at every 16th step times 16.
    """
    (slope,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def path_lengths(images: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    """‖∂ (images · noise / √(H W)) / ∂ styles‖ of each sample, `[B]` (Karras et al. 2020, 1912.04958, section 3.2).

    Args:
        images: `[B, C, H, W]`, made from `styles`.
        styles: `[B, num_styles, style_size]` that require a gradient; lengths are averaged over the styles.
        noise: standard normal, of the images' shape.
    """
    projected = (images * noise).sum() / math.sqrt(images.shape[2] * images.shape[3])
    (slope,) = torch.autograd.grad(projected, styles, create_graph=True)
    return slope.square().sum(2).mean(1).sqrt()
