"""A small task, loader and batch for engine tests: real modules and data, no video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dist_train.batch_norm import apply_batch_norm_mode
from dist_train.checkpoint import CheckpointConfig
from dist_train.collectives import Collectives
from dist_train.journal import Journal
from dist_train.ledger import NullLedger
from dist_train.ledger.recorder import Recorder
from dist_train.optimizers import OptimizerConfig, make_optimizer
from dist_train.phases import Phase
from dist_train.run import Run, TrainingConfig
from dist_train.schedules import ScheduleConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.tasks.video_classification import VideoClassification
from dist_train.world import World

NUM_SAMPLES, NUM_CLASSES = 48, 3


@dataclass(frozen=True)
class ToyBatch:
    """Clips of noise whose class shows in one channel."""

    clips: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    costs: dict[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.clips.numel()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, non_blocking: bool = False) -> ToyBatch:
        return replace(self, clips=self.clips.to(device), labels=self.labels.to(device))


def toy_batch(positions: torch.Tensor, sample_ids: torch.Tensor) -> ToyBatch:
    """The batch of these samples: a pure function of the ids."""
    labels = sample_ids % NUM_CLASSES
    clips = (
        torch.stack(
            [torch.randint(0, 200, (2, 3, 8, 8), generator=torch.Generator().manual_seed(int(i))) for i in sample_ids]
        )
        if len(sample_ids)
        else torch.zeros(0, 2, 3, 8, 8, dtype=torch.int64)
    )
    for row, label in enumerate(labels):
        clips[row, :, label] += 50
    return ToyBatch(
        clips=clips.to(torch.uint8),
        labels=labels,
        sample_ids=sample_ids,
        positions=positions,
        weights=torch.ones(len(labels)),
    )


class ToyLoader:
    """Global batch k is positions [k*B, (k+1)*B); sample = position modulo the set, permuted by a multiplication."""

    def __init__(self, world: World, training: TrainingConfig) -> None:
        self._world, self._training = world, training

    @property
    def num_samples(self) -> int:
        return NUM_SAMPLES

    def batches(self, start_position: int, stop_position: int) -> Iterator[ToyBatch]:
        share = self._training.batch_clips // self._world.world_size
        micro = share // self._training.micro_batches
        for begin in range(start_position, stop_position, self._training.batch_clips):
            for number in range(self._training.micro_batches):
                first = begin + self._world.rank * share + number * micro
                positions = torch.arange(first, first + micro)
                yield toy_batch(positions, positions * 5 % NUM_SAMPLES)

    def evaluation_batches(self) -> Iterator[ToyBatch]:
        ids = torch.arange(self._world.rank, NUM_SAMPLES - 1, self._world.world_size)
        for part in ids.split(7):
            yield toy_batch(part, part)

    def close(self) -> None:
        pass


class ToyModel(nn.Module):
    """Convolution, batch norm, linear; `[B, T, 3, 8, 8]` to `[B, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        batch, frames = clips.shape[:2]
        features = F.relu(self.norm(self.conv(clips.flatten(0, 1)))).mean((2, 3))
        return self.fc(features).view(batch, frames, -1).mean(1)


def toy_run(
    world: World,
    run_dir: Path,
    training: TrainingConfig,
    *,
    exchange: ExchangeConfig | None = None,
    ledger: Recorder | None = None,
    checkpoint: CheckpointConfig | None = None,
    journal: Journal | None = None,
    monitors: tuple[Any, ...] = (),
    attempt: int = 0,
    **hooks: Any,
) -> Run:
    """A complete run of the toy task."""
    torch.manual_seed(training.seed + (0 if world.is_first else 1000))  # rank 0's weights must win
    collectives = Collectives(world, ledger or NullLedger())
    model = apply_batch_norm_mode(ToyModel(), training.batch_norm, collectives)
    task = VideoClassification(model, make_optimizer(OptimizerConfig(), model, learning_rate=0.05))
    loader = ToyLoader(world, training)
    return Run(
        task=task,
        loader=loader,
        evaluation_loader=loader,
        collectives=collectives,
        strategy=make_strategy(exchange or ExchangeConfig(), collectives),
        ledger=collectives.ledger,
        journal=journal,
        monitors=monitors,
        run_dir=run_dir,
        attempt=attempt,
        training=training,
        schedule=ScheduleConfig(warmup_epochs=0.5),
        warmup_start_factor=0.1,
        checkpoint=checkpoint or CheckpointConfig(every_epochs=0),
        checkpoint_meta={},
        evaluation_split="test",
        **hooks,
    )


def parameters_of(run: Run) -> dict[str, torch.Tensor]:
    """The model's state after training."""
    return {name: value.clone() for name, value in run.task.phases[0].module.state_dict().items()}


def only_phase(run: Run) -> Phase:
    """The phase of a one-phase task."""
    return run.task.phases[0]
