"""One rank's training run: wires data, model, engine and monitors together, and runs the loop."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_shards.augment.mirror import mirrored_labels
from data_shards.loader import ClipLoader
from data_shards.manifest import Manifest, open_manifest
from data_shards.mixture import Mixture, as_mixture
from data_shards.sample_order import SampleOrder, make_order
from data_shards.storage import below, is_url
from dist_train.batch_norm import apply_batch_norm_mode
from dist_train.checkpoint import Checkpoint, load_latest
from dist_train.clocks import Clocks
from dist_train.collectives import Collectives
from dist_train.journal import Journal
from dist_train.ledger import NullLedger, start_ledger
from dist_train.ledger.clock import ClockOffset
from dist_train.ledger.recorder import Recorder
from dist_train.ledger.rows import LOGGING
from dist_train.loop import train
from dist_train.optimizers import make_optimizer
from dist_train.placement import Placement
from dist_train.recompute import apply_recomputation
from dist_train.rendezvous import Transport, process_group
from dist_train.run import Outcome, Run, steps_left
from dist_train.strategies import make_strategy
from dist_train.tasks.video_classification import VideoClassification
from dist_train.watchdog import Watchdog
from dist_train.world import World
from launch import run_folder
from launch.cli import end_process
from launch.config import DataConfig, Experiment, to_plain
from launch.console import ProgressLine
from launch.model import make_model
from launch.monitors import ConsoleMonitor, MetricsFile, WandbMonitor
from launch.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The opened training and evaluation splits of an experiment."""

    training: Manifest | Mixture
    evaluation: Manifest
    clips_per_epoch: int
    """Positions of the training stream that make an epoch (`data_shards.sample_order`)."""


def open_splits(experiment: Experiment) -> Splits:
    """Opens and checks both splits; ValueError when one is missing or damaged, or their classes differ."""
    data = experiment.data
    if not is_url(data.root) and not Path(data.root).is_dir():
        raise ValueError(f"--data.root {data.root} is not a folder: pack one with `reelscale pack SRC {data.root}`")
    training = _open_training(data)
    splits = Splits(
        training=training,
        evaluation=_open_split(data, data.root, data.evaluation_split),
        clips_per_epoch=training_order(experiment, training).epoch_positions,
    )
    if splits.training.classes != splits.evaluation.classes:
        raise ValueError(f"the splits of {data.root} have different classes: pack them in one go")
    mirrored_labels(splits.training.classes, data.clip.flip_label_pairs)
    if len(splits.training) < experiment.training.batch_clips:
        raise ValueError(
            f"training.batch_clips is {experiment.training.batch_clips} but {below(data.root, data.train_split)} has "
            f"{len(splits.training)} samples: use a smaller batch"
        )
    return splits


def _open_training(data: DataConfig) -> Manifest | Mixture:
    manifest = _open_split(data, data.root, data.train_split)
    if not data.more_roots and not data.shares:
        return manifest
    return Mixture([manifest, *(_open_split(data, root, data.train_split) for root in data.more_roots)], data.shares)


def _open_split(data: DataConfig, root: str, name: str) -> Manifest:
    return open_manifest(below(root, name), storage=data.storage)


def training_order(experiment: Experiment, training: Manifest | Mixture) -> SampleOrder:
    """Which sample comes at each position of the training stream; ValueError for flags that do not fit together."""
    sets, config = as_mixture(training), experiment.training
    return make_order(
        sets.labels,
        experiment.data.loader.order,
        seed=config.seed,
        global_batch_clips=config.batch_clips,
        shares=sets.shares,
    )


@contextmanager
def running_ledger(experiment: Experiment, run_dir: Path, attempt: int, collectives: Collectives) -> Iterator[Recorder]:
    """This rank's ledger, ended with how the block ended."""
    world = collectives.world
    if experiment.monitor.ledger == "off":
        yield NullLedger()
        return
    identity = {
        "attempt": attempt,
        "rank": world.rank,
        "world_size": world.world_size,
        "local_rank": world.local_rank,
        "node_rank": world.node_rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(world.device),
        "launcher": world.launcher,
    }
    offset = ClockOffset(Clocks(collectives).read())
    ledger = start_ledger(run_dir, device=world.device, identity=identity, offset=offset)
    try:
        yield ledger
    except BaseException:
        with suppress(RuntimeError):  # a device in error cannot be asked for its times; the first error counts
            ledger.end("error")
        raise


def run_rank(
    experiment: Experiment,
    *,
    run_dir: Path,
    resume: bool,
    world: World,
    placement: Placement,
    transport: Transport = "auto",
) -> Outcome:
    """Trains `experiment` as one rank of `world`. The same on every rank; only rank 0 writes shared files."""
    with ExitStack() as stack:
        timeout = experiment.exchange.timeout_seconds
        backend = stack.enter_context(process_group(world, placement, timeout_seconds=timeout, transport=transport))
        collectives = Collectives(world)
        if world.world_size > 1:
            stack.enter_context(Watchdog(collectives, timeout_seconds=timeout, end_process=end_process))
        splits = collectives.together(lambda: open_splits(experiment))
        attempt, run_id = _claim(experiment, run_dir, resume, collectives, splits, backend)
        ledger = stack.enter_context(running_ledger(experiment, run_dir, attempt, collectives))
        collectives.ledger = ledger
        stop = stack.enter_context(StopRequest())
        torch.manual_seed(experiment.training.seed)
        torch.use_deterministic_algorithms(experiment.training.deterministic)
        torch.backends.cudnn.benchmark = not experiment.training.deterministic
        start = load_latest(run_dir, collectives=collectives) if resume else None
        with ExitStack() as parts:
            run = collectives.together(  # a file of weights may be missing on one node only
                lambda: _assemble(experiment, splits, collectives, run_dir, attempt, run_id, start, parts)
            )
            parts.callback(run.strategy.close)
            outcome = train(dataclasses.replace(run, stop_requested=stop), start)
            with ledger.row(LOGGING, absorb=True):
                if world.is_first and outcome.predictions:
                    _write_predictions(run_dir, splits.evaluation, outcome)
                parts.close()  # workers end, monitors write what they hold
        ledger.end("preempted" if outcome.stopped else "ok")
        collectives.ledger = NullLedger()
        collectives.barrier()  # every rank's ledger is whole before anybody reads them
    return outcome


def _claim(
    experiment: Experiment, run_dir: Path, resume: bool, collectives: Collectives, splits: Splits, backend: str
) -> tuple[int, str]:
    """Rank 0 claims the run folder; every rank learns the attempt and the run's id, or the reason against it."""

    def claim() -> tuple[int, str] | None:
        if not collectives.world.is_first:
            return None
        description = _description(experiment, collectives.world, splits, backend)
        return run_folder.claim(run_dir, resume=resume, description=description)

    return collectives.broadcast_object(collectives.together(claim))


def _description(experiment: Experiment, world: World, splits: Splits, backend: str) -> dict[str, Any]:
    training = experiment.training
    return {
        "experiment": experiment.name,
        "config": to_plain(experiment),
        "versions": run_folder.versions(),
        "git_revision": run_folder.git_revision(),
        "world": {
            "world_size": world.world_size,
            "num_nodes": world.num_nodes,
            "device": str(world.device),
            "launcher": world.launcher,
            "transport": backend,
        },
        "classes": list(splits.training.classes),
        "num_training_samples": len(splits.training),
        "num_evaluation_samples": len(splits.evaluation),
        "clips_per_rank": training.batch_clips // world.world_size,
    }


def _assemble(
    experiment: Experiment,
    splits: Splits,
    collectives: Collectives,
    run_dir: Path,
    attempt: int,
    run_id: str,
    start: Checkpoint | None,
    parts: ExitStack,
) -> Run:
    """Everything that the loop works with; `parts` closes what has to be closed."""
    world, training = collectives.world, experiment.training
    loader = _loader(experiment, splits.training, world, training=True)
    evaluation_loader = _loader(experiment, splits.evaluation, world, training=False)
    parts.callback(loader.close)
    parts.callback(evaluation_loader.close)
    statistics_loader = None
    if training.precise_batch_norm_clips:
        statistics_loader = _loader(experiment, splits.training, world, training=True)
        parts.callback(statistics_loader.close)
    _check_batch(experiment, start)
    begin = start.clips_seen if start else 0
    left = steps_left(
        num_samples=splits.clips_per_epoch, epochs=training.epochs, batch_clips=training.batch_clips, clips_seen=begin
    )
    total = (start.step if start else 0) + left
    progress = parts.enter_context(ProgressLine(experiment.name, unit="steps", shown=world.is_first))
    monitors = _monitors(experiment, run_dir, run_id, progress, parts) if world.is_first else []
    journal = None
    if experiment.monitor.journal == "on":
        journal = Journal(run_dir, rank=world.rank, attempt=attempt, start=begin)
        parts.callback(journal.close)
    return Run(
        task=make_task(experiment, splits, collectives),
        loader=loader,
        evaluation_loader=evaluation_loader,
        statistics_loader=statistics_loader,
        collectives=collectives,
        strategy=make_strategy(experiment.exchange, collectives),
        ledger=collectives.ledger,
        journal=journal,
        monitors=monitors,
        run_dir=run_dir,
        attempt=attempt,
        training=training,
        schedule=experiment.schedule,
        warmup_start_factor=min(
            experiment.optimizer.base_learning_rate / experiment.optimizer.peak_learning_rate(training.batch_clips), 1.0
        ),
        checkpoint=experiment.checkpoint,
        checkpoint_meta={
            "experiment": experiment.name,
            "run_id": run_id,
            "world_size": world.world_size,
            "batch_clips": training.batch_clips,
        },
        evaluation_split=experiment.data.evaluation_split,
        weighted=experiment.data.loader.on_bad_sample == "skip" or experiment.data.loader.order.tail == "pad",
        on_step=lambda step: progress.update(step, total),
        on_evaluation_batch=lambda clips: progress.meanwhile(f"evaluating, {clips} clips done"),
    )


def _check_batch(experiment: Experiment, start: Checkpoint | None) -> None:
    """Epochs of whole batches lie elsewhere in the stream when the batch has another size."""
    tail, clips = experiment.data.loader.order.tail, experiment.training.batch_clips
    before = start.meta.get("batch_clips", clips) if start else clips
    if tail != "wrap" and before != clips:
        raise ValueError(
            f"training.batch_clips is {clips}, the run began with {before}: with data.loader.order.tail {tail} the "
            f"epochs go with the batch, so it cannot change on the way; use {before}"
        )


def _loader(experiment: Experiment, manifest: Manifest | Mixture, world: World, *, training: bool) -> ClipLoader:
    config = experiment.training
    return ClipLoader(
        manifest,
        clip=experiment.data.clip,
        loader=experiment.data.loader,
        training=training,
        rank=world.rank,
        world_size=world.world_size,
        global_batch_clips=config.batch_clips,
        micro_batches=config.micro_batches,
        seed=config.seed,
        pin_memory=world.device.type == "cuda",
        local_world_size=world.local_world_size,
    )


def make_task(experiment: Experiment, splits: Splits, collectives: Collectives) -> VideoClassification:
    """The model, as the experiment has it normalise and recompute, on the world's device, with its optimizer."""
    training, optimizer = experiment.training, experiment.optimizer
    model = make_model(
        experiment.model,
        num_classes=len(splits.training.classes),
        num_segments=experiment.data.clip.num_segments,
        in_channels=experiment.data.clip.in_channels,
    )
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    model = model.to(device=collectives.world.device, memory_format=layout)  # type: ignore[call-overload]
    clips = training.batch_clips // collectives.world.world_size // training.micro_batches
    groups = clips // training.ghost_batch_clips if training.batch_norm == "ghost" else 1
    apply_batch_norm_mode(model, training.batch_norm, collectives, num_ghost_groups=groups)
    apply_recomputation(model, training.activation_checkpointing)
    peak = optimizer.peak_learning_rate(training.batch_clips)
    return VideoClassification(
        model,
        make_optimizer(optimizer, model, learning_rate=peak),
        label_smoothing=training.label_smoothing,
        num_differences=experiment.data.clip.rgb_differences,
        mixing=experiment.data.mix,
        seed=training.seed,
    )


def _monitors(
    experiment: Experiment, run_dir: Path, run_id: str, progress: ProgressLine, parts: ExitStack
) -> list[Any]:
    monitors: list[Any] = [MetricsFile(run_dir), ConsoleMonitor(progress)]
    if experiment.monitor.wandb != "off":
        wandb = WandbMonitor(
            run_dir, experiment.monitor, run_id=run_id, name=run_dir.name, settings=to_plain(experiment)
        )
        parts.callback(wandb.close)
        monitors.append(wandb)
    return monitors


def _write_predictions(run_dir: Path, manifest: Manifest, outcome: Outcome) -> None:
    content = {
        "split": manifest.split,
        "classes": list(manifest.classes),
        "samples": [
            {**dataclasses.asdict(prediction), "key": manifest.key(prediction.sample_id)}
            for prediction in outcome.predictions
        ],
    }
    aside = run_dir / "predictions.partial"
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    aside.replace(run_dir / "predictions.json")
