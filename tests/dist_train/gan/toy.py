"""Small GANs on images of noise blobs: whole runs of the engine in a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.checkpoint import CheckpointConfig
from dist_train.collectives import Collectives
from dist_train.ledger import NullLedger
from dist_train.run import Run, TrainingConfig
from dist_train.schedules import ScheduleConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.tasks.gan import GANConfig, ImageGAN
from dist_train.world import World

NUM_SAMPLES, SIZE = 36, 8


@dataclass(frozen=True)
class ImageBatch:
    """uint8 images `[B, 1, 8, 8]` with a bright quarter that depends on the label."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    positions: Tensor
    weights: Tensor
    costs: dict[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.images.numel()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device, non_blocking: bool = False) -> ImageBatch:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def image_batch(positions: Tensor, sample_ids: Tensor) -> ImageBatch:
    """The batch of these samples: a pure function of the ids."""
    images = torch.zeros(len(sample_ids), 1, SIZE, SIZE)
    for row, sample in enumerate(sample_ids.tolist()):
        generator = torch.Generator().manual_seed(sample)
        images[row] = torch.randint(0, 60, (1, SIZE, SIZE), generator=generator)
        images[row, 0, (sample % 2) * 4 : (sample % 2) * 4 + 4] += 150
    return ImageBatch(images.to(torch.uint8), sample_ids % 2, sample_ids, positions, torch.ones(len(sample_ids)))


class ImageLoader:
    """Global batch k is positions [k*B, (k+1)*B), cut into equal runs for the ranks."""

    def __init__(self, world: World, training: TrainingConfig) -> None:
        self._world, self._training = world, training

    @property
    def num_samples(self) -> int:
        return NUM_SAMPLES

    def batches(self, start_position: int, stop_position: int) -> Iterator[ImageBatch]:
        share = self._training.batch_clips // self._world.world_size
        for begin in range(start_position, stop_position, self._training.batch_clips):
            positions = torch.arange(begin + self._world.rank * share, begin + (self._world.rank + 1) * share)
            yield image_batch(positions, positions * 5 % NUM_SAMPLES)

    def evaluation_batches(self) -> Iterator[ImageBatch]:
        share = NUM_SAMPLES // self._world.world_size
        ids = torch.arange(self._world.rank * share, (self._world.rank + 1) * share)
        for part in ids.split(6):
            yield image_batch(part, part)

    def close(self) -> None:
        pass


class Projection:
    """Features by a fixed random matrix."""

    name = "projection"

    def __call__(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return images.flatten(1) @ torch.randn(SIZE * SIZE, 4, generator=generator).to(images)


def gan_run(
    world: World,
    run_dir: Path,
    training: TrainingConfig,
    *,
    players: tuple[nn.Module, nn.Module],
    gan: GANConfig,
    conditional: bool = False,
    exchange: ExchangeConfig | None = None,
    monitors: tuple[Any, ...] = (),
    checkpoint: CheckpointConfig | None = None,
    **hooks: Any,
) -> Run:
    """A complete run of `players` (generator, discriminator)."""
    collectives = Collectives(world, NullLedger())
    generator, discriminator = players
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.002, betas=(0.0, 0.99)) for m in players]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    task = ImageGAN(
        generator,
        discriminator,
        generator_optimizer=optimizers[0],
        discriminator_optimizer=optimizers[1],
        config=gan,
        collectives=collectives,
        seed=training.seed,
        conditional=conditional,
        features=Projection(),
    )
    loader = ImageLoader(world, training)
    return Run(
        task=task,
        loader=loader,
        evaluation_loader=loader,
        collectives=collectives,
        strategy=make_strategy(exchange or ExchangeConfig(bucket_megabytes=0.01), collectives),
        ledger=collectives.ledger,
        journal=None,
        monitors=monitors,
        run_dir=run_dir,
        attempt=0,
        training=training,
        schedule=ScheduleConfig(kind="constant", warmup_epochs=0),
        warmup_start_factor=1.0,
        checkpoint=checkpoint or CheckpointConfig(every_epochs=0),
        checkpoint_meta={},
        evaluation_split="test",
        **hooks,
    )
