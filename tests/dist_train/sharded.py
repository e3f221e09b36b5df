"""A run for the sharded strategies: blocks, batch norm, dropout, decay groups, momentum; and its whole state."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.batch_norm import apply_batch_norm_mode
from dist_train.optimizers import OptimizerConfig, make_optimizer
from dist_train.run import Run, TrainingConfig
from dist_train.strategies import ExchangeConfig
from dist_train.tasks.video_classification import VideoClassification
from dist_train.world import World
from tests.dist_train.toy import NUM_CLASSES, toy_run

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
SHARDED = ["fsdp2", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero1", "zero2", "zero3"))]


class Block(nn.Module):
    """A residual block of odd width: no world size divides its parameters evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.norm(self.conv(images)).relu()


class BlockModel(nn.Module):
    """Convolution, two blocks, linear; `[B, T, 3, 8, 8]` to `[B, 3]`."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.mix = nn.Conv2d(width, width, 1)
        self.stage = nn.Sequential(Block(width), Block(width))
        self.fc = nn.Linear(width, NUM_CLASSES)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        batch, frames = clips.shape[:2]
        features = self.stage(self.mix(self.stem(clips.flatten(0, 1)))).mean((2, 3))
        return self.fc(features).view(batch, frames, -1).mean(1)


def block_run(
    world: World,
    run_dir: Path,
    training: TrainingConfig,
    strategy: str,
    *,
    optimizer: str = "sgd",
    channels_last: bool = False,
    **options: Any,
) -> Run:
    """A complete run of `BlockModel` under `strategy`, with weight decay on some parameters and not on others."""
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls collectives by names that PyTorch wants to retire
    run = toy_run(world, run_dir, training, exchange=ExchangeConfig(strategy=strategy), **options)
    torch.manual_seed(training.seed + (0 if world.is_first else 1000))  # rank 0's weights must win
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = BlockModel().to(memory_format=layout)  # type: ignore[call-overload]
    apply_batch_norm_mode(model, training.batch_norm, run.collectives)
    chosen = make_optimizer(OptimizerConfig(weight_decay=0.01), model, learning_rate=0.05)
    if optimizer == "adamw":
        groups = [{**group, "initial_lr": 0.01} for group in chosen.param_groups]
        plain = [{key: group[key] for key in ("params", "weight_decay", "initial_lr")} for group in groups]
        chosen = torch.optim.AdamW(plain, lr=0.01)
    return replace(run, task=VideoClassification(model, chosen))


def whole_state(run: Run) -> dict[str, Any]:
    """What a checkpoint would hold of weights and optimizer, on rank 0; every rank calls it."""
    state = run.strategy.state(run.task.phases)
    return copy.deepcopy(state) if run.collectives.world.is_first else {}


def weights_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The module's part of `whole_state`."""
    return state["modules"]["classify"]
