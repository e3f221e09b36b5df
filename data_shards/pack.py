"""Packs labelled videos into WebDataset shards with a manifest.

    result = pack(PackConfig(source=Path("videos"), destination=Path("packed")), progress=None)

writes `packed/train`, `packed/val`, `packed/test` (those that have samples): tars that any WebDataset reader
opens, and the manifest of `data_shards.manifest`. The videos are copied as they are. The samples of a split are
shuffled once, by seed, so each shard mixes the classes. The folder appears when it is whole: an error, a full disk
or a kill leaves no part of it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_shards.durable import beside, folder_written_aside, fsync_folder, refuse_existing, write_atomically
from data_shards.errors import DataError, PackError
from data_shards.manifest import write_manifest
from data_shards.parallel import Progress, ordered_map
from data_shards.probe import VideoInfo, probe_video
from data_shards.shard_writer import MAX_PAYLOAD_BYTES, ShardWriter, sample_keys
from data_shards.sources import Source, SourceVideo, read_source

__all__ = ["PackConfig", "PackError", "PackResult", "PackedSplit", "Rejected", "pack"]

SPLITS = ("train", "val", "test")
REJECTED_NAME = "rejected.csv"
_VIDEOS_A_CHUNK = 8
_NAMES_IN_A_WARNING = 5


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack, and how."""

    source: Path
    """Folder of class folders (SRC/CLASS/VIDEO or SRC/SPLIT/CLASS/VIDEO), a CSV, or a folder with labels.csv."""
    destination: Path
    """Folder to write; it must not exist yet."""
    videos: Path | None = None
    """Folder of the videos that a CSV names; the CSV's own folder unless given."""
    val_fraction: float = 0.1
    """Share of the videos for validation, where the source names no splits."""
    test_fraction: float = 0.0
    """Share of the videos for the test, where the source names no splits."""
    max_shard_megabytes: float = 256.0
    """A shard is closed before it grows beyond this (a larger video gets a shard of its own); 1 MB = 10^6 bytes."""
    max_shard_samples: int = 4096
    """A shard is closed when it holds this many videos."""
    on_bad: Literal["raise", "skip"] = "raise"
    """A video that cannot be read: stop and pack nothing, or leave it out and list it in rejected.csv."""
    seed: int = 0
    """Seed of the shuffle and of the splits."""
    workers: int = 0
    """Processes that examine the videos; 0 takes one for each usable processor."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_shard_megabytes <= 0 or self.max_shard_samples < 1:
            problems.append(
                f"max_shard_megabytes is {self.max_shard_megabytes} and max_shard_samples "
                f"{self.max_shard_samples}, both must be positive"
            )
        if self.on_bad not in ("raise", "skip"):
            problems.append(f"on_bad is {self.on_bad!r}, give raise or skip")
        if self.seed < 0 or self.workers < 0:
            problems.append(f"seed and workers are {self.seed} and {self.workers}, give 0 or more")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A video that is not in the shards: the columns of rejected.csv."""

    file: str
    """Its path, or its name where there is no file."""
    label: str
    """Class name."""
    split: str
    """Split, or "" where the source has none for it."""
    reason: str
    """Why, in one line."""


@dataclass(frozen=True, kw_only=True)
class PackedSplit:
    """One split as written."""

    num_samples: int
    """Videos in it."""
    num_shards: int
    """Tars."""
    num_bytes: int
    """Bytes of all tars."""


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What `pack` wrote."""

    destination: Path
    """The packed set: a folder of splits."""
    classes: tuple[str, ...]
    """Class names, sorted, the same in each split."""
    splits: dict[str, PackedSplit]
    """The splits by name, those without samples left out."""
    rejected: tuple[Rejected, ...]
    """Videos that were left out, as listed in DST/rejected.csv: unreadable ones, then missing ones."""
    warnings: tuple[str, ...]
    """What a person should look at, one line each."""


def pack(config: PackConfig, *, progress: Progress | None = None) -> PackResult:
    """Pack `config.source` into `config.destination`.

    Raises:
        PackError: the source is absent, empty or unclear; or, with on_bad "raise", a video cannot be read
            (all such are in the error's `rejected` and in DESTINATION.rejected.csv).
        ValueError: the destination exists.
        OSError: the disk is full, or cannot be read; nothing is kept.
    """
    refuse_existing(config.destination)
    source = read_source(
        config.source,
        videos=config.videos,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    videos = _shuffled(source.videos, config.seed)
    with folder_written_aside(config.destination) as aside:
        splits, unreadable = _write_splits(config, source.classes, videos, aside, progress)
        unreadable.sort(key=lambda row: row.file)
        if unreadable and (config.on_bad == "raise" or not splits):
            raise _cannot_pack(config.destination, unreadable, len(videos))
        rejected = unreadable + [
            Rejected(file=video.name, label=video.label, split=video.split, reason="missing: no such file")
            for video in source.missing
        ]
        if rejected:
            write_atomically(aside / REJECTED_NAME, _rejected_csv(rejected))
    beside(config.destination, f".{REJECTED_NAME}").unlink(missing_ok=True)
    return PackResult(
        destination=config.destination,
        classes=source.classes,
        splits=splits,
        rejected=tuple(rejected),
        warnings=(*source.warnings, *_look_at(source, unreadable)),
    )


def _shuffled(videos: Sequence[SourceVideo], seed: int) -> list[SourceVideo]:
    """The videos split by split, each split in an order drawn from the seed."""
    ordered: list[SourceVideo] = []
    for number, split in enumerate(SPLITS):
        members = [video for video in videos if video.split == split]
        order = np.random.default_rng([seed, number]).permutation(len(members))
        ordered += [members[place] for place in order]
    assert len(ordered) == len(videos), "a source gave a split of another name"
    return ordered


def _write_splits(
    config: PackConfig,
    classes: tuple[str, ...],
    videos: Sequence[SourceVideo],
    folder: Path,
    progress: Progress | None,
) -> tuple[dict[str, PackedSplit], list[Rejected]]:
    """Write the shards and manifests below `folder`; returns the splits, and the videos that cannot be read.

    With on_bad "raise" the first such video ends the writing, and the others are only examined, to list them all.
    """
    labels = {name: label for label, name in enumerate(classes)}
    keys = sample_keys([video.name for video in videos])
    writers: dict[str, ShardWriter] = {}
    rejected: list[Rejected] = []
    with ExitStack() as stack:
        examined = stack.enter_context(
            closing(
                ordered_map(
                    _examine,
                    [video.path for video in videos],
                    workers=config.workers,
                    chunk=_VIDEOS_A_CHUNK,
                    progress=progress,
                )
            )
        )
        for outcome, video, key in zip(examined, videos, keys, strict=True):
            if isinstance(outcome, str):
                rejected.append(Rejected(file=str(video.path), label=video.label, split=video.split, reason=outcome))
            if isinstance(outcome, str) or (rejected and config.on_bad == "raise"):
                continue
            if video.split not in writers:
                (folder / video.split).mkdir()
                writers[video.split] = ShardWriter(
                    folder / video.split,
                    max_shard_bytes=round(config.max_shard_megabytes * 1e6),
                    max_shard_samples=config.max_shard_samples,
                )
                stack.callback(writers[video.split].discard)
            writers[video.split].add(
                key,
                video.path.suffix.lower(),
                video.path.read_bytes(),
                label=labels[video.label],
                info=outcome,
                meta={"class": video.label, "label": labels[video.label], "file": video.name},
            )
        if rejected and config.on_bad == "raise":
            return {}, rejected
        return {split: _finish(writer, split, classes, folder / split) for split, writer in writers.items()}, rejected


def _finish(writer: ShardWriter, split: str, classes: tuple[str, ...], folder: Path) -> PackedSplit:
    shards, samples = writer.close()
    write_manifest(folder, split=split, classes=classes, shards=shards, samples=samples)
    fsync_folder(folder)
    return PackedSplit(
        num_samples=len(samples), num_shards=len(shards), num_bytes=sum(shard.num_bytes for shard in shards)
    )


def _examine(path: Path) -> VideoInfo | str:
    """Facts of a video, or why it cannot be packed."""
    try:
        if path.stat().st_size > MAX_PAYLOAD_BYTES:
            return "too large: a member of a plain tar has at most 8 GiB"
        return probe_video(path.read_bytes())
    except DataError as error:
        return str(error)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return f"cannot be read: {error.strerror}"


def _cannot_pack(destination: Path, rejected: list[Rejected], total: int) -> PackError:
    """The error for videos that cannot be read, after all of them are listed beside the destination."""
    listed = beside(destination, f".{REJECTED_NAME}")
    write_atomically(listed, _rejected_csv(rejected))
    first = rejected[0]
    advice = "repair or remove them, or leave them out (--on-bad skip)" if len(rejected) < total else "nothing is left"
    error = PackError(
        f"{len(rejected)} of {total} videos cannot be packed, the first is {first.file}: {first.reason}; "
        f"{listed} lists all; {advice}"
    )
    error.rejected = tuple(rejected)
    return error


def _rejected_csv(rejected: Sequence[Rejected]) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file", "label", "split", "reason"))
    rows.writerows((row.file, row.label, row.split, row.reason) for row in rejected)
    return text.getvalue().encode(errors="surrogateescape")


def _look_at(source: Source, unreadable: Sequence[Rejected]) -> list[str]:
    """Lines about what was left out and about classes without samples."""
    lines = []
    if unreadable:
        lines.append(f"{len(unreadable)} videos cannot be read and are left out, see {REJECTED_NAME}")
    if source.missing:
        total = len(source.missing) + len(source.videos)
        lines.append(f"{len(source.missing)} of {total} listed videos are missing, see {REJECTED_NAME}")
    lost = {row.file for row in unreadable}
    kept = {(video.split, video.label) for video in source.videos if str(video.path) not in lost}
    for split in SPLITS:
        if not any(name == split for name, _ in kept):
            continue
        absent = [label for label in source.classes if (split, label) not in kept]
        if absent:
            names = ", ".join(map(repr, absent[:_NAMES_IN_A_WARNING]))
            more = " ..." if len(absent) > _NAMES_IN_A_WARNING else ""
            lines.append(f"{len(absent)} of {len(source.classes)} classes have no video in {split}: {names}{more}")
    return lines
