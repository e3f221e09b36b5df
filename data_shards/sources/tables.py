"""Tables of files and labels: a CSV with file,label[,split], and Kinetics' own CSV."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from data_shards.errors import PackError
from data_shards.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Missing,
    Source,
    SourceSample,
    VideoFile,
    content_of_file,
    is_image,
    is_video,
)
from data_shards.sources.folders import sizes_of, walk
from data_shards.sources.splits import SPLIT_NAMES

_KINETICS_COLUMNS = {"label", "youtube_id", "time_start", "time_end"}


def read_table(path: Path, base: Path | None) -> Source:
    """The samples of a CSV, whose files are relative to `base`, or to its own folder.

    Raises:
        PackError: one line that names the row and the value.
    """
    header, rows = _read_rows(path)
    if header.keys() >= _KINETICS_COLUMNS:
        return _read_kinetics(path, rows, "split" in header, base or path.parent)
    if not header.keys() >= {"file", "label"}:
        raise PackError(
            f"{path} needs the columns file,label[,split] (or Kinetics' label,youtube_id,time_start,time_end), "
            f"its first row is: {','.join(header)}"
        )
    images = is_image(rows[0][1]["file"])
    row_of: dict[Path, int] = {}
    for number, row in rows:
        where, name = f"{path} row {number}", row["file"]
        if not (is_image if images else is_video)(name):
            what, suffixes = ("an image", IMAGE_SUFFIXES) if images else ("a video", VIDEO_SUFFIXES)
            raise PackError(f"{where}: file {name!r} is not the name of {what} ({' '.join(suffixes)})")
        full = Path(os.path.normpath((base or path.parent) / name))
        if full in row_of:
            raise PackError(f"{where}: file {name!r} is in row {row_of[full]} already; keep one of them")
        row_of[full] = number
    sizes = list(sizes_of(list(row_of)))
    absent = [full for full, size in zip(row_of, sizes, strict=True) if size == 0 and not full.is_file()]
    if absent:
        raise PackError(
            f"{path} row {row_of[absent[0]]}: {absent[0]} does not exist "
            f"({len(absent)} of {len(rows)} files are absent); paths are relative to {base or path.parent}"
        )
    samples = [
        SourceSample(
            name=Path(row["file"]).as_posix(),
            label=_label_of(row, f"{path} row {number}"),
            split=_split_of(row, f"{path} row {number}") if "split" in header else "",
            content=content_of_file(full),
            weight=size,
        )
        for (number, row), full, size in zip(rows, row_of, sizes, strict=True)
    ]
    samples.sort(key=lambda sample: sample.name)
    return Source(samples=tuple(samples), unit="images" if images else "videos")


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
    split = SPLIT_NAMES.get(row["split"].strip().lower())
    if split is None:
        raise PackError(f"{where}: the split is {row['split']!r}; write train, val or test")
    return split


def _read_kinetics(path: Path, rows: list[tuple[int, dict[str, str]]], has_split: bool, base: Path) -> Source:
    """The videos of Kinetics' list that are below `base`, and those that are not."""
    by_stem: dict[str, list[tuple[str, ...]]] = {}
    for parts in walk(base, is_video):
        by_stem.setdefault(Path(parts[-1]).stem, []).append(parts)
    found: list[tuple[tuple[str, ...], str, str]] = []
    missing = []
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
            found.append((next((parts for parts in places if label in parts[:-1]), places[0]), label, split))
        else:
            missing.append(Missing(name=f"{stem}.mp4", label=label, split=split))
    found.sort()
    paths = [base.joinpath(*parts) for parts, _, _ in found]
    samples = tuple(
        SourceSample(name="/".join(parts), label=label, split=split, content=VideoFile(file), weight=size)
        for (parts, label, split), file, size in zip(found, paths, sizes_of(paths), strict=True)
    )
    return Source(samples=samples, missing=tuple(missing))


def _second(row: dict[str, str], column: str, where: str) -> str:
    try:
        return f"{int(float(row[column])):06d}"
    except (ValueError, OverflowError):
        raise PackError(f"{where}: {column} is {row[column]!r}, not a number of seconds") from None
