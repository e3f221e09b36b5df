"""Temporal Shift Module networks: a TSN whose residual blocks exchange channels between neighboring frames.

Lin, Gan, Han 2019 (arXiv 1811.08383). The shift costs no parameter and no multiplication, so the counts are
the TSN's and the `state_dict` keys are exactly torchvision's ResNet keys: ImageNet weights load, and a
TSN's weights load into a TSM.

    from models.video import tsm_resnet50
    logits_BK = tsm_resnet50(num_classes=400, num_segments=8)(torch.rand(2, 8, 3, 224, 224))

The unidirectional network sees only the past, and runs frame by frame in `models.video.online`.
"""

from typing import Literal, Unpack

from models.video.resnet import BackboneOptions, Depth, ResidualBlock
from models.video.shift import Direction, TemporalShift, check_shift_options
from models.video.tsn import TSN

ShiftPlace = Literal["blockres", "block"]

_LAYER3_BLOCKS_TO_SKIP_EVERY_SECOND = 23


class TSM(TSN):
    """A clip classifier with temporal shifts: normalized float clips `[B, T, C, H, W]` to logits `[B, K]`.

    Args:
        depth: 18, 34, 50 or 101.
        num_classes: outputs of `fc`.
        num_segments: frames of a clip (T); clips of another length are refused.
        shift_div: 1 / shift_div of a block's input channels moves in each direction (`fold_div` of the
            repository).
        shift_place: "blockres" shifts the input of the first convolution of a block and leaves the shortcut
            alone, in every block, or in every second one of each stage where the third stage has 23 blocks
            or more (ResNet-101), as the repository's `make_temporal_shift`. "block" shifts the input of
            every whole block.
        direction: "bidirectional" for clips, "unidirectional" for streams.
        dropout: probability on the features before `fc`.
        backbone: `width`, `stem_stride`, `in_channels`, `zero_init_residual`; see `ResNet`.

    Raises:
        ValueError: for an option out of range, or a `shift_div` that would shift no channel of some block.
    """

    num_segments: int

    def __init__(
        self,
        depth: Depth,
        *,
        num_classes: int,
        num_segments: int = 8,
        shift_div: int = 8,
        shift_place: ShiftPlace = "blockres",
        direction: Direction = "bidirectional",
        dropout: float = 0.5,
        **backbone: Unpack[BackboneOptions],
    ) -> None:
        super().__init__(depth, num_classes=num_classes, num_segments=num_segments, dropout=dropout, **backbone)
        if shift_place not in ("blockres", "block"):
            raise ValueError(f"shift_place={shift_place!r}: choose blockres or block")
        check_shift_options(num_segments=num_segments, fold_div=shift_div, direction=direction)
        if self.conv1.out_channels < shift_div:
            raise ValueError(
                f"shift_div={shift_div} shifts none of the {self.conv1.out_channels} channels of the first "
                f"block; use a shift_div of {self.conv1.out_channels} or less, or a larger width"
            )
        self.direction: Direction = direction
        self._insert_shifts(shift_div, shift_place)

    def _insert_shifts(self, shift_div: int, shift_place: ShiftPlace) -> None:
        sparse = shift_place == "blockres" and len(self.layer3) >= _LAYER3_BLOCKS_TO_SKIP_EVERY_SECOND
        for stage in self.stages():
            for block in list(stage)[:: 2 if sparse else 1]:
                assert isinstance(block, ResidualBlock)
                block.shift = TemporalShift(self.num_segments, fold_div=shift_div, direction=self.direction)
                block.shift_identity = shift_place == "block"


def tsm_resnet18(
    *,
    num_classes: int = 400,
    num_segments: int = 8,
    shift_div: int = 8,
    shift_place: ShiftPlace = "blockres",
    direction: Direction = "bidirectional",
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSM:
    """TSM on ResNet-18: 11,381,712 parameters with 400 classes, 14.51 GMACs at 8x224x224."""
    return TSM(
        18,
        num_classes=num_classes,
        num_segments=num_segments,
        shift_div=shift_div,
        shift_place=shift_place,
        direction=direction,
        dropout=dropout,
        **backbone,
    )


def tsm_resnet34(
    *,
    num_classes: int = 400,
    num_segments: int = 8,
    shift_div: int = 8,
    shift_place: ShiftPlace = "blockres",
    direction: Direction = "bidirectional",
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSM:
    """TSM on ResNet-34: 21,489,872 parameters with 400 classes, 29.31 GMACs at 8x224x224."""
    return TSM(
        34,
        num_classes=num_classes,
        num_segments=num_segments,
        shift_div=shift_div,
        shift_place=shift_place,
        direction=direction,
        dropout=dropout,
        **backbone,
    )


def tsm_resnet50(
    *,
    num_classes: int = 400,
    num_segments: int = 8,
    shift_div: int = 8,
    shift_place: ShiftPlace = "blockres",
    direction: Direction = "bidirectional",
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSM:
    """TSM on ResNet-50: 24,327,632 parameters with 400 classes, 32.70 GMACs at 8x224x224."""
    return TSM(
        50,
        num_classes=num_classes,
        num_segments=num_segments,
        shift_div=shift_div,
        shift_place=shift_place,
        direction=direction,
        dropout=dropout,
        **backbone,
    )


def tsm_resnet101(
    *,
    num_classes: int = 400,
    num_segments: int = 8,
    shift_div: int = 8,
    shift_place: ShiftPlace = "blockres",
    direction: Direction = "bidirectional",
    dropout: float = 0.5,
    **backbone: Unpack[BackboneOptions],
) -> TSM:
    """TSM on ResNet-101: 43,319,760 parameters with 400 classes, 62.40 GMACs at 8x224x224."""
    return TSM(
        101,
        num_classes=num_classes,
        num_segments=num_segments,
        shift_div=shift_div,
        shift_place=shift_place,
        direction=direction,
        dropout=dropout,
        **backbone,
    )
