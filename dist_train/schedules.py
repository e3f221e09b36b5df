"""Learning-rate schedules as pure functions of the clips seen, so that they know nothing of ranks or steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the run."""

    kind: Literal["cosine", "polynomial", "step", "constant"] = "cosine"
    """Shape after the warm-up: half a cosine or (1 - t) ** `power` down to `end_factor`, steps at `milestones_epochs`,
    or constant."""
    warmup_epochs: float = 5.0
    """Linear warm-up, moved at every iteration, over this many epochs (Goyal et al. 2017, section 2.2)."""
    warmup_start_factor: float | None = None
    """Factor at the first clip; by default the base batch over the batch, i.e. the unscaled rate (Goyal et al.)."""
    milestones_epochs: tuple[float, ...] = (20.0, 40.0)
    """Epochs at which the `step` schedule multiplies by `gamma`."""
    gamma: float = 0.1
    """Factor of one step."""
    power: float = 2.0
    """Exponent of the `polynomial` schedule (2 in MLPerf's LARS recipes)."""
    end_factor: float = 0.0
    """Where `cosine` and `polynomial` end, as a factor on the peak rate."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if self.warmup_epochs < 0:
            found.append(f"schedule.warmup_epochs is {self.warmup_epochs}: use 0 or more")
        if list(self.milestones_epochs) != sorted(self.milestones_epochs):
            found.append(f"schedule.milestones_epochs {self.milestones_epochs} must rise")
        if not 0 < self.gamma <= 1:
            found.append(f"schedule.gamma is {self.gamma}: use a number above 0, at most 1")
        if self.power <= 0:
            found.append(f"schedule.power is {self.power}: use a positive number (2 is usual)")
        if not 0 <= self.end_factor <= 1:
            found.append(f"schedule.end_factor is {self.end_factor}: use a number from 0 to 1")
        return found


def learning_rate_factor(
    config: ScheduleConfig, *, clips_seen: int, clips_per_epoch: int, total_clips: int, start_factor: float
) -> float:
    """The factor on the (scaled) learning rate for the step that begins after `clips_seen` clips.

    Args:
        config: the schedule.
        clips_seen: clips of all ranks that came before this step.
        clips_per_epoch: samples in the training split.
        total_clips: clips of the whole run.
        start_factor: factor at clip 0 where `warmup_start_factor` is None.
    """
    warmup_clips = min(config.warmup_epochs * clips_per_epoch, total_clips)
    after = _after_warmup(config, clips_seen, clips_per_epoch, warmup_clips, total_clips)
    if clips_seen >= warmup_clips:
        return after
    start = start_factor if config.warmup_start_factor is None else config.warmup_start_factor
    peak = _after_warmup(config, warmup_clips, clips_per_epoch, warmup_clips, total_clips)
    return start + (peak - start) * clips_seen / warmup_clips


def _after_warmup(
    config: ScheduleConfig, clips: float, clips_per_epoch: int, warmup_clips: float, total_clips: int
) -> float:
    if config.kind in ("cosine", "polynomial"):
        progress = min(max((clips - warmup_clips) / max(total_clips - warmup_clips, 1), 0.0), 1.0)
        if config.kind == "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            shape = (1 - progress) ** config.power
        return config.end_factor + (1 - config.end_factor) * shape
    if config.kind == "step":
        return config.gamma ** sum(clips >= epoch * clips_per_epoch for epoch in config.milestones_epochs)
    return 1.0
