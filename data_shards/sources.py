"""Where videos and their labels come from: a folder per class, a CSV, or Kinetics' own CSV.

    SRC/CLASS/VIDEO, SRC/SPLIT/CLASS/VIDEO     splits: train, val (validation, valid), test
    SRC/labels.csv, or SRC itself a CSV        columns file,label[,split]; others are ignored
    Kinetics' CSV                              label,youtube_id,time_start,time_end[,split]; the files are named
                                               ID_START_END.mp4 (six digits each), anywhere below --videos

Labels are kept as they are written: "007" stays "007". The order is that of the names, not of the disk.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_shards.errors import PackError

__all__ = ["VIDEO_SUFFIXES", "MissingVideo", "Source", "SourceVideo", "assign_splits", "read_source"]

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts",
)  # fmt: skip
"""File names that count as videos, in any case of letters."""

LABELS_NAME = "labels.csv"
_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_KINETICS_COLUMNS = {"label", "youtube_id", "time_start", "time_end"}


@dataclass(frozen=True, kw_only=True)
class SourceVideo:
    """One video with its label."""

    path: Path
    """Where it is."""
    name: str
    """Its path as the source writes it (relative to SRC or the CSV), with forward slashes."""
    label: str
    """Class name, verbatim."""
    split: str
    """"train", "val", "test", or "" while it has none."""


@dataclass(frozen=True, kw_only=True)
class MissingVideo:
    """A row of Kinetics' list whose file is not there."""

    name: str
    """The file name that was looked for."""
    label: str
    """Class name."""
    split: str
    """Split, or "" where the list has none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """All videos of a source, in a fixed order."""

    videos: tuple[SourceVideo, ...]
    """Videos found."""
    missing: tuple[MissingVideo, ...] = ()
    """Videos that Kinetics' list names and that are not there."""
    warnings: tuple[str, ...] = ()
    """What a person should look at, one line each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted; the position is the label."""
        return tuple(sorted({video.label for video in self.videos}))


def read_source(
    source: str | os.PathLike[str],
    *,
    videos: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
) -> Source:
    """Read what `source` holds (see the module); a source without splits is split by `assign_splits`.

    `videos` is the folder that the files of a CSV are relative to; the CSV's own folder unless given.

    Raises:
        PackError: one line that names the row and the value, if the source is absent, empty or unclear.
    """
    root = Path(source)
    base = None if videos is None else Path(videos)
    if not root.exists():
        raise PackError(f"{root} does not exist; give a folder of class folders, or a CSV")
    if base is not None and not base.is_dir():
        raise PackError(f"the folder of the videos, {base}, does not exist")
    if root.is_dir() and (root / LABELS_NAME).is_file():
        root = root / LABELS_NAME
    if root.is_dir():
        if base is not None:
            raise PackError(f"{root} is a folder of videos: a folder of the videos ({base}) is for a CSV only")
        found = _read_folder(root)
    else:
        found = _read_csv(root, base)
    if not found.videos:
        raise PackError(
            f"none of the {len(found.missing)} videos that {root} lists is in {base or root.parent}; "
            "name their folder (--videos)"
        )
    if not any(video.split for video in found.videos):
        found = replace(
            found, videos=assign_splits(found.videos, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        )
    return replace(found, warnings=(*found.warnings, *_look_at(found)))


def assign_splits(
    videos: Sequence[SourceVideo], *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[SourceVideo, ...]:
    """Give each video a split by a hash of its name and `seed`: the same whatever the order and the machine.

    Class by class, so that each class has its share in every split; in all, ceil(n * fraction) videos. It does
    not know which videos belong together (one recording cut in pieces): name the splits in a CSV then.
    """
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise PackError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be 0 or more, and below 1 together"
        )
    by_class: dict[str, list[SourceVideo]] = {}
    for video in videos:
        by_class.setdefault(video.label, []).append(video)
    split_of: dict[str, str] = {}
    seen = num_test = num_val = 0
    for label in sorted(by_class):
        ranked = sorted(by_class[label], key=lambda video: _hash(video.name, seed))
        seen += len(ranked)
        spare = len(ranked) - 1  # each class keeps a video to train on
        test = min(math.ceil(seen * test_fraction - 1e-9) - num_test, spare)
        val = min(math.ceil(seen * val_fraction - 1e-9) - num_val, spare - test)
        num_test, num_val = num_test + test, num_val + val
        names = ["test"] * test + ["val"] * val + ["train"] * (len(ranked) - test - val)
        split_of.update((video.name, split) for video, split in zip(ranked, names, strict=True))
    return tuple(replace(video, split=split_of[video.name]) for video in videos)


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest()


def _look_at(source: Source) -> Iterable[str]:
    """Lines about labels that are likely slips."""
    spellings: dict[str, list[str]] = {}
    for label in source.classes:
        spellings.setdefault(" ".join(label.split()).casefold(), []).append(label)
    for same in spellings.values():
        if len(same) > 1:
            yield f"the classes {', '.join(map(repr, same))} differ only in spaces or case: are they one class?"


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES and not Path(name).name.startswith(".")


def _walk(root: Path) -> list[tuple[str, ...]]:
    """The videos below `root` as parts of their relative paths, sorted; hidden folders are left out."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        parts = Path(folder).relative_to(root).parts
        found += [(*parts, name) for name in names if _is_video(name)]
    return sorted(found)


def _read_folder(root: Path) -> Source:
    found = _walk(root)
    if not found:
        raise PackError(
            f"no videos found in {root}, looked for {' '.join(VIDEO_SUFFIXES)} in SRC/CLASS/ and SRC/SPLIT/CLASS/"
        )
    with_splits = all(len(parts) == 3 and parts[0].lower() in _SPLIT_NAMES for parts in found)
    depth = 3 if with_splits else 2
    odd = next((parts for parts in found if len(parts) != depth), None)
    if odd is not None:
        raise PackError(
            f"{root.joinpath(*odd)} is not at SRC/CLASS/VIDEO, nor are all videos at SRC/SPLIT/CLASS/VIDEO with "
            "SPLIT one of train, val, test; move it, or list the files in a CSV (file,label,split)"
        )
    videos = tuple(
        SourceVideo(
            path=root.joinpath(*parts),
            name="/".join(parts),
            label=parts[-2],
            split=_SPLIT_NAMES[parts[0].lower()] if with_splits else "",
        )
        for parts in found
    )
    return Source(videos=videos, warnings=tuple(_empty_folders(root, found, depth)))


def _empty_folders(root: Path, found: list[tuple[str, ...]], depth: int) -> Iterable[str]:
    used = {parts[: depth - 1] for parts in found}
    tops = [root] if depth == 2 else [root / name for name in sorted({parts[0] for parts in found})]
    for top in tops:
        for folder in sorted(path for path in top.iterdir() if path.is_dir() and path.name[0] != "."):
            if folder.relative_to(root).parts not in used:
                yield f"the folder {folder} holds no videos and is left out"


def _read_csv(path: Path, base: Path | None) -> Source:
    header, rows = _read_rows(path)
    if header.keys() >= _KINETICS_COLUMNS:
        return _read_kinetics(path, rows, "split" in header, base or path.parent)
    if not header.keys() >= {"file", "label"}:
        raise PackError(
            f"{path} needs the columns file,label[,split] (or Kinetics' label,youtube_id,time_start,time_end), "
            f"its first row is: {','.join(header)}"
        )
    videos: list[SourceVideo] = []
    absent: list[tuple[int, Path]] = []
    row_of: dict[Path, int] = {}
    for number, row in rows:
        where = f"{path} row {number}"
        name, label = row["file"], _label_of(row, where)
        if not _is_video(name):
            raise PackError(f"{where}: file {name!r} is not the name of a video ({' '.join(VIDEO_SUFFIXES)})")
        full = Path(os.path.normpath((base or path.parent) / name))
        if full in row_of:
            raise PackError(f"{where}: file {name!r} is in row {row_of[full]} already; keep one of them")
        row_of[full] = number
        if not full.is_file():
            absent.append((number, full))
        split = _split_of(row, where) if "split" in header else ""
        videos.append(SourceVideo(path=full, name=Path(name).as_posix(), label=label, split=split))
    if absent:
        raise PackError(
            f"{path} row {absent[0][0]}: {absent[0][1]} does not exist "
            f"({len(absent)} of {len(videos)} files are absent); paths are relative to {base or path.parent}"
        )
    return Source(videos=tuple(sorted(videos, key=lambda video: video.name)))


def _read_rows(path: Path) -> tuple[dict[str, int], list[tuple[int, dict[str, str]]]]:
    """Columns of the header with their positions, and each row with its line number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, fields) for fields in reader if fields]
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise PackError(f"{path} row {reader.line_num}: {error}") from None
    if len(lines) < 2:
        raise PackError(f"{path} holds no rows below its header; it needs the columns file,label[,split]")
    names = [name.strip().lower() for name in lines[0][1]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PackError(f"{path} has two columns named {twice!r}")
    for number, fields in lines[1:]:
        if any(ord(character) < 32 for field in fields for character in field):
            raise PackError(f"{path} row {number} has a line break or control character in a value: {fields!r:.120}")
        if len(fields) != len(names):
            raise PackError(
                f"{path} row {number} has {len(fields)} values, the header has {len(names)} columns "
                f"({fields[0]!r} ...); put values with commas in quotes"
            )
    header = {name: place for place, name in enumerate(names)}
    return header, [(number, dict(zip(names, fields, strict=True))) for number, fields in lines[1:]]


def _label_of(row: dict[str, str], where: str) -> str:
    if not row["label"].strip():
        raise PackError(f"{where}: the label is empty ({','.join(row.values())})")
    return row["label"]


def _split_of(row: dict[str, str], where: str) -> str:
    split = _SPLIT_NAMES.get(row["split"].strip().lower())
    if split is None:
        raise PackError(f"{where}: the split is {row['split']!r}; write train, val or test")
    return split


def _read_kinetics(path: Path, rows: list[tuple[int, dict[str, str]]], has_split: bool, base: Path) -> Source:
    """The videos of Kinetics' list that are below `base`, and those that are not."""
    by_stem: dict[str, list[tuple[str, ...]]] = {}
    for parts in _walk(base):
        by_stem.setdefault(Path(parts[-1]).stem, []).append(parts)
    videos, missing = [], []
    row_of: dict[str, int] = {}
    for number, row in rows:
        where = f"{path} row {number}"
        label = _label_of(row, where)
        split = _split_of(row, where) if has_split else ""
        stem = f"{row['youtube_id']}_{_second(row, 'time_start', where)}_{_second(row, 'time_end', where)}"
        if stem in row_of:
            raise PackError(f"{where}: the clip {stem} is in row {row_of[stem]} already; keep one of them")
        row_of[stem] = number
        places = by_stem.get(stem, [])
        if places:
            parts = next((parts for parts in places if label in parts[:-1]), places[0])
            full = base.joinpath(*parts)
            videos.append(SourceVideo(path=full, name="/".join(parts), label=label, split=split))
        else:
            missing.append(MissingVideo(name=f"{stem}.mp4", label=label, split=split))
    return Source(videos=tuple(sorted(videos, key=lambda video: video.name)), missing=tuple(missing))


def _second(row: dict[str, str], column: str, where: str) -> str:
    try:
        return f"{int(float(row[column])):06d}"
    except (ValueError, OverflowError):
        raise PackError(f"{where}: {column} is {row[column]!r}, not a number of seconds") from None
