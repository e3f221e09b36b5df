"""GANs: plain generators and discriminators, made of operations that can be differentiated twice.

Generators take latents `[B, latent_size]` (and labels `[B]` where they are conditional), discriminators give logits
that are positive for real images. Images are `[B, C, H, W]`, in [-1, 1].
"""

from models.gan.dcgan import DCGANDiscriminator, DCGANGenerator
from models.gan.projection import ProjectionDiscriminator, ProjectionGenerator
from models.gan.stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator
from models.gan.translation import PatchDiscriminator, ResNetGenerator, UNetGenerator

__all__ = [
    "DCGANDiscriminator",
    "DCGANGenerator",
    "PatchDiscriminator",
    "ProjectionDiscriminator",
    "ProjectionGenerator",
    "ResNetGenerator",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "UNetGenerator",
]
