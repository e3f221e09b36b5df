"""The image networks are torchvision's: keys, shapes, counts, strides; and the options that scale them down."""

import zlib

import pytest
import torch

from models.video.resnet import ResNet, resnet18, resnet34, resnet50, resnet101

RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101}

# zlib.crc32 of "\n".join(f"{key} {tuple(shape)}") over the state_dict of torchvision 0.29.2's resnetN().
TORCHVISION_LAYOUT_CRC32 = {18: 3269535270, 34: 2402879462, 50: 389688817, 101: 2172776777}

# From torchvision's `meta["num_params"]` of the ImageNet weights.
NUM_PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160}


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("depth", RESNETS)
def test_state_dict_has_the_keys_order_and_shapes_of_torchvision(depth):
    with torch.device("meta"):
        state = RESNETS[depth]().state_dict()
    layout = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())

    assert zlib.crc32(layout.encode()) == TORCHVISION_LAYOUT_CRC32[depth]


@pytest.mark.parametrize("depth", RESNETS)
def test_parameters_are_as_many_as_published(depth):
    with torch.device("meta"):
        model = RESNETS[depth]()

    assert _count(model) == NUM_PARAMETERS[depth]


def test_resnet50_needs_4089_million_multiply_adds_and_strides_in_its_3x3_convolutions(multiply_adds):
    with torch.device("meta"):
        model = resnet50()

    # v1 (the stride in the 1x1 convolution) would be 3,858 million.
    assert multiply_adds(model, 1, 3, 224, 224) == 4_089_184_256
    first = model.layer2[0]
    assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))


def test_same_seed_gives_the_same_weights_and_convolutions_are_drawn_for_relu():
    torch.manual_seed(3)
    first = resnet18(num_classes=5, width=32)
    torch.manual_seed(3)
    second = resnet18(num_classes=5, width=32)

    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    weight = first.layer4[0].conv1.weight  # 128 channels to 256
    expected_std = (2 / (256 * 9)) ** 0.5  # He et al. 2015, fan_out
    assert weight.std().item() == pytest.approx(expected_std, rel=0.02)


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_makes_every_plain_block_the_identity_at_the_start(depth):
    model = RESNETS[depth](num_classes=5, width=8, zero_init_residual=True).eval()
    ordinary = RESNETS[depth](num_classes=5, width=8).eval()
    channels = model.layer2[1].last_norm.num_features
    x = torch.rand(2, channels, 4, 4)

    assert torch.equal(model.layer2[1](x), x)
    assert not torch.equal(ordinary.layer2[1](x), x)


@pytest.mark.parametrize(("stem_stride", "positions"), [(4, 16), (2, 32), (1, 64)])
def test_stem_stride_sets_the_resolution_of_the_first_stage(stem_stride, positions):
    model = resnet18(num_classes=5, width=16, stem_stride=stem_stride)

    features = model.stem(torch.rand(1, 3, 64, 64))

    assert features.shape == (1, 16, positions, positions)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_width_scales_every_stage():
    model = resnet18(num_classes=5, width=16)

    assert [block.last_norm.num_features for block in model.blocks()] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert model.fc.in_features == 128


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (42, {}, r"depth=42: there is no such ResNet here; choose one of \[18, 34, 50, 101\]"),
        (18, {"width": 0}, "width=0: must be at least 1"),
        (18, {"stem_stride": 3}, "stem_stride=3: choose 4"),
        (18, {"dropout": 1.0}, "dropout=1.0: must be at least 0 and below 1"),
        (18, {"num_classes": 0}, "num_classes=0"),
    ],
)
def test_options_out_of_range_are_refused_with_their_value(depth, options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(depth, **{"num_classes": 5, **options})
