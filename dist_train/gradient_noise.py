"""Measures each phase's gradient noise scale while it trains: no extra backward pass, no wait for the device.

In every so many steps the 2-norm of each parameter's local gradient is taken as it becomes ready, before the exchange
replaces it by the mean over the ranks, and the norm of the mean once it is there. The squares stay on the device until
the loop logs; then one small all-reduce averages the ranks' own. With one rank its first micro-batch is the small one.

    noise = GradientNoise(task.phases, collectives, every_steps=4, batch_clips=256, micro_batches=1)
    noise.begins(phase, step, exchanges=True)        # before a phase's first micro-batch
    noise.micro_batch_done()                         # after each
    noise.ends(phase)                                # when the gradients are the mean
    figures = noise.at_log()                         # {"train": NoiseScale(...)}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_train.collectives import Collectives
from dist_train.noise_scale import NoiseScale, NoiseScaleMeter
from dist_train.phases import Phase


class GradientNoise:
    """One meter a phase; see the module. Make it before the strategy hooks the parameters, so that it reads first.

    Args:
        every_steps: measure in each so many steps; 0 measures nothing and hooks nothing.
        batch_clips: global batch.
        micro_batches: micro-batches of one rank.

    It needs more than one rank or micro-batch, and gradients that are the mean over whole copies of the model.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        collectives: Collectives,
        *,
        every_steps: int,
        batch_clips: int,
        micro_batches: int,
    ) -> None:
        world_size = collectives.world.world_size
        self._parts = world_size if world_size > 1 else micro_batches
        self._by_rank = world_size > 1
        self._collectives = collectives
        self._every_steps = every_steps if self._parts > 1 else 0
        self._big_clips, self._small_clips = batch_clips, batch_clips // self._parts
        self._meters = {phase.name: NoiseScaleMeter() for phase in phases}
        self._pending: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self._armed = self._measuring = False
        self._hooks: list[Any] = []
        self._places: dict[torch.Tensor, int] = {}
        if self._every_steps:
            self._hook(phases)

    def begins(self, phase: Phase, step: int, *, exchanges: bool) -> None:
        """A step of `phase` begins. Nothing is measured where ranks do not `exchanges` (post-local SGD)."""
        self._measuring = exchanges and self._every_steps > 0 and step // phase.interval % self._every_steps == 0
        if self._measuring:
            self._norms.zero_()
        self._armed = self._measuring

    def micro_batch_done(self) -> None:
        """One more micro-batch's gradient is in: with one rank, the first alone is the small batch."""
        if not self._by_rank:
            self._armed = False

    @torch.no_grad()
    def ends(self, phase: Phase) -> None:
        """The phase's gradients are the mean over the whole batch."""
        self._armed = False
        if not self._measuring:
            return
        parameters = phase.parameters()
        small = self._norms[[self._places[parameter] for parameter in parameters]].square().sum()
        if not self._by_rank:  # the first micro-batch's loss was divided by their number
            small = small * self._parts**2
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else small.new_zeros(())
        self._pending.append((phase.name, small, norm.to(small).square()))

    def at_log(self) -> dict[str, NoiseScale]:
        """The noise scale of each phase that has one yet. Every rank calls it; it waits for the device."""
        if self._pending:
            squares = torch.stack([torch.stack(pair) for _, *pair in self._pending])
            squares = self._collectives.sum_(squares, name="noise scale") / self._collectives.world.world_size
            for (name, *_), (small, big) in zip(self._pending, squares.tolist(), strict=True):
                self._meters[name].add(
                    small_square=small, big_square=big, small_clips=self._small_clips, big_clips=self._big_clips
                )
            self._pending = []
        found = {name: meter.estimate() for name, meter in self._meters.items()}
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def close(self) -> None:
        """Takes off the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, phases: Sequence[Phase]) -> None:
        for phase in phases:
            for parameter in phase.parameters():
                if parameter not in self._places:
                    place = self._places[parameter] = len(self._places)
                    if parameter.requires_grad:
                        self._hooks.append(parameter.register_post_accumulate_grad_hook(self._reader(place)))
        self._norms = torch.zeros(len(self._places), device=self._collectives.world.device)

    def _reader(self, place: int) -> Any:
        def read(parameter: torch.Tensor) -> None:
            if self._armed and parameter.grad is not None:
                with torch.no_grad():
                    self._norms[place].copy_(torch.linalg.vector_norm(parameter.grad))

        return read
