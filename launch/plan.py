"""`--dry-run`: what a run would do, without doing it: batch arithmetic, shards, buckets, memory."""

from __future__ import annotations

import torch
from rich.table import Table
from torch import nn

from data_shards.manifest import Manifest
from data_shards.mixture import Mixture, as_mixture
from dist_train.run import steps_left
from dist_train.strategies import ExchangeConfig
from dist_train.strategies.buckets import plan_buckets, usual_bucket_bytes
from launch.config import Experiment
from launch.console import console
from launch.memory_plan import describe_memory, memory_table, plan_memory
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
            in_channels=experiment.data.clip.in_channels,
        )
    steps = steps_left(num_samples=splits.clips_per_epoch, epochs=training.epochs, batch_clips=training.batch_clips)
    peak = optimizer.peak_learning_rate(training.batch_clips)
    views = experiment.data.clip.num_views(training=False)
    micro_batch = training.batch_clips // world_size // training.micro_batches
    return {
        "experiment": experiment.name,
        "model": f"{experiment.model.name}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "processes": f"{world_size}, gradients by {experiment.exchange.strategy}" if world_size > 1 else "1",
        "batch": f"{training.batch_clips} clips = {world_size} processes x {training.micro_batches} micro-batches x "
        f"{micro_batch} clips",
        "steps": f"{steps:,} = {training.epochs:g} epochs of {splits.clips_per_epoch:,} clips",
        "learning rate": f"{peak:g} at the peak ({optimizer.learning_rate_rule} rule from "
        f"{optimizer.base_learning_rate:g} at {optimizer.base_batch_clips} clips); warm-up "
        f"{experiment.schedule.warmup_epochs:g} epochs, "
        f"{experiment.schedule.kind}",
        "training split": _describe(splits.training),
        "evaluation split": _describe(splits.evaluation) + (f", each as {views} views" if views > 1 else ""),
        "exchange a step": _exchange(experiment.exchange, model) if world_size > 1 else "none",
    }


def print_plan(experiment: Experiment, *, world_size: int, memory_bytes: float) -> None:
    """Prints the plan as a table, and below it what each strategy needs of a process's `memory_bytes`."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, text in plan(experiment, world_size=world_size).items():
        table.add_row(label, text)
    memory = plan_memory(experiment, open_splits(experiment), world_size=world_size, available=memory_bytes)
    table.add_row("memory a process", describe_memory(memory))
    console().print(table)
    if memory.activations:
        console().print()
        console().print(memory_table(memory))


def _exchange(config: ExchangeConfig, model: nn.Module) -> str:
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in parameters]
    gradients = f"{sum(sizes) / 1e6:.1f} MB"
    if config.strategy not in ("allreduce", "ddp"):
        return f"{gradients} of gradients, cut into parts by {config.strategy}"
    order, dtypes = list(reversed(range(len(parameters)))), [p.dtype for p in parameters]
    counts = []
    for hides in (True, False):
        own = config.strategy == "allreduce"
        most = usual_bucket_bytes(sum(sizes), config.bucket_bytes, hides=hides) if own else config.bucket_bytes
        counts.append(len(plan_buckets(sizes, dtypes, order, most)))
    fewer = f" ({counts[1]} between CPU processes of one node)" if counts[1] != counts[0] else ""
    return f"{gradients} in {counts[0]} buckets{fewer}"


def _describe(sets: Manifest | Mixture) -> str:
    mixture = as_mixture(sets)
    shards = [shard for manifest in mixture.manifests for shard in manifest.shards]
    size = sum(shard.num_bytes for shard in shards) / 1e6
    mixed = f" in {len(mixture.manifests)} sets" if len(mixture.manifests) > 1 else ""
    return f"{len(mixture):,} clips in {len(shards)} shards{mixed}, {size:,.1f} MB"
