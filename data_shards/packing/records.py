"""What is noted of each finished shard: where its samples lie, and what was left out of it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_shards.durable import write_atomically

REJECTED_NAME = "rejected.csv"


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A sample that is not in the shards: the columns of rejected.csv."""

    file: str
    """Its path, or its name where there is no file."""
    label: str
    """Class name."""
    split: str
    """Split, or "" where the source has none for it."""
    reason: str
    """Why, in one line."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """A finished shard."""

    name: str
    """File name of the tar."""
    num_bytes: int
    """Its size."""
    weights: list[int]
    """`SourceSample.weight` of each sample that was tried."""
    rows: list[list[Any]]
    """A row of `data_shards.manifest.samples_dtype` for each sample in the tar, without the shard's number."""
    rejected: list[Rejected]
    """Samples that could not be packed."""
    stamps: dict[str, tuple[int, int] | None]
    """`stamp_of` the file of each of those, by the sample's place in the shard: another one is tried again."""


def write_record(path: Path, record: ShardRecord) -> None:
    """Note a shard as finished; its tar is durable already."""
    write_atomically(path, json.dumps(asdict(record)).encode())


def read_record(path: Path) -> ShardRecord | None:
    """The record of a shard; None where the shard is not finished."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    stamps = {place: None if stamp is None else tuple(stamp) for place, stamp in fields["stamps"].items()}
    return ShardRecord(**{**fields, "rejected": [Rejected(**row) for row in fields["rejected"]], "stamps": stamps})


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Size and time (ns) of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def rejected_csv(rejected: Sequence[Rejected]) -> bytes:
    """The content of rejected.csv."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file", "label", "split", "reason"))
    rows.writerows((row.file, row.label, row.split, row.reason) for row in rejected)
    return text.getvalue().encode(errors="surrogateescape")
