"""What a training run is: its configuration, its parts, and how it ended. `dist_train.loop` runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dist_train.batch_norm import BatchNormMode
from dist_train.checkpoint import CheckpointConfig
from dist_train.collectives import Collectives
from dist_train.journal import Journal
from dist_train.ledger.recorder import Recorder
from dist_train.phases import Loader, Prediction, Task
from dist_train.recompute import Recomputation
from dist_train.schedules import ScheduleConfig
from dist_train.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, in what batches, and how precisely to train."""

    batch_clips: int = 128
    """Global batch: clips of all ranks and micro-batches for one update."""
    micro_batches: int = 1
    """Gradient accumulation: a rank's share of the batch is computed in this many parts."""
    epochs: float = 50.0
    """Passes over the training split."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast: `auto` is bfloat16 where the GPU has it, float32 elsewhere."""
    batch_norm: BatchNormMode = "local"
    """Statistics of each rank's micro-batch (`local`), of groups of clips in it (`ghost`), or of all ranks
    (`synchronized`); `partial` freezes all layers but the first, `frozen` all of them."""
    ghost_batch_clips: int = 8
    """Clips of one group of `ghost` batch norm."""
    precise_batch_norm_clips: int = 0
    """Before each evaluation, take the running statistics anew from at least so many training clips; 0: do not."""
    channels_last: bool = True
    """Keep images and weights in channels-last memory layout."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    activation_checkpointing: Recomputation = "off"
    """`blocks`: keep only the inputs of the model's repeated blocks and compute the rest again in the backward pass."""
    clip_gradient_norm: float = 0.0
    """Clip each phase's gradient to this norm; 0: do not."""
    ema_half_life_clips: float = 0.0
    """Average the weights with this half-life and evaluate the average; 0: do not."""
    evaluate_every_epochs: float = 1.0
    """Evaluate after each so many epochs; 0: only at the end."""
    noise_scale_every_steps: int = 4
    """Measure the gradient noise scale every so many steps, given several ranks or micro-batches; 0: never."""
    log_every_steps: int = 10
    """Losses are fetched, the ledger written, and a stop agreed at this interval."""
    seed: int = 0
    """Seed of the weights, the sample order, the augmentation, and dropout."""
    deterministic: bool = False
    """Ask for deterministic kernels (slower on CUDA)."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        for name in ("batch_clips", "micro_batches", "log_every_steps", "ghost_batch_clips"):
            if getattr(self, name) < 1:
                found.append(f"training.{name} is {getattr(self, name)}: use 1 or more")
        if not 0 < self.epochs < math.inf:
            found.append(f"training.epochs is {self.epochs}: use a positive, finite number")
        for name in (
            "clip_gradient_norm",
            "ema_half_life_clips",
            "evaluate_every_epochs",
            "precise_batch_norm_clips",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"training.{name} is {getattr(self, name)}: use a finite number, 0 or more")
        if self.noise_scale_every_steps < 0:
            found.append(f"training.noise_scale_every_steps is {self.noise_scale_every_steps}: use 0 or more")
        if self.precise_batch_norm_clips > 0 and self.batch_norm == "frozen":
            found.append(
                f"training.precise_batch_norm_clips is {self.precise_batch_norm_clips}, but training.batch_norm frozen "
                "keeps the statistics as they are: use 0"
            )
        if not 0 <= self.label_smoothing < 1:
            found.append(f"training.label_smoothing is {self.label_smoothing}: use a number from 0 to below 1")
        return found


class Monitor(Protocol):
    """Receives metrics on rank 0 (a file, wandb, the console)."""

    def log(self, metrics: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the run ended."""

    step: int
    clips_seen: int
    stopped: bool
    """True when a stop was requested before the last clip."""
    evaluation: dict[str, float] | None
    """The last evaluation."""
    predictions: list[Prediction] = field(default_factory=list)
    """Of the last evaluation, on rank 0."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the loop works with. Made by `launch`; `train` runs it."""

    task: Task
    loader: Loader
    evaluation_loader: Loader
    collectives: Collectives
    strategy: Strategy
    ledger: Recorder
    journal: Journal | None
    monitors: Sequence[Monitor]
    run_dir: Path
    attempt: int
    training: TrainingConfig
    schedule: ScheduleConfig
    warmup_start_factor: float
    checkpoint: CheckpointConfig
    checkpoint_meta: Mapping[str, Any]
    evaluation_split: str
    statistics_loader: Loader | None = None
    """A second loader of the training split, for `precise_batch_norm_clips`."""
    weighted: bool = False
    """Clips may have weights other than 1 (samples that were skipped): the ranks agree on the sum at each step."""
    stop_requested: Callable[[], bool] = lambda: False
    on_step: Callable[[int], None] = lambda _: None
    """Called after every step on every rank (progress, fault injection)."""
    on_evaluation_batch: Callable[[int], None] | None = None


def steps_left(*, num_samples: int, epochs: float, batch_clips: int, clips_seen: int = 0) -> int:
    """Updates still to do: the last global batch may reach past the last epoch, so that it is full."""
    # The small term keeps a product that should be whole from counting as one batch more.
    return max(math.ceil((num_samples * epochs - clips_seen) / batch_clips - 1e-9), 0)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of the device's generators at a step: different for every rank, step and run (63 bits)."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    return (value ^ (value >> 27)) >> 1
