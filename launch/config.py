"""An experiment's whole configuration: frozen dataclasses, each defined beside what it configures.

An experiment is a function that returns one `Experiment`; variants are made with `dataclasses.replace`, and every field
is a flag of `reelscale train` (`--training.batch-clips 256`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_shards.clips import ClipConfig
from data_shards.loader import LoaderConfig
from data_shards.storage import StorageConfig
from data_shards.storage.urls import is_url
from dist_train.checkpoint import CheckpointConfig
from dist_train.optimizers import OptimizerConfig
from dist_train.run import TrainingConfig
from dist_train.schedules import ScheduleConfig
from dist_train.strategies import ExchangeConfig
from dist_train.tasks.mixing import MixConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which packed set to train and evaluate on, and how its clips are cut."""

    root: str = "shards"
    """Folder that `reelscale pack` wrote, one subfolder a split; or its URL: s3://BUCKET/SET, gs://, https://."""
    train_split: str = "train"
    """Split to train on."""
    evaluation_split: str = "val"
    """Split to evaluate on."""
    more_roots: tuple[str, ...] = ()
    """More packed sets with the same classes, mixed into training; evaluation stays with `root`."""
    shares: tuple[float, ...] = ()
    """Shares of the training clips, of `root` first and then of each of `more_roots`; none: by their sizes."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """How a video becomes a clip."""
    mix: MixConfig = field(default_factory=MixConfig)
    """Mixup and CutMix of training clips, on the device."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """How clips are read."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How bytes are read: cache, read-ahead, retries."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to train."""

    name: str = "tsm_resnet50"
    """A model of `models.video`, or your own as `package.module:function`; it is called with num_classes and
    num_segments, and with the fields below that its signature has."""
    width: int = 64
    """Channels of the first stage; 64 is the standard ResNet."""
    stem_stride: int = 4
    """Downscaling before the first stage: 4 is the standard, 1 or 2 suit images of 32 to 64 pixels."""
    dropout: float = 0.5
    """Dropout before the classifier."""
    zero_init_residual: bool = False
    """Start the last batch norm of every residual block at 0 (Goyal et al. 2017, section 5.1), for large batches."""
    weights: Path | None = None
    """Start from this state dict (.pt or .pth): ours, torchvision's, or the TSM repository's."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Where a run reports to."""

    wandb: Literal["offline", "online", "off"] = "offline"
    """Weights & Biases: `offline` writes runs/NAME/wandb for `wandb sync`, `online` needs a key."""
    wandb_project: str = "reelscale"
    """Project the runs appear under."""
    ledger: Literal["on", "off"] = "on"
    """Account for every second and byte; `off` is for measuring what that costs."""
    journal: Literal["on", "off"] = "on"
    """Keep the journal of samples, from which the epoch certificate is read."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One complete configuration."""

    name: str
    """Names the run."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The loop."""
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    """The exchange of gradients."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Reports."""


def check(experiment: Experiment, *, world_size: int) -> None:
    """Checks every field and how the fields fit together, and raises once with all that is wrong.

    Raises:
        ValueError: all problems in one message.
    """
    problems = []
    training = experiment.training
    for part in (experiment.optimizer, experiment.schedule, training, experiment.exchange, experiment.checkpoint):
        problems += part.problems()
    problems += experiment.data.mix.problems()
    parts = world_size * max(training.micro_batches, 1)
    if training.batch_clips % parts:
        lower, upper = training.batch_clips // parts * parts, -(-training.batch_clips // parts) * parts
        choices = f"{lower} or {upper}" if lower else f"{upper}"
        problems.append(
            f"training.batch_clips is {training.batch_clips}, not divisible by {world_size} processes x "
            f"{training.micro_batches} micro-batches: use {choices}"
        )
    elif training.batch_norm == "ghost" and training.batch_clips // parts % training.ghost_batch_clips:
        problems.append(
            f"training.ghost_batch_clips is {training.ghost_batch_clips}, but a micro-batch has "
            f"{training.batch_clips // parts} clips, which does not divide into such groups: use a divisor"
        )
    elif experiment.data.mix.active and training.batch_clips // parts % 2:
        problems.append(
            f"data.mix mixes clips two by two, but a micro-batch has {training.batch_clips // parts}: make it even"
        )
    patience = experiment.data.loader.worker_timeout_seconds
    longest = experiment.data.storage.longest_seconds()
    if is_url(experiment.data.root) and longest >= patience:
        problems.append(
            f"data.storage may try for {longest:.0f} s before it gives up, but a worker is ended after "
            f"data.loader.worker_timeout_seconds={patience:.0f}: raise that, or lower data.storage.num_attempts or "
            "timeout_seconds"
        )
    if problems:
        raise ValueError("; ".join(problems))


def to_plain(value: Any) -> Any:
    """A configuration as JSON: dataclasses become objects, paths strings, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value
