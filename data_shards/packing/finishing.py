"""What comes after the shards: the manifests, and what a person is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.durable import beside, fsync_folder, write_atomically
from data_shards.errors import PackError
from data_shards.forms.base import Form
from data_shards.manifest import Shard, samples_dtype, write_manifest
from data_shards.packing.journal import Journal
from data_shards.packing.planning import Plan
from data_shards.packing.records import REJECTED_NAME, Rejected, ShardRecord, read_record, rejected_csv
from data_shards.sources import Missing, Source
from data_shards.sources.splits import SPLITS

_NAMES_IN_A_WARNING = 5


@dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """One split as written."""

    num_samples: int
    """Samples in it."""
    num_shards: int
    """Tars."""
    num_bytes: int
    """Bytes of all tars."""


def finish_splits(form: Form, source: Source, plan: Plan, journal: Journal) -> dict[str, PackedSplit]:
    """Write the manifest of each split that has samples, from the records of its shards."""
    done = {}
    for split in plan.shard_sizes:
        folder = journal.packed / split
        shards: list[Shard] = []
        tables = []
        num_samples = 0
        for record in _records(plan, journal, split):
            size = len(record.rows)
            if size == 0:
                continue
            tables.append(_table(len(shards), record.rows))
            shards.append(
                Shard(name=record.name, num_samples=size, num_bytes=record.num_bytes, first_sample=num_samples)
            )
            num_samples += size
        if not shards:
            shutil.rmtree(folder)  # with the manifest of a run that was killed, and whose samples are bad now
            continue
        samples = np.concatenate(tables)
        write_manifest(folder, split=split, classes=source.classes, shards=shards, samples=samples, form=form)
        fsync_folder(folder)
        num_bytes = sum(shard.num_bytes for shard in shards)
        done[split] = PackedSplit(num_samples=len(samples), num_shards=len(shards), num_bytes=num_bytes)
    return done


def _records(plan: Plan, journal: Journal, split: str | None = None) -> Iterator[ShardRecord]:
    for shard in plan.shards():
        if split in (None, shard.split):
            record = read_record(journal.record_of(shard))
            assert record is not None, shard
            yield record


def _table(shard: int, rows: list[list[Any]]) -> np.ndarray[Any, np.dtype[np.void]]:
    """The rows of one shard as the manifest holds them."""
    keys = [row[-1].encode() for row in rows]
    dtype = samples_dtype(max(map(len, keys)))
    return np.array([(shard, *row[:-1], key) for row, key in zip(rows, keys, strict=True)], dtype)


def read_rejected(plan: Plan, journal: Journal) -> list[Rejected]:
    """The samples of all shards that could not be packed, by file."""
    rejected = [row for record in _records(plan, journal) for row in record.rejected]
    return sorted(rejected, key=lambda row: row.file)


def rejected_of_missing(missing: Missing) -> Rejected:
    """The row of rejected.csv for a sample that the source does not hold."""
    return Rejected(file=missing.name, label=missing.label, split=missing.split, reason=missing.reason)


def cannot_pack(journal: Journal, rejected: list[Rejected], plan: Plan, unit: str) -> PackError:
    """The error for samples that cannot be read, after all of them are listed beside the destination."""
    listed = beside(journal.destination, f".{REJECTED_NAME}")
    write_atomically(listed, rejected_csv(rejected))
    first, total = rejected[0], len(plan.samples)
    if len(rejected) < total:
        advice = (
            "repair them and run the command again, or leave them out (--on-bad skip); "
            f"the others are packed in {journal.folder}"
        )
    else:
        advice = "nothing is left"
        journal.discard()
    error = PackError(
        f"{len(rejected)} of {total} {unit} cannot be packed, the first is {first.file}: {first.reason}; "
        f"{listed} lists all; {advice}"
    )
    error.rejected = tuple(rejected)
    return error


def look_at(source: Source, unreadable: list[Rejected]) -> list[str]:
    """Lines about what was left out and about classes without samples."""
    lines = []
    if unreadable:
        lines.append(f"{len(unreadable)} {source.unit} cannot be read and are left out, see {REJECTED_NAME}")
    if source.missing:
        total = len(source.missing) + len(source.samples)
        lines.append(f"{len(source.missing)} of {total} listed {source.unit} are missing, see {REJECTED_NAME}")
    lost = {row.file for row in unreadable}
    kept = {(sample.split, sample.label) for sample in source.samples if sample.content.where not in lost}
    for split in SPLITS:
        if not any(name == split for name, _ in kept):
            continue
        absent = [label for label in source.classes if (split, label) not in kept]
        if absent:
            names = ", ".join(map(repr, absent[:_NAMES_IN_A_WARNING]))
            more = " ..." if len(absent) > _NAMES_IN_A_WARNING else ""
            kind = source.unit.removesuffix("s")
            lines.append(f"{len(absent)} of {len(source.classes)} classes have no {kind} in {split}: {names}{more}")
    return lines
