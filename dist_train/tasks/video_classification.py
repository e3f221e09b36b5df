"""Video classification: one phase, cross-entropy on clips.

Clips arrive as uint8 `[B, T, C, H, W]` and are normalised on the device with ImageNet's mean and standard deviation,
as the weights of torchvision and of the TSM repository expect. In training they may be mixed two by two, and their
targets with them; in evaluation a sample may come in several views, whose probabilities are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_train.phases import Phase, Prediction
from dist_train.tasks.clip_input import normalize, rgb_differences
from dist_train.tasks.mixing import MixConfig, draw_mixing, mix, partners


class VideoClassification:
    """A classifier of clips. `module` maps float `[B, T, C, H, W]` to logits `[B, num_classes]`.

    A clip of weight 0 (one that could not be read, under the policy `skip`) adds nothing to the loss nor to any count.
    The mean is over the micro-batch's nominal size; the loop brings it to the clips that count on all ranks.

    Args:
        module: the model.
        optimizer: holds its parameters.
        label_smoothing: share of the target spread over all classes.
        num_differences: the model's input is so many differences of frames a segment (`rgb_differences`); 0: frames.
        mixing: mixup and CutMix in training.
        seed: of the mixing.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        label_smoothing: float = 0.0,
        num_differences: int = 0,
        mixing: MixConfig | None = None,
        seed: int = 0,
    ) -> None:
        mixing = mixing or MixConfig()
        problems = mixing.problems()
        if not 0 <= label_smoothing < 1:
            problems.append(f"label_smoothing is {label_smoothing}: use a number from 0 to below 1")
        if problems:
            raise ValueError("; ".join(problems))
        self.phases: Sequence[Phase] = [Phase(name="classify", module=module, optimizer=optimizer)]
        self._module = module
        self._label_smoothing, self._num_differences = label_smoothing, num_differences
        self._mixing, self._seed = mixing, seed

    def losses(self, phase: Phase, batch: Any) -> dict[str, torch.Tensor]:
        """`cross_entropy`: with label smoothing, to the targets of mixed clips where they are; mean over the batch."""
        inputs = self._inputs(batch.clips)
        if not self._mixing.active:
            losses = self._cross_entropy(phase.module(inputs), batch.labels)
        else:
            height, width = inputs.shape[3:]
            drawn = draw_mixing(batch.positions.cpu(), self._mixing, seed=self._seed, height=height, width=width)
            inputs, shares = mix(inputs, drawn, batch.weights > 0)
            logits = phase.module(inputs)
            own, other = (self._cross_entropy(logits, labels) for labels in (batch.labels, partners(batch.labels)))
            losses = torch.lerp(other, own, shares)
        return {"cross_entropy": (losses * batch.weights).sum() / len(batch.labels)}

    def evaluation_sums(self, batch: Any) -> tuple[dict[str, torch.Tensor], list[Prediction]]:
        """Sums for top-1, top-5 and cross-entropy (without smoothing); the model must be in evaluation mode.

        The V views of a sample (clips `[B * V, ...]`, labels `[B]`) give one prediction: the mean of their softmaxes.
        """
        logits = self._module(self._inputs(batch.clips)).float()
        views = logits.log_softmax(1).unflatten(0, (len(batch.labels), -1))
        log_probabilities = views.logsumexp(1) - math.log(views.shape[1])
        counted = batch.weights > 0
        log_probabilities, labels = log_probabilities[counted], batch.labels[counted]
        ids = batch.sample_ids[counted.cpu()]
        best, predictions = log_probabilities.max(1)
        top5 = log_probabilities.topk(min(5, log_probabilities.shape[1]), dim=1).indices
        sums = {
            "num_samples": counted.sum(),
            "top1": (predictions == labels).sum(),
            "top5": (top5 == labels[:, None]).sum(),
            "loss": F.nll_loss(log_probabilities, labels, reduction="sum"),
        }
        rows = zip(ids.tolist(), labels.tolist(), predictions.tolist(), best.exp().tolist(), strict=True)
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

    def _inputs(self, clips: torch.Tensor) -> torch.Tensor:
        """uint8 clips as the model takes them."""
        inputs = normalize(clips)
        return rgb_differences(inputs, self._num_differences) if self._num_differences else inputs

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of each clip, `[B]`."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self._label_smoothing, reduction="none")
