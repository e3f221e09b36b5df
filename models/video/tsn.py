"""Temporal Segment Networks: an image network on each frame of a clip, and the mean of the frames' logits.

Wang et al. 2016 (arXiv 1608.00859), with the settings of the TSM repository: average consensus of the
logits before the softmax, dropout 0.5 before `fc`, `fc` drawn from N(0, 0.001). A TSN has no temporal
modeling: it gives the same answer for the frames in any order, which makes it the control of every TSM
experiment.

    from models.video import tsn_resnet50
    logits_BK = tsn_resnet50(num_classes=400)(torch.rand(2, 8, 3, 224, 224))

Shapes: B clips, T segments (one frame each), C channels, H height, W width, K classes. The `state_dict`
keys are exactly torchvision's ResNet keys. Clips whose storage is B T H W C (channels-last frames) stay so,
without a copy.
"""

from typing import Unpack

from torch import Tensor, nn

from models.video.resnet import BackboneOptions, Depth, ResNet

HEAD_INIT_STD = 0.001


def frames_of(clips_BTCHW: Tensor) -> Tensor:
    """Clips `[B, T, C, H, W]` as frames `[B * T, C, H, W]` in the same memory format.

    A view wherever one exists; where none does (a slice along T, say) the copy keeps channels-last frames
    channels-last, which a plain `flatten` would not.
    """
    if clips_BTCHW.stride(2) == 1 and clips_BTCHW.shape[2] > 1:
        return clips_BTCHW.movedim(2, -1).flatten(0, 1).movedim(-1, 1)
    return clips_BTCHW.flatten(0, 1)


class TSN(ResNet):
    """A clip classifier: float clips `[B, T, C, H, W]`, normalized, to logits `[B, num_classes]`.

    It is a `ResNet` rather than holding one because the `state_dict` keys are to be the ResNet's own.

    Args:
        depth: 18, 34, 50 or 101.
        num_classes: outputs of `fc`.
        num_segments: frames of a clip; clips of another length are refused. None accepts any length, as the
            TSN of the TSM paper needs, which trains on 5 segments and is tested on 8.
        dropout: probability on the features before `fc`.
        backbone: `width`, `stem_stride`, `in_channels`, `zero_init_residual`; see `ResNet`.

    Raises:
        ValueError: at construction for an option out of range; in `forward` for clips of another shape or
            dtype.
    """

    def __init__(
        self,
        depth: Depth,
        *,
        num_classes: int,
        num_segments: int | None = None,
        dropout: float = 0.5,
        **backbone: Unpack[BackboneOptions],
    ) -> None:
        super().__init__(depth, num_classes=num_classes, dropout=dropout, **backbone)
        if num_segments is not None and num_segments < 1:
            raise ValueError(f"num_segments={num_segments}: a clip has at least 1 frame")
        self.num_segments = num_segments
        if not self.fc.weight.is_meta:
            nn.init.normal_(self.fc.weight, std=HEAD_INIT_STD)
        nn.init.zeros_(self.fc.bias)

    def _check_clips(self, clips: Tensor) -> None:
        channels = self.conv1.in_channels
        if clips.ndim != 5 or clips.shape[2] != channels:
            raise ValueError(
                f"expected clips [B, T, {channels}, H, W], got the shape {tuple(clips.shape)}; "
                "one frame or one clip alone needs its leading dimensions of 1"
            )
        if self.num_segments is not None and clips.shape[1] != self.num_segments:
            raise ValueError(
                f"clips have {clips.shape[1]} frames, but the model was built with num_segments="
                f"{self.num_segments}; build it with num_segments={clips.shape[1]} (the weights are the same)"
            )
        if not clips.is_floating_point():
            raise ValueError(f"clips are {clips.dtype}; convert to float and normalize them before the model")

    def segment_logits(self, clips_BTCHW: Tensor) -> Tensor:
        """Logits of each segment, before the consensus: `[B, T, num_classes]`."""
        self._check_clips(clips_BTCHW)
        logits = super().forward(frames_of(clips_BTCHW))
        return logits.unflatten(0, tuple(clips_BTCHW.shape[:2]))

    def forward(self, clips_BTCHW: Tensor) -> Tensor:
        return self.segment_logits(clips_BTCHW).mean(dim=1)


def tsn_resnet18(
    *,
    num_classes: int = 400,
    num_segments: int | None = None,
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSN:
    """TSN on ResNet-18: 11,381,712 parameters with 400 classes."""
    return TSN(18, num_classes=num_classes, num_segments=num_segments, dropout=dropout, **backbone)


def tsn_resnet34(
    *,
    num_classes: int = 400,
    num_segments: int | None = None,
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSN:
    """TSN on ResNet-34: 21,489,872 parameters with 400 classes."""
    return TSN(34, num_classes=num_classes, num_segments=num_segments, dropout=dropout, **backbone)


def tsn_resnet50(
    *,
    num_classes: int = 400,
    num_segments: int | None = None,
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSN:
    """TSN on ResNet-50: 24,327,632 parameters with 400 classes, 32.70 GMACs at 8x224x224."""
    return TSN(50, num_classes=num_classes, num_segments=num_segments, dropout=dropout, **backbone)


def tsn_resnet101(
    *,
    num_classes: int = 400,
    num_segments: int | None = None,
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSN:
    """TSN on ResNet-101: 43,319,760 parameters with 400 classes, 62.40 GMACs at 8x224x224."""
    return TSN(101, num_classes=num_classes, num_segments=num_segments, dropout=dropout, **backbone)
