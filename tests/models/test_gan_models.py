"""GAN networks: published sizes, and layers against slow definitions of what they compute."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.gan import (
    DCGANDiscriminator,
    DCGANGenerator,
    PatchDiscriminator,
    ProjectionDiscriminator,
    ProjectionGenerator,
    ResNetGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    UNetGenerator,
)
from models.gan.stylegan2 import Blur, ModulatedConv, Upsample, minibatch_stddev


def _num_parameters(make, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make(**options).parameters())


@pytest.mark.parametrize(
    "make,options,expected",
    [
        (DCGANGenerator, {"channels": 1}, 3_574_656),
        (DCGANGenerator, {"channels": 3}, 3_576_704),
        (DCGANDiscriminator, {"channels": 1}, 2_763_520),
        (DCGANDiscriminator, {"channels": 3}, 2_765_568),
        (UNetGenerator, {}, 54_413_955),
        (UNetGenerator, {"num_downs": 7}, 41_828_995),
        (ResNetGenerator, {}, 11_378_179),
        (PatchDiscriminator, {}, 2_764_737),
        (PatchDiscriminator, {"in_channels": 6, "norm": "batch"}, 2_768_705),
        (StyleGAN2Generator, {"size": 1024}, 30_370_060),
        (StyleGAN2Discriminator, {"size": 1024}, 29_012_513),
        (StyleGAN2Generator, {"size": 256}, 30_034_338),
        (StyleGAN2Discriminator, {"size": 256}, 28_864_129),
        (StyleGAN2Generator, {"size": 256, "channel_base": 16384}, 24_767_458),
        (StyleGAN2Discriminator, {"size": 256, "channel_base": 16384}, 24_001_089),
        (StyleGAN2Generator, {"size": 32, "num_mapping_layers": 2}, 19_947_539),
    ],
)
def test_parameters_are_those_of_the_official_networks(make, options, expected):
    assert _num_parameters(make, **options) == expected


@pytest.mark.parametrize(
    "make,options,shape,giga_macs,tolerance",
    [
        (UNetGenerator, {}, (1, 3, 256, 256), 6.048, 1e-3),
        (ResNetGenerator, {}, (1, 3, 256, 256), 49.5515, 1e-3),
        (PatchDiscriminator, {}, (1, 3, 256, 256), 3.147, 1e-3),
        (PatchDiscriminator, {"in_channels": 6, "norm": "batch"}, (1, 6, 256, 256), 3.197, 1e-3),
        # The official kernel is modulated for each sample, ours scales input and output: 0.002 % apart.
        (StyleGAN2Generator, {"size": 1024}, (1, 512), 75.389, 5e-3),
    ],
)
def test_multiply_adds_are_those_of_the_official_networks(make, options, shape, giga_macs, tolerance):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make(**options)(torch.empty(shape))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=tolerance)


def test_images_come_in_the_size_and_range_they_should():
    labels = torch.tensor([0, 3])
    fakes = DCGANGenerator(channels=1, width=8)(torch.randn(2, 100))
    assert fakes.shape == (2, 1, 64, 64)
    assert DCGANDiscriminator(channels=1, width=8)(fakes).shape == (2,)
    fakes = ProjectionGenerator(size=32, num_classes=4, channels=1, width=8)(torch.randn(2, 128), labels)
    assert fakes.shape == (2, 1, 32, 32)
    assert fakes.abs().max() <= 1
    assert ProjectionDiscriminator(size=32, num_classes=4, channels=1, width=8)(fakes, labels).shape == (2,)
    images = torch.randn(2, 3, 32, 32)
    assert UNetGenerator(num_downs=5, width=4)(images).shape == images.shape
    assert ResNetGenerator(num_blocks=1, width=4)(images).shape == images.shape
    assert PatchDiscriminator(width=4)(images).shape == (2, 1, 2, 2)


def test_a_conditional_network_answers_to_the_label():
    generator = ProjectionGenerator(size=16, num_classes=3, channels=1, width=8)
    discriminator = ProjectionDiscriminator(size=16, num_classes=3, channels=1, width=8).eval()
    for embedding in (generator.blocks[0].norm1.scale, generator.blocks[0].norm1.shift):
        torch.nn.init.normal_(embedding.weight)
    latents = torch.randn(1, 128).expand(2, -1)
    images = generator.eval()(latents, torch.tensor([0, 1]))
    assert not torch.allclose(images[0], images[1])
    same = images[:1].expand(2, -1, -1, -1)
    logits = discriminator(same, torch.tensor([0, 1]))
    assert logits[0] != logits[1]


def test_the_discriminators_weights_have_spectral_norm_one():
    discriminator = ProjectionDiscriminator(size=16, num_classes=3, width=8)
    images = torch.randn(2, 3, 16, 16)
    for _ in range(30):
        discriminator(images, torch.tensor([0, 1]))
    for weight in (discriminator.blocks[1].conv1.weight.flatten(1), discriminator.embedding.weight):
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_a_modulated_convolution_is_a_convolution_with_a_kernel_for_each_sample(demodulate, up):
    """Equations 1 and 3 of the paper, written out; upsampling is a transposed convolution and a blur."""
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, 3, style_size=6, demodulate=demodulate, up=up).double()
    x, style = torch.randn(3, 5, 8, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    expected = []
    for sample, scales in zip(x, layer.modulation(style), strict=True):
        kernel = layer.weight / math.sqrt(5 * 9) * scales[None, :, None, None]
        if demodulate:
            kernel = kernel / torch.sqrt(kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8)
        if up:
            wide = F.conv_transpose2d(sample[None], kernel.transpose(0, 1), stride=2)
            expected.append(Blur(1, 1, gain=4.0).double()(wide)[0])
        else:
            expected.append(F.conv2d(sample[None], kernel, padding=1)[0])
    torch.testing.assert_close(layer(x, style), torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_upsampling_keeps_a_constant_and_doubles_the_size():
    constant = Upsample()(torch.full((1, 2, 8, 8), 3.0))
    assert constant.shape == (1, 2, 16, 16)
    torch.testing.assert_close(constant[:, :, 2:-2, 2:-2], torch.full((1, 2, 12, 12), 3.0))


def test_minibatch_stddev_of_runs_is_that_of_the_whole_batch():
    x = torch.randn(12, 3, 4, 4, dtype=torch.float64)
    whole = minibatch_stddev(x, group_size=2)
    for ranks in (1, 2, 3, 6):
        parts = [minibatch_stddev(share, group_size=2) for share in x.chunk(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    expected = torch.sqrt(x[4:6].var(0, unbiased=False) + 1e-8).mean()
    torch.testing.assert_close(whole[4:6, 3], expected.expand(2, 4, 4))
    with pytest.raises(ValueError, match="a batch of 5 is not a multiple"):
        minibatch_stddev(x[:5], group_size=2)


def _tiny_stylegan():
    torch.manual_seed(1)
    options = {"size": 16, "channels": 1, "channel_base": 128, "max_channels": 8}
    return StyleGAN2Generator(latent_size=8, **options).double(), StyleGAN2Discriminator(**options).double()


def test_truncation_and_mixing_move_between_styles():
    generator, _ = _tiny_stylegan()
    latents = torch.randn(2, 8, dtype=torch.float64)
    noise = [torch.zeros(1, 1, *shape, dtype=torch.float64) for shape in generator.noise_shapes()]
    styles = generator.mapping(latents)
    generator.track_mean_style(styles, decay=0.0)
    torch.testing.assert_close(generator.mean_style, styles.mean(0))
    average = generator(latents, truncation=0.0, noise=noise)
    torch.testing.assert_close(average[0], average[1])
    full = generator(latents, noise=noise)
    assert not torch.allclose(full[0], full[1])
    repeated = styles[:, None].repeat(1, generator.num_styles, 1)
    torch.testing.assert_close(generator.synthesize(repeated, noise=noise), full)


def test_stylegan_can_be_differentiated_twice():
    """R1 on the discriminator and the path length of the generator, checked against finite differences."""
    generator, discriminator = _tiny_stylegan()
    styles = generator.mapping(torch.randn(4, 8, dtype=torch.float64)).detach()
    noise = [torch.zeros(1, 1, *shape, dtype=torch.float64) for shape in generator.noise_shapes()]

    def penalty() -> torch.Tensor:
        inputs = styles[:, None].repeat(1, generator.num_styles, 1).requires_grad_()
        images = generator.synthesize(inputs, noise=noise)
        (path,) = torch.autograd.grad(images.square().sum(), inputs, create_graph=True)
        (slope,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
        return path.square().mean() + slope.square().sum()

    loss = penalty()
    for parameter in (generator.layers[1].conv.weight, discriminator.blocks[0].second.weight):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
        above = penalty().item()
        with torch.no_grad():
            parameter -= 2 * step * direction
        below = penalty().item()
        with torch.no_grad():
            parameter += step * direction
        assert (above - below) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: StyleGAN2Generator(size=48), "size is 48"),
        (lambda: StyleGAN2Discriminator(size=4), "size is 4"),
        (lambda: ProjectionGenerator(size=20, num_classes=2), "size is 20"),
        (lambda: UNetGenerator(num_downs=4), "num_downs is 4"),
        (lambda: UNetGenerator(num_downs=5, width=4)(torch.zeros(1, 3, 48, 48)), "multiples of 32"),
    ],
)
def test_a_size_that_cannot_be_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
