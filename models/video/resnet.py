"""ResNet-18/34/50/101 image networks, with torchvision's module names and therefore its `state_dict` keys.

The networks are He et al. 2015 (arXiv 1512.03385, Table 1) in the v1.5 form that torchvision ships: the
stride of a bottleneck is on its 3x3 convolution. `width` and `stem_stride` scale the same network down to
small clips and laptops; their defaults are the published network. Nothing here knows about time, except
that every residual block keeps a parameter-free `shift` in front of its first convolution, which is the
identity here and which `models.video.tsm` sets.

    from models.video.resnet import resnet50
    logits_NK = resnet50(num_classes=1000)(torch.rand(2, 3, 224, 224))

Shapes: N frames, C channels, H height, W width, K classes.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal, TypedDict, Unpack

from torch import Tensor, nn

Depth = Literal[18, 34, 50, 101]
StemStride = Literal[4, 2, 1]

STANDARD_WIDTH = 64


class BackboneOptions(TypedDict, total=False):
    """What every network of this package accepts beyond its own arguments; see `ResNet` for the meaning."""

    width: int
    stem_stride: StemStride
    in_channels: int
    zero_init_residual: bool


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)


class ResidualBlock(nn.Module):
    """What the two kinds of block share: `relu(identity(x) + branch(shift(x)))`.

    `shift` holds no parameters and no buffers, so it adds nothing to the `state_dict`. With
    `shift_identity` the shortcut sees the shifted input too (the "in-place" variant of the TSM paper,
    Figure 3a).
    """

    expansion: ClassVar[int]
    downsample: nn.Module | None

    def __init__(self, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.shift: nn.Module = nn.Identity()
        self.shift_identity = False
        self.relu = nn.ReLU(inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        """The convolutions of the residual branch, up to the last normalization."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalization that ends the branch: its weight is what `zero_init_residual` sets to zero."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.shift(x))

    def join(self, x: Tensor, shifted: Tensor) -> Tensor:
        """The block after its shift; `shifted` is `x` with some channels taken from another time."""
        identity = shifted if self.shift_identity else x
        if self.downsample is not None:
            identity = self.downsample(identity)
        return self.relu(self.branch(shifted).add_(identity))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(stride=stride)
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (it strides: v1.5) and 1x1 convolutions, 4 times wider at the end (ResNet-50 and 101)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, downsample: nn.Module | None) -> None:
        super().__init__(stride=stride)
        self.conv1 = _convolution(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = _convolution(channels, channels * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3


_LAYOUTS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """An image classifier: float frames `[N, C, H, W]` to logits `[N, num_classes]`.

    Args:
        depth: 18, 34, 50 or 101.
        num_classes: outputs of `fc`.
        width: channels of the first stage; 64 is the published network, the later stages have 2, 4 and 8
            times as many.
        stem_stride: by how much the stem reduces height and width before the first stage. 4 is the
            published stem (7x7 stride 2, then max-pooling), the only one into which ImageNet weights load.
            2 and 1 are a 3x3 convolution of that stride without max-pooling, for small frames: 64-pixel
            clips keep 4x4 positions in the last stage with 2 (2x2 with 4), and CIFAR networks use 1.
        in_channels: channels of a frame: 3 for RGB, 10 for TSN's stacks of five optical-flow fields.
        zero_init_residual: start the last normalization of every block at weight 0, so that each block
            starts as the identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1; needed for very large
            batches).
        dropout: probability on the features before `fc`.

    Raises:
        ValueError: for a depth, width, stem stride or dropout outside of what is described above.
    """

    def __init__(
        self,
        depth: Depth,
        *,
        num_classes: int,
        width: int = STANDARD_WIDTH,
        stem_stride: StemStride = 4,
        in_channels: int = 3,
        zero_init_residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth not in _LAYOUTS:
            raise ValueError(f"depth={depth}: there is no such ResNet here; choose one of {sorted(_LAYOUTS)}")
        for name, value in (("num_classes", num_classes), ("width", width), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride={stem_stride}: choose 4 (the published stem), 2 or 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        block, num_blocks = _LAYOUTS[depth]
        self.stem_stride = stem_stride
        if stem_stride == 4:
            self.conv1 = _convolution(in_channels, width, 7, 2)
            self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = _convolution(in_channels, width, 3, stem_stride)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        out_channels = [width * factor * block.expansion for factor in (1, 2, 4, 8)]
        self.layer1 = _stage(block, width, width, num_blocks[0], stride=1)
        self.layer2 = _stage(block, out_channels[0], 2 * width, num_blocks[1], stride=2)
        self.layer3 = _stage(block, out_channels[1], 4 * width, num_blocks[2], stride=2)
        self.layer4 = _stage(block, out_channels[2], 8 * width, num_blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(out_channels[3], num_classes)
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            # Nothing to draw on `meta`, where PyTorch would import its compiler for it: 4 seconds, once.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for block in self.blocks():
                nn.init.zeros_(block.last_norm.weight)

    def stages(self) -> Iterator[nn.Sequential]:
        """The four stages, from the input to the output."""
        yield from (self.layer1, self.layer2, self.layer3, self.layer4)

    def blocks(self) -> Iterator[ResidualBlock]:
        """Every residual block in the order of computation."""
        for stage in self.stages():
            for block in stage:
                assert isinstance(block, ResidualBlock)
                yield block

    def stem(self, frames_NCHW: Tensor) -> Tensor:
        """The first convolution, and the max-pooling where `stem_stride` is 4."""
        return self.maxpool(self.relu(self.bn1(self.conv1(frames_NCHW))))

    def head(self, x: Tensor) -> Tensor:
        """The last stage's output `[N, C, H, W]` to logits `[N, num_classes]`."""
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))

    def forward(self, frames_NCHW: Tensor) -> Tensor:
        x = self.stem(frames_NCHW)
        for stage in self.stages():
            x = stage(x)
        return self.head(x)


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    channels: int,
    num_blocks: int,
    *,
    stride: int,
) -> nn.Sequential:
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(_convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
    first = block(in_channels, channels, stride=stride, downsample=downsample)
    rest = (block(out_channels, channels, stride=1, downsample=None) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)


def resnet18(*, num_classes: int = 1000, **backbone: Unpack[BackboneOptions]) -> ResNet:
    """ResNet-18 on images: 11,689,512 parameters with 1000 classes."""
    return ResNet(18, num_classes=num_classes, **backbone)


def resnet34(*, num_classes: int = 1000, **backbone: Unpack[BackboneOptions]) -> ResNet:
    """ResNet-34 on images: 21,797,672 parameters with 1000 classes."""
    return ResNet(34, num_classes=num_classes, **backbone)


def resnet50(*, num_classes: int = 1000, **backbone: Unpack[BackboneOptions]) -> ResNet:
    """ResNet-50 v1.5 on images: 25,557,032 parameters with 1000 classes."""
    return ResNet(50, num_classes=num_classes, **backbone)


def resnet101(*, num_classes: int = 1000, **backbone: Unpack[BackboneOptions]) -> ResNet:
    """ResNet-101 v1.5 on images: 44,549,160 parameters with 1000 classes."""
    return ResNet(101, num_classes=num_classes, **backbone)
