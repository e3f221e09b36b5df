"""From the uint8 clips of a batch to what a model takes, on the device: normalised frames, or differences of frames."""

from __future__ import annotations

import functools

import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(clips: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, T, 3, H, W]` to float32 of zero mean and unit variance (ImageNet's), same shape and memory layout."""
    mean, scale = _statistics(clips.device)
    return (clips.float() - mean) * scale


def rgb_differences(clips: torch.Tensor, num_differences: int) -> torch.Tensor:
    """What moves: `[B, S * (D + 1), C, H, W]`, snippets of D + 1 frames in a row, to `[B, S, D * C, H, W]`.

    Channels are the D = `num_differences` differences of each frame and the one before it. They are of normalised
    frames, so that their mean is 0 or near it. In channels-last memory, whatever came in.
    Source: Wang et al., "Temporal Segment Networks" (ECCV 2016), section 3.2, stacked RGB difference.
    """
    snippets = clips.unflatten(1, (-1, num_differences + 1))
    differences = snippets[:, :, 1:] - snippets[:, :, :-1]
    return differences.permute(0, 1, 4, 5, 2, 3).flatten(4).permute(0, 1, 4, 2, 3)


@functools.cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / standard deviation of uint8 values, `[3, 1, 1]`; copied once: the copy waits for it."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255)
    return mean.to(device), scale.to(device)
