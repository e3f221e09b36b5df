"""Packs labelled videos or images into WebDataset shards with a manifest.

    result = pack(PackConfig(source=Path("videos"), destination=Path("packed")), progress=None)

writes `packed/train`, `packed/val`, `packed/test` (those that have samples): tars that any WebDataset reader
opens, and the manifest of `data_shards.manifest`. The samples of a split are shuffled once, by seed, so each shard
mixes the classes.

What each shard holds is decided first (`data_shards.packing.planning`); then processes write whole shards, each aside,
with its record after it (`worker`, `pool`). The folder appears when it is whole. Until then it is DST.partial, and
after an error, a full disk or a kill at any moment the same command goes on from the shards that are finished there
(`journal`), to the same bytes that an undisturbed run writes. In memory are the list of the samples, and of the
samples themselves one a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from data_shards.durable import beside, write_atomically
from data_shards.errors import PackError
from data_shards.forms.encoding import EncodingConfig
from data_shards.packing.finishing import (
    PackedSplit,
    cannot_pack,
    finish_splits,
    look_at,
    read_rejected,
    rejected_of_missing,
)
from data_shards.packing.journal import Journal, open_journal
from data_shards.packing.planning import Plan, arrange, digest, plan_shards
from data_shards.packing.pool import write_shards
from data_shards.packing.records import REJECTED_NAME, Rejected, rejected_csv
from data_shards.packing.worker import ShardJob
from data_shards.sources import Source, read_source
from data_shards.sources.base import Unit

__all__ = [
    "PackConfig",
    "PackError",
    "PackProgress",
    "PackResult",
    "PackedSplit",
    "Progress",
    "Rejected",
    "pack",
    "read_config_source",
]


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack, and how."""

    source: Path
    """Class folders, a CSV or a folder with labels.csv, TSN lists, WebDataset tars, MNIST's idx files, a folder of
    pictures without classes (`data_shards.sources.reading`)."""
    destination: Path
    """Folder to write; it must not exist yet. What is not finished is in DST.partial: the same command goes on."""
    videos: Path | None = None
    """Folder of the files that a CSV or a list names; its own folder unless given."""
    class_names: Path | None = None
    """File with a class name a line, for sources whose labels are numbers."""
    val_fraction: float = 0.1
    """Share of the samples for validation, where the source names no splits."""
    test_fraction: float = 0.0
    """Share of the samples for the test, where the source names no splits."""
    encoding: EncodingConfig = field(default_factory=EncodingConfig)
    """In which form they are stored."""
    max_shard_megabytes: float = 256.0
    """A shard is closed before it grows beyond this (estimated from a few samples where all are encoded anew), a larger
    sample has one of its own; 1 MB = 10^6 bytes."""
    max_shard_samples: int = 4096
    """A shard is closed when it holds this many samples."""
    on_bad: Literal["raise", "skip"] = "raise"
    """Samples that cannot be read: pack the others and stop, or leave them out; rejected.csv lists them."""
    seed: int = 0
    """Seed of the shuffle and of the splits."""
    workers: int = 0
    """Processes that write shards; 0: one for each usable processor, 1: this process itself."""
    max_sample_seconds: float = 3600.0
    """A process that works on one sample for longer is ended; where that happens twice, the sample is a bad one."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.max_shard_megabytes < math.inf or self.max_shard_samples < 1:
            problems.append(
                f"max_shard_megabytes is {self.max_shard_megabytes} and max_shard_samples "
                f"{self.max_shard_samples}, both must be positive and finite"
            )
        if self.on_bad not in ("raise", "skip"):
            problems.append(f"on_bad is {self.on_bad!r}, give raise or skip")
        if self.seed < 0 or self.workers < 0:
            problems.append(f"seed and workers are {self.seed} and {self.workers}, give 0 or more")
        if not 0 < self.max_sample_seconds < math.inf:
            problems.append(f"max_sample_seconds is {self.max_sample_seconds}, it must be positive and finite")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What `pack` wrote."""

    destination: Path
    """The packed set: a folder of splits."""
    unit: Unit
    """What was packed."""
    classes: tuple[str, ...]
    """Class names by label, the same in each split."""
    splits: dict[str, PackedSplit]
    """The splits by name, those without samples left out."""
    rejected: tuple[Rejected, ...]
    """Samples that were left out, as listed in DST/rejected.csv: unreadable ones, then missing ones."""
    warnings: tuple[str, ...]
    """What a person should look at, one line each."""


@dataclass(frozen=True, kw_only=True)
class PackProgress:
    """How far it is."""

    done: int
    """Samples that are packed or left out, those of an earlier run included."""
    total: int
    """Samples."""
    num_bytes: int
    """Bytes that this run has packed."""
    earlier: int
    """Samples that an earlier run had finished."""


Progress = Callable[[PackProgress], None]
"""Called at the start and after each sample."""


def pack(config: PackConfig, *, progress: Progress | None = None) -> PackResult:
    """Pack `config.source` into `config.destination`, or go on with what an earlier run has begun.

    Raises:
        PackError: the source is absent, empty or unclear; or, with on_bad "raise", a sample cannot be read
            (all such are in the error's `rejected` and in DESTINATION.rejected.csv; the others are packed by then).
        ValueError: the destination exists, or DESTINATION.partial was begun with other settings.
        RuntimeError: another process packs the same set now, or packing processes keep dying.
        OSError: the disk is full, or cannot be read; finished shards are kept.
    """
    with open_journal(config.destination) as journal:
        source = read_config_source(config)
        if source.are_pictures and config.encoding.store_as == "mp4":
            raise PackError(f"{config.source} holds pictures: pack them --as jpeg, or --as raw for their exact pixels")
        try:
            plan = _plan(config, source, journal)
            _write_missing_shards(config, plan, journal, progress)
            unreadable = read_rejected(plan, journal)
            if unreadable and (config.on_bad == "raise" or len(unreadable) == len(plan.samples)):
                raise cannot_pack(journal, unreadable, plan, source.unit)
            splits = finish_splits(config.encoding.form, source, plan, journal)
            rejected = [*unreadable, *map(rejected_of_missing, source.missing)]
            (journal.packed / REJECTED_NAME).unlink(missing_ok=True)
            if rejected:
                write_atomically(journal.packed / REJECTED_NAME, rejected_csv(rejected))
            journal.publish()
        except OSError as error:
            raise journal.keep(error) from None
        finally:
            journal.clear_unfinished()
    beside(config.destination, f".{REJECTED_NAME}").unlink(missing_ok=True)
    return PackResult(
        destination=config.destination,
        unit=source.unit,
        classes=source.classes,
        splits=splits,
        rejected=tuple(rejected),
        warnings=(*source.warnings, *look_at(source, unreadable)),
    )


def read_config_source(config: PackConfig) -> Source:
    """The samples that `config` asks to pack; raises PackError as `data_shards.sources.read_source` does."""
    return read_source(
        config.source,
        videos=config.videos,
        class_names=config.class_names,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        workers=config.workers,
    )


def _plan(config: PackConfig, source: Source, journal: Journal) -> Plan:
    """The plan of the run that began DST.partial, else a new one, which is noted there."""
    samples = arrange(source, config.seed)
    settings: dict[str, Any] = {
        "val_fraction": config.val_fraction,
        "test_fraction": config.test_fraction,
        "max_shard_megabytes": config.max_shard_megabytes,
        "max_shard_samples": config.max_shard_samples,
        "seed": config.seed,
        **asdict(config.encoding),
    }
    if not config.encoding.is_untouched:
        settings["PyAV"] = version("av")  # another version may encode other bytes
    checksum = digest(samples, source.classes)
    shard_sizes = journal.earlier_plan(settings, checksum)
    if shard_sizes is not None:
        return Plan(samples=samples, shard_sizes=shard_sizes)
    plan = plan_shards(
        samples,
        config.encoding,
        max_shard_bytes=round(config.max_shard_megabytes * 1e6),
        max_shard_samples=config.max_shard_samples,
    )
    journal.write_plan(settings, checksum, plan.shard_sizes)
    return plan


def _write_missing_shards(config: PackConfig, plan: Plan, journal: Journal, progress: Progress | None) -> None:
    """Write the shards that are not finished."""
    waiting: list[ShardJob] = []
    earlier = 0
    for shard in plan.shards():
        if journal.finished(shard):
            earlier += len(shard.samples)
        else:
            job = ShardJob(
                shard=shard, tar=journal.tar_of(shard), record=journal.record_of(shard), encoding=config.encoding
            )
            waiting.append(job)
    at = PackProgress(done=earlier, total=len(plan.samples), num_bytes=0, earlier=earlier)

    def tell(samples: int, num_bytes: int) -> None:
        nonlocal at
        at = replace(at, done=at.done + samples, num_bytes=at.num_bytes + num_bytes)
        if progress:
            progress(at)

    tell(0, 0)
    records = write_shards(
        iter(waiting), workers=config.workers, tell=tell, max_sample_seconds=config.max_sample_seconds
    )
    with closing(records):
        for _ in records:
            pass
