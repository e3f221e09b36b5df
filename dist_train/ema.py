"""An exponential moving average of the weights, with its half-life in clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Averages a module's parameters; buffers (running statistics, already averages) are taken as they are.

    Args:
        module: the module to follow. Its `state_dict` keys name the averages.
        half_life_clips: after this many clips a weight's influence has halved (StyleGAN's convention, per image).
            Independent of the batch size: the decay of a step of B clips is 0.5 ** (B / half_life_clips).
    """

    def __init__(self, module: nn.Module, *, half_life_clips: float) -> None:
        if half_life_clips <= 0:
            raise ValueError(f"ema_half_life_clips is {half_life_clips}: use a positive number")
        self._module = module
        self._half_life = half_life_clips
        self.averages = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, batch_clips: int) -> None:
        """Moves the averages towards the weights after a step of `batch_clips` clips."""
        weight = 1 - 0.5 ** (batch_clips / self._half_life)
        current = [p.detach() for p in self._module.parameters()]
        torch._foreach_lerp_(list(self.averages.values()), current, weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module holds the averages inside this block and its own weights again after it."""
        own = {name: p.detach().clone() for name, p in self._module.named_parameters()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes averages back; ValueError when the names differ."""
        if state.keys() != self.averages.keys():
            raise ValueError("the checkpoint's weight averages belong to another model")
        for name, average in self.averages.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._module.named_parameters():
            parameter.copy_(values[name])
