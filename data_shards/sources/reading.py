"""Finds out what a source is, and reads its list of samples.

    SRC/CLASS/VIDEO, SRC/SPLIT/CLASS/VIDEO     splits: train, val (validation, valid), test; pictures likewise
    SRC/IMAGE, SRC/SPLIT/IMAGE                 pictures without labels: all are of one class, "unlabelled"
    SRC/labels.csv, or SRC itself a CSV        columns file,label[,split]; others are ignored
    Kinetics' CSV                              label,youtube_id,time_start,time_end[,split]; the files are named
                                               ID_START_END.mp4 (six digits each), anywhere below --videos
    SRC/train*.txt, or SRC itself a list       TSN's lists: path num_frames label (`data_shards.sources.frame_lists`)
    SRC/*.tar, SRC/SPLIT/*.tar, or one tar     WebDataset tars (`data_shards.sources.tars`)
    SRC/*-images-idx3-ubyte[.gz], or one       MNIST and its kin (`data_shards.sources.idx`)

Labels are kept as they are written: "007" stays "007". The order is that of the names, not of the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from data_shards.errors import PackError
from data_shards.sources.base import Source, read_class_names
from data_shards.sources.folders import read_folder
from data_shards.sources.frame_lists import find_lists, is_list, read_lists
from data_shards.sources.idx import find_idx, is_idx, read_idx
from data_shards.sources.splits import assign_splits
from data_shards.sources.tables import read_table
from data_shards.sources.tars import find_tars, read_tars

LABELS_NAME = "labels.csv"


def read_source(
    source: str | os.PathLike[str],
    *,
    videos: str | os.PathLike[str] | None = None,
    class_names: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 1,
) -> Source:
    """Read what `source` holds (see the module); a source without splits is split by `assign_splits`.

    Args:
        videos: the folder that the files of a CSV or a list are relative to; its own folder unless given.
        class_names: a file with a class name a line, for sources whose labels are numbers.
        workers: processes that read the headers of tars; 0 takes one a usable processor.

    Raises:
        PackError: one line that names the row and the value, if the source is absent, empty or unclear.
    """
    root = Path(source)
    base = None if videos is None else Path(videos)
    if not root.exists():
        raise PackError(f"{root} does not exist; give a folder of class folders, or a CSV")
    if base is not None and not base.is_dir():
        raise PackError(f"the folder of the videos, {base}, does not exist")
    names = None if class_names is None else read_class_names(Path(class_names))
    found = _read(root, base, names, workers)
    if not found.samples:
        raise PackError(
            f"none of the {len(found.missing)} videos that {root} lists is in {base or root.parent}; "
            "name their folder (--videos)"
        )
    if names is not None and found.numbered_classes is None:
        raise PackError(
            f"{root} names its classes itself: a list of class names ({class_names}) is for numbered labels"
        )
    if not any(sample.split for sample in found.samples):
        samples = assign_splits(found.samples, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
        found = replace(found, samples=samples)
    return replace(found, warnings=(*found.warnings, *_look_at(found)))


def _read(root: Path, base: Path | None, names: tuple[str, ...] | None, workers: int) -> Source:
    """The samples of `root`, by the reader of its layout."""
    if root.is_file():
        if root.suffix == ".tar":
            return read_tars([root], root.parent, names, workers=workers)
        if is_idx(root):
            return read_idx([root], names)
        if root.suffix == ".txt" and is_list(root):
            return read_lists([root], base, names)
        return read_table(root, base)
    if (root / LABELS_NAME).is_file():
        return read_table(root / LABELS_NAME, base)
    if images := find_idx(root):
        return read_idx(images, names)
    if tars := find_tars(root):
        return read_tars(tars, root, names, workers=workers)
    if lists := find_lists(root):
        return read_lists(lists, base, names)
    if base is not None:
        raise PackError(f"{root} is a folder of videos: a folder of the videos ({base}) is for a CSV or a list")
    return read_folder(root)


def _look_at(source: Source) -> Iterable[str]:
    """Lines about labels that are likely slips."""
    spellings: dict[str, list[str]] = {}
    for label in source.classes:
        spellings.setdefault(" ".join(label.split()).casefold(), []).append(label)
    for same in spellings.values():
        if len(same) > 1:
            yield f"the classes {', '.join(map(repr, same))} differ only in spaces or case: are they one class?"
