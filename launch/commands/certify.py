"""`reelscale certify RUN`: reads the journals and says whether every sample was seen exactly once in every epoch.

Where the samples do not all come once in the same stretch of the stream (mixtures, balanced classes, tails that are
dropped or filled up) it compares the journals with the order of the samples, position by position.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data_shards.manifest import open_manifest
from data_shards.mixture import Mixture
from data_shards.sample_order import OrderConfig, make_order
from data_shards.storage import below
from dist_train.journal import StreamCertificate, certify, certify_stream
from launch.parsing import parse


@dataclass(frozen=True, kw_only=True)
class Certify:
    """Counts every sample of every whole epoch of a run, over all ranks and attempts."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; exit code 1 when a sample was dropped or repeated."""
    run_dir = parse(Certify, arguments, program="reelscale certify").run_dir
    description, clips_seen = _read_run(run_dir)
    data = description["config"]["data"]
    order = OrderConfig(**data["loader"].get("order", {}))
    if order.tail != "wrap" or order.balance != "none" or data.get("more_roots"):
        return _certify_order(run_dir, description["config"], order, clips_seen)
    return _certify_epochs(run_dir, description, clips_seen)


def _certify_epochs(run_dir: Path, description: dict[str, Any], clips_seen: int) -> int:
    num_samples = description["num_training_samples"]
    num_epochs = min(clips_seen // num_samples, int(description["config"]["training"]["epochs"]))
    if num_epochs == 0:
        raise ValueError(f"{run_dir} has not finished an epoch yet")
    certificates = certify(run_dir, num_samples=num_samples, num_epochs=num_epochs)
    for epoch in certificates:
        verdict = "exactly once" if epoch.exact else "NOT exact"
        sys.stdout.write(
            f"epoch {epoch.epoch}: {epoch.num_samples} samples, {epoch.num_seen} seen, "
            f"{epoch.num_dropped} dropped, {epoch.num_repeated} repeated: {verdict}\n"
        )
    return 0 if all(epoch.exact for epoch in certificates) else 1


def _certify_order(run_dir: Path, config: dict[str, Any], order: OrderConfig, clips_seen: int) -> int:
    data, training = config["data"], config["training"]
    roots = [data["root"], *data["more_roots"]]
    splits = [open_manifest(below(root, data["train_split"]), check_shards=False) for root in roots]
    sets = Mixture(splits, data["shares"])
    stream = make_order(
        sets.labels, order, seed=training["seed"], global_batch_clips=training["batch_clips"], shares=sets.shares
    )

    def samples_at(positions: np.ndarray) -> np.ndarray:
        visits = stream.at(positions)
        return np.where(visits.weights > 0, sets.sample_ids(visits.sets, visits.samples), -1)

    found = certify_stream(run_dir, num_samples=len(sets), num_positions=clips_seen, order=samples_at)
    verdict = "exactly as ordered" if found.exact else "NOT exact"
    sys.stdout.write(
        f"{found.num_positions:,} clips in order, {found.num_dropped} dropped, {found.num_repeated} repeated, "
        f"{found.num_others} of another sample: {verdict}\n"
    )
    _write_sets(sets, roots, found)
    if order.balance == "classes":
        clips = np.bincount(np.concatenate(sets.labels), weights=found.visits, minlength=len(sets.classes)).astype(int)
        least, most = int(clips.argmin()), int(clips.argmax())
        span = f"{clips[least]:,} ({sets.classes[least]}) to {clips[most]:,} ({sets.classes[most]})"
        sys.stdout.write(f"{len(clips)} classes, {span if least != most else f'{clips[least]:,}'} clips each\n")
    return 0 if found.exact else 1


def _write_sets(sets: Mixture, roots: Sequence[str], found: StreamCertificate) -> None:
    """One line a set: its clips, its share of all, and how often its samples came."""
    ends = np.cumsum([len(manifest) for manifest in sets.manifests])
    for root, visits in zip(roots, np.split(found.visits, ends[:-1]), strict=True):
        share = visits.sum() / max(found.visits.sum(), 1)
        sys.stdout.write(
            f"{root}: {visits.sum():,} clips ({share:.2%}), each of {len(visits):,} samples "
            f"{visits.min()} to {visits.max()} times\n"
        )


def _read_run(run_dir: Path) -> tuple[dict[str, Any], int]:
    """What the run says of itself, and the clips that its newest checkpoint has seen."""
    try:
        description = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        meta = json.loads(_newest_meta(run_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run_dir} is not the folder of a run that has saved a checkpoint: {error}") from None
    return description, meta["clips_seen"]


def _newest_meta(run_dir: Path) -> Path:
    name = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    return run_dir / "checkpoints" / name / "meta.json"
