"""A run of the training loop on one batch, again and again: nothing is read, decoded or waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_shards.batch import Batch
from dist_train.checkpoint import CheckpointConfig
from dist_train.collectives import Collectives
from dist_train.ledger.recorder import Recorder
from dist_train.optimizers import OptimizerConfig, make_optimizer
from dist_train.run import Run, TrainingConfig
from dist_train.schedules import ScheduleConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.tasks.video_classification import VideoClassification
from dist_train.world import World
from models.video import tsm_resnet18

NUM_CLASSES, LOG_EVERY_STEPS = 10, 5


@dataclass(frozen=True)
class OneBatch:
    """A loader that hands out the same batch."""

    batch: Batch
    num_samples: int

    def batches(self, start_position: int, stop_position: int) -> Iterator[Batch]:
        """A batch for each step."""
        for _ in range(start_position, stop_position, len(self.batch.labels)):
            yield self.batch

    def evaluation_batches(self) -> Iterator[Batch]:
        """The same batch, once."""
        yield self.batch

    def close(self) -> None:
        """Nothing to close."""


def random_batch(num_clips: int, *, size: int) -> Batch:
    """Noise: `num_clips` clips of 8 frames of `size` x `size`, with labels."""
    clips = torch.randint(0, 256, (num_clips, 8, size, size, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    ids = torch.arange(num_clips)
    return Batch(
        clips=clips,
        labels=ids % NUM_CLASSES,
        weights=torch.ones(num_clips),
        sample_ids=ids,
        positions=ids,
        costs={},
        skipped=[],
    )


def small_model(width: int) -> nn.Module:
    """TSM on a ResNet-18, the same weights each time."""
    torch.manual_seed(0)
    model: nn.Module = tsm_resnet18(num_classes=NUM_CLASSES, width=width, dropout=0.0)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in PyTorch's stubs


def small_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The loop's SGD."""
    return make_optimizer(OptimizerConfig(), model, learning_rate=0.01)


def small_run(
    batch: Batch, *, num_steps: int, width: int, ledger: Recorder, folder: Path, on_step: Callable[[int], None]
) -> Run:
    """A run of `num_steps` steps in a world of one process, without evaluation or checkpoints before its end."""
    model = small_model(width)
    collectives = Collectives(World(), ledger)
    loader = OneBatch(batch, len(batch.labels) * num_steps)
    return Run(
        task=VideoClassification(model, small_optimizer(model)),
        loader=loader,
        evaluation_loader=loader,
        collectives=collectives,
        strategy=make_strategy(ExchangeConfig(), collectives),
        ledger=ledger,
        journal=None,
        monitors=(),
        run_dir=folder,
        attempt=0,
        training=TrainingConfig(
            batch_clips=len(batch.labels), epochs=1, evaluate_every_epochs=0, log_every_steps=LOG_EVERY_STEPS
        ),
        schedule=ScheduleConfig(),
        warmup_start_factor=1.0,
        checkpoint=CheckpointConfig(every_epochs=0),
        checkpoint_meta={},
        evaluation_split="none",
        on_step=on_step,
    )
