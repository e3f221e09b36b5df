"""A folder per class, of videos or of pictures: SRC/CLASS/FILE or SRC/SPLIT/CLASS/FILE.

Pictures may come without classes, as SRC/FILE or SRC/SPLIT/FILE: all are then of one class, "unlabelled".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_shards.errors import PackError
from data_shards.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Source,
    SourceSample,
    Unit,
    content_of_file,
    is_image,
    is_video,
)
from data_shards.sources.splits import SPLIT_NAMES

UNLABELLED = "unlabelled"
"""The class of pictures that have none."""

_STAT_THREADS = 32  # a file system over a network answers many at once
_FEW = 256  # files for which starting threads takes longer than asking


def walk(root: Path, wanted: Callable[[str], bool]) -> list[tuple[str, ...]]:
    """The files below `root` with `wanted` names, as parts of relative paths, sorted; hidden folders are left out.

    Raises OSError where a folder cannot be read.
    """
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "lost+found"]
        parts = Path(folder).relative_to(root).parts
        found += [(*parts, name) for name in names if wanted(name)]
    return sorted(found)


def _raise(error: OSError) -> None:
    """By itself `os.walk` leaves out in silence what it cannot read."""
    raise error


def sizes_of(paths: Sequence[Path]) -> Iterator[int]:
    """Sizes of files in bytes, in order; 0 for one that cannot be asked (packing it then says why)."""
    if len(paths) <= _FEW:
        yield from map(_size_of, paths)
        return
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        yield from pool.map(_size_of, paths, chunksize=64)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_folder(root: Path) -> Source:
    """The videos of class folders; their pictures, where there is no video.

    Raises:
        PackError: there is neither, or a file is at another depth.
    """
    everything = walk(root, lambda name: is_video(name) or is_image(name))
    found = [parts for parts in everything if is_video(parts[-1])] or everything
    if not found:
        raise PackError(
            f"no videos found in {root}, looked for {' '.join(VIDEO_SUFFIXES)} (or, for images, "
            f"{' '.join(IMAGE_SUFFIXES)}) in SRC/CLASS/ and SRC/SPLIT/CLASS/, for labels.csv, WebDataset tars, "
            "lists such as train_videofolder.txt, and *-images-idx3-ubyte.gz"
        )
    unit: Unit = "images" if is_image(found[0][-1]) else "videos"
    depths = {len(parts) for parts in found}
    in_splits = all(len(parts) > 1 and parts[0].lower() in SPLIT_NAMES for parts in found)
    unlabelled = unit == "images" and depths == {2 if in_splits else 1}
    in_splits = in_splits and (unlabelled or depths == {3})  # SRC/train/VIDEO: a class may be named "train"
    depth = 2 + in_splits - unlabelled
    odd = next((parts for parts in found if len(parts) != depth), None)
    if odd is not None:
        what = unit.removesuffix("s").upper()
        raise PackError(
            f"{root.joinpath(*odd)} is not at SRC/CLASS/{what}, nor are all {unit} at SRC/SPLIT/CLASS/{what} "
            "with SPLIT one of train, val, test; move it, or list the files in a CSV (file,label,split)"
        )
    paths = [root.joinpath(*parts) for parts in found]
    samples = tuple(
        SourceSample(
            name="/".join(parts),
            label=UNLABELLED if unlabelled else parts[-2],
            split=SPLIT_NAMES[parts[0].lower()] if in_splits else "",
            content=content_of_file(path),
            weight=size,
        )
        for parts, path, size in zip(found, paths, sizes_of(paths), strict=True)
    )
    warnings = [f"{root} has no folders of classes: all images are of one class, {UNLABELLED!r}"] if unlabelled else []
    return Source(samples=samples, unit=unit, warnings=(*warnings, *_empty_folders(root, found, depth, unit)))


def _empty_folders(root: Path, found: list[tuple[str, ...]], depth: int, unit: str) -> Iterable[str]:
    used = {parts[: depth - 1] for parts in found}
    tops = [root] if depth <= 2 else [root / name for name in sorted({parts[0] for parts in found})]
    for top in tops:
        for folder in sorted(path for path in top.iterdir() if path.is_dir() and path.name[0] != "."):
            if folder.relative_to(root).parts not in used:
                yield f"the folder {folder} holds no {unit} and is left out"
