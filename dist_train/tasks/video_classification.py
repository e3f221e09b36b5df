"""Video classification: one phase, cross-entropy on clips.

Clips arrive as uint8 `[B, T, C, H, W]` and are normalised on the device with ImageNet's mean and standard deviation,
as the weights of torchvision and of the TSM repository expect.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_train.phases import Phase, Prediction

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(clips: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, T, 3, H, W]` to float32 of zero mean and unit variance (ImageNet's), same shape and memory layout."""
    mean, scale = _statistics(clips.device)
    return (clips.float() - mean) * scale


@functools.cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / standard deviation of uint8 values, `[3, 1, 1]`; copied once: the copy waits for it."""
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255
    scale = 1 / (torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255)
    return mean.to(device), scale.to(device)


class VideoClassification:
    """A classifier of clips. `module` maps float `[B, T, C, H, W]` to logits `[B, num_classes]`.

    A clip of weight 0 (one that could not be read, under the policy `skip`) adds nothing to the loss nor to any count.
    The mean is over the micro-batch's nominal size; the loop brings it to the clips that count on all ranks.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}: use a number from 0 to below 1")
        self.phases: Sequence[Phase] = [Phase(name="classify", module=module, optimizer=optimizer)]
        self._module = module
        self._label_smoothing = label_smoothing

    def losses(self, phase: Phase, batch: Any) -> dict[str, torch.Tensor]:
        """`cross_entropy`: with label smoothing, mean over the micro-batch."""
        logits = phase.module(normalize(batch.clips))
        losses = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self._label_smoothing, reduction="none")
        return {"cross_entropy": (losses * batch.weights).sum() / len(batch.labels)}

    def evaluation_sums(self, batch: Any) -> tuple[dict[str, torch.Tensor], list[Prediction]]:
        """Sums for top-1, top-5 and cross-entropy (without smoothing); the model must be in evaluation mode."""
        logits = self._module(normalize(batch.clips)).float()
        counted = batch.weights > 0
        logits, labels, ids = logits[counted], batch.labels[counted], batch.sample_ids[counted.cpu()]
        probabilities, predictions = logits.softmax(1).max(1)
        top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
        sums = {
            "num_samples": counted.sum(),
            "top1": (predictions == labels).sum(),
            "top5": (top5 == labels[:, None]).sum(),
            "loss": F.cross_entropy(logits, labels, reduction="sum"),
        }
        rows = zip(ids.tolist(), labels.tolist(), predictions.tolist(), probabilities.tolist(), strict=True)
        found = [
            Prediction(sample_id=sample, label=label, prediction=guess, probability=round(probability, 4))
            for sample, label, guess, probability in rows
        ]
        return sums, found

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Top-1, top-5 (shares, 0 to 1), mean cross-entropy, and the number of samples counted."""
        num_samples = sums["num_samples"]
        if num_samples == 0:
            raise ValueError("evaluation saw no sample: the split is empty or every sample was skipped")
        return {
            **{name: sums[name] / num_samples for name in ("top1", "top5", "loss")},
            "num_samples": int(num_samples),
        }
