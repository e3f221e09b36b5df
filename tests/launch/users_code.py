"""What a user writes: an experiment and a model of their own (as in the README)."""

from dataclasses import replace

import torch
from torch import nn

from launch.config import Experiment, ModelConfig
from launch.experiments.motion import motion_tsm


class FrameDifference(nn.Module):
    """Classifies a clip by the mean absolute difference of neighboring frames on a coarse grid."""

    def __init__(self, num_classes: int, num_segments: int) -> None:
        super().__init__()
        self.fc = nn.Linear((num_segments - 1) * 64, num_classes)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `[B, T, C, H, W]` to logits `[B, num_classes]`."""
        difference = (clips[:, 1:] - clips[:, :-1]).abs().mean(2)
        return self.fc(nn.functional.adaptive_avg_pool2d(difference, 8).flatten(1))


def frame_difference(num_classes: int, num_segments: int) -> nn.Module:
    """The model, built as `--model.name users_code:frame_difference` asks."""
    return FrameDifference(num_classes, num_segments)


def my_experiment() -> Experiment:
    """The motion experiment with another model and a shorter run."""
    base = motion_tsm()
    return replace(
        base,
        name="mine",
        model=ModelConfig(name="users_code:frame_difference"),
        training=replace(base.training, epochs=1, batch_clips=16),
    )
