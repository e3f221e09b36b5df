"""`--dry-run`: what a run would do, without doing it: batch arithmetic, shards, buckets, memory."""

from __future__ import annotations

import torch
from rich.table import Table

from dist_train.loop import steps_left
from dist_train.schedules import linear_scaled
from dist_train.strategies.allreduce import plan_buckets
from launch.config import Experiment
from launch.console import console
from launch.model import make_model
from launch.training import open_splits


def plan(experiment: Experiment, *, world_size: int) -> dict[str, str]:
    """The plan as label and text, in the order to print it. Opens the manifests; builds the model without memory."""
    splits = open_splits(experiment)
    training, optimizer = experiment.training, experiment.optimizer
    with torch.device("meta"):
        model = make_model(
            experiment.model,
            num_classes=len(splits.training.classes),
            num_segments=experiment.data.clip.num_segments,
        )
    parameters = list(model.parameters())
    sizes = [p.numel() * p.element_size() for p in parameters]
    order = list(reversed(range(len(parameters))))
    buckets = plan_buckets(sizes, [p.dtype for p in parameters], order, experiment.exchange.bucket_bytes)
    steps = steps_left(num_samples=len(splits.training), epochs=training.epochs, batch_clips=training.batch_clips)
    peak = linear_scaled(optimizer.base_learning_rate, optimizer.base_batch_clips, training.batch_clips)
    copies = 3 + (world_size > 1 and experiment.exchange.strategy == "allreduce") + (training.ema_half_life_clips > 0)
    micro_batch = training.batch_clips // world_size // training.micro_batches
    return {
        "experiment": experiment.name,
        "model": f"{experiment.model.name}, {sum(p.numel() for p in parameters):,} parameters",
        "processes": f"{world_size}, gradients by {experiment.exchange.strategy}" if world_size > 1 else "1",
        "batch": f"{training.batch_clips} clips = {world_size} processes x {training.micro_batches} micro-batches x "
        f"{micro_batch} clips",
        "steps": f"{steps:,} = {training.epochs:g} epochs of {len(splits.training):,} clips",
        "learning rate": f"{peak:g} at the peak, linear from {optimizer.base_learning_rate:g} at "
        f"{optimizer.base_batch_clips} clips; warm-up {experiment.schedule.warmup_epochs:g} epochs, "
        f"{experiment.schedule.kind}",
        "training split": _describe(splits.training),
        "evaluation split": _describe(splits.evaluation),
        "exchange a step": f"{sum(sizes) / 1e6:.1f} MB in {len(buckets)} buckets" if world_size > 1 else "none",
        "memory a process": f"{copies * sum(sizes) / 1e6:.0f} MB for weights, gradients and momentum "
        f"({copies} copies), plus activations",
    }


def print_plan(experiment: Experiment, *, world_size: int) -> None:
    """Prints the plan as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, text in plan(experiment, world_size=world_size).items():
        table.add_row(label, text)
    console().print(table)


def _describe(manifest: object) -> str:
    shards = manifest.shards  # type: ignore[attr-defined]
    size = sum(shard.num_bytes for shard in shards) / 1e6
    return f"{len(manifest):,} clips in {len(shards)} shards, {size:,.1f} MB"  # type: ignore[arg-type]
