"""`--dry-run`'s table of memory: each strategy's bytes a process, whether they fit, and the largest micro-batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import get_args

import torch
from rich.table import Table

from dist_train.collectives import Collectives
from dist_train.memory import Footprint, ModelSize, activation_bytes, footprint
from dist_train.phases import Task
from dist_train.recompute import Recomputation
from dist_train.strategies import StrategyName
from dist_train.tasks.mixing import MixConfig
from dist_train.world import World
from launch.config import Experiment
from launch.training import Splits, make_task

MODES: tuple[Recomputation, ...] = get_args(Recomputation)
OPTIMIZER_COPIES = {"sgd": 1, "lars": 1, "lamb": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What the experiment needs of each process."""

    experiment: Experiment
    world_size: int
    micro_batch: int
    """Clips of one micro-batch of one process."""
    size: ModelSize
    activations: dict[Recomputation, float]
    """Bytes a clip, its input included; empty where the model cannot be tried on `meta`."""
    precision: str
    available: float
    """Bytes that a process may use."""

    def footprint(self, strategy: StrategyName) -> Footprint:
        """What `strategy` keeps whatever the micro-batch."""
        config = self.experiment
        kept = footprint(
            strategy,
            self.size,
            world_size=self.world_size,
            bucket_bytes=config.exchange.bucket_bytes,
            optimizer_copies=OPTIMIZER_COPIES[config.optimizer.name],
            with_average=config.training.ema_half_life_clips > 0,
        )
        casts = self.size.trainable / 2 if self.precision == "bfloat16" else 0.0  # autocast keeps them for a step
        return replace(kept, weights=kept.weights + casts)

    def needed(self, strategy: StrategyName, mode: Recomputation) -> float:
        """Bytes at the experiment's micro-batch."""
        return self.footprint(strategy).total + self.activations[mode] * self.micro_batch

    def largest_micro_batch(self, strategy: StrategyName, mode: Recomputation) -> int:
        """Clips that fit; 0 where not one does."""
        room = self.available - self.footprint(strategy).total
        return max(int(room // self.activations[mode]), 0)


def plan_memory(experiment: Experiment, splits: Splits, *, world_size: int, available: float) -> MemoryPlan:
    """Measures the model on `meta`, with and without activation checkpointing; seconds, and a few megabytes."""
    training = experiment.training
    micro_batch = training.batch_clips // world_size // training.micro_batches
    precision = training.precision
    if precision == "auto":
        precision = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "float32"
    size = ModelSize.of(_task_on_meta(experiment, splits, "off", micro_batch).phases[0].module)
    activations: dict[Recomputation, float] = {}
    for mode in MODES:
        try:
            task = _task_on_meta(experiment, splits, mode, micro_batch)
            activations[mode] = _activations_a_clip(experiment, task, micro_batch, precision)
        except (ValueError, RuntimeError, NotImplementedError):  # no repeated blocks, or operators without shapes
            continue
    return MemoryPlan(
        experiment=experiment,
        world_size=world_size,
        micro_batch=micro_batch,
        size=size,
        activations=activations,
        precision=precision,
        available=available,
    )


def available_bytes(*, gigabytes: float, device: str, processes_here: int) -> float:
    """Memory of a process: as given (10^9 bytes), else a GPU's, else its share of this machine's."""
    if gigabytes > 0:
        return gigabytes * 1e9
    if device != "cpu" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes_here


def describe_memory(plan: MemoryPlan) -> str:
    """What the experiment needs as it is configured, and of how much."""
    config = plan.experiment
    mode = config.training.activation_checkpointing
    room = f"of {plan.available / 1e9:.1f} GB"
    kept = plan.footprint(config.exchange.strategy).total
    if mode not in plan.activations:
        return f"{kept / 1e6:,.0f} MB {room} without activations, which could not be measured for this model"
    needed = plan.needed(config.exchange.strategy, mode)
    verdict = "fits" if needed <= plan.available else "does not fit"
    return f"{needed / 1e6:,.0f} MB {room} in {plan.precision}: {verdict}, with PyTorch's own needs still to add"


def memory_table(plan: MemoryPlan) -> Table:
    """The plan for people: megabytes (10^6 bytes), at most 80 columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("memory, MB", "weights", "grads", "optim", "other", "activ", "total", "fits"):
        table.add_column(title, justify="left" if title == "memory, MB" else "right", no_wrap=True)
    table.add_column("largest\nmicro-batch", justify="right")
    strategies = get_args(StrategyName) if plan.world_size > 1 else (plan.experiment.exchange.strategy,)
    for strategy in strategies:
        kept = plan.footprint(strategy)
        for mode in plan.activations:
            needed = plan.needed(strategy, mode)
            chosen = (strategy, mode) == (
                plan.experiment.exchange.strategy,
                plan.experiment.training.activation_checkpointing,
            )
            table.add_row(
                f"{strategy}{'' if mode == 'off' else ', blocks'}",
                *(_megabytes(n) for n in (kept.weights, kept.gradients, kept.optimizer)),
                _megabytes(kept.exchange + kept.average),
                _megabytes(plan.activations[mode] * plan.micro_batch),
                _megabytes(needed),
                "yes" if needed <= plan.available else "no",
                f"{plan.largest_micro_batch(strategy, mode):,}",
                style="bold" if chosen else "",
            )
    return table


def _task_on_meta(experiment: Experiment, splits: Splits, mode: Recomputation, micro_batch: int) -> Task:
    """The experiment's task as one process with one micro-batch has it."""
    training = replace(experiment.training, batch_clips=micro_batch, micro_batches=1, activation_checkpointing=mode)
    data = replace(experiment.data, mix=MixConfig())  # draws on the host, and keeps nothing for the backward pass
    alone = replace(experiment, training=training, model=replace(experiment.model, weights=None), data=data)
    with torch.device("meta"):
        return make_task(alone, splits, Collectives(World(device=torch.device("meta"))))


def _activations_a_clip(experiment: Experiment, task: Task, micro_batch: int, precision: str) -> float:
    clip = experiment.data.clip
    module = task.phases[0].module.train()
    if precision == "bfloat16":  # what autocast computes in, without autocast, which `meta` has not
        module.to(torch.bfloat16)
        module.register_forward_pre_hook(lambda _, inputs: tuple(tensor.to(torch.bfloat16) for tensor in inputs))
    with torch.device("meta"):
        _, frames, height, width, channels = clip.sample_shape(training=True)
        shape = (micro_batch, frames, channels, height, width)
        batch = SimpleNamespace(
            clips=torch.zeros(shape, dtype=torch.uint8),
            labels=torch.zeros(micro_batch, dtype=torch.long),
            weights=torch.ones(micro_batch),
        )
        return (activation_bytes(task, batch) + batch.clips.numel()) / micro_batch


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f}"
