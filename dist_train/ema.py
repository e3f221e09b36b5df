"""An exponential moving average of the weights, with its half-life in clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class WeightAverage:
    """Averages weights; buffers (running statistics, already averages) are taken as they are.

    Args:
        weights: the tensors to follow, by name: a module's parameters, or the parts of them that this rank holds
            (`Strategy.weights`). They are read and written in place.
        half_life_clips: after this many clips a weight's influence has halved (StyleGAN's convention, per image).
            Independent of the batch size: the decay of a step of B clips is 0.5 ** (B / half_life_clips).
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], *, half_life_clips: float) -> None:
        if half_life_clips <= 0:
            raise ValueError(f"ema_half_life_clips is {half_life_clips}: use a positive number")
        self._weights = {name: weight.detach() for name, weight in weights.items()}
        self._half_life = half_life_clips
        self.averages = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, batch_clips: int) -> None:
        """Moves the averages towards the weights after a step of `batch_clips` clips."""
        weight = 1 - 0.5 ** (batch_clips / self._half_life)
        torch._foreach_lerp_(list(self.averages.values()), list(self._weights.values()), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The weights are the averages inside this block and themselves again after it."""
        own = {name: weight.clone() for name, weight in self._weights.items()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by name, laid out as the weights."""
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes averages back; ValueError when the names differ."""
        if state.keys() != self.averages.keys():
            raise ValueError("the checkpoint's weight averages belong to another model")
        for name, average in self.averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])
