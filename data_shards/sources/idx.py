"""The idx files of MNIST and its kin: train-images-idx3-ubyte[.gz] with train-labels-idx1-ubyte[.gz], and t10k's.

The format is described at the foot of the MNIST page: a big-endian magic number (0, 0, type, dimensions), the size of
each dimension, then the data. An image is a clip of one grey frame; labels are numbers and keep them.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import DataError, PackError
from data_shards.sources.base import PictureContent, Source, SourceSample, name_of_number

_IMAGES_NAME = re.compile(r"(?P<prefix>.+)-images-idx3-ubyte(\.gz)?")
_UNSIGNED_BYTE = 8
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}


@dataclass(frozen=True, slots=True)
class IdxImage(PictureContent):
    """One image of an idx file."""

    path: Path
    index: int

    @property
    def where(self) -> str:
        """See `Content.where`."""
        return f"{self.path}:{self.index}"

    def read(self) -> np.ndarray[Any, Any]:
        """Grey pixels, uint8 (1, H, W)."""
        return _images(self.path)[self.index : self.index + 1]


def is_idx(path: Path) -> bool:
    """Whether a file is named as one of images."""
    return _IMAGES_NAME.fullmatch(path.name) is not None


def find_idx(folder: Path) -> list[Path]:
    """The files of images in a folder; of one that is there zipped and unzipped, the latter."""
    by_name: dict[str, Path] = {}
    for path in sorted(filter(is_idx, folder.iterdir())):
        by_name.setdefault(path.name.removesuffix(".gz"), path)
    return list(by_name.values())


def read_idx(images: Sequence[Path], class_names: tuple[str, ...] | None) -> Source:
    """The images of idx files; without splits where there is one file alone.

    Raises:
        PackError: a file is damaged, its name does not say its split, its labels are absent, or there are more or fewer
            labels than images.
    """
    samples: list[SourceSample] = []
    top = 0
    for path in images:
        prefix = path.name.partition("-images-")[0]
        split = _SPLITS.get(prefix.lower().rpartition("-")[2], "") if len(images) > 1 else ""
        if len(images) > 1 and not split:
            raise PackError(
                f"{path.name} does not say its split; of several files each is named train-, t10k- or test-images-..., "
                "or give one of them alone"
            )
        try:
            pixels, labels = _load(path, 3), _load(_labels_of(path), 1)
        except DataError as error:
            raise PackError(str(error)) from None
        if len(pixels) != len(labels):
            raise PackError(f"{path} holds {len(pixels)} images, {_labels_of(path).name} {len(labels)} labels")
        top = max(top, int(labels.max(initial=0)))
        width = len(str(max(0, len(labels) - 1)))
        samples += (
            SourceSample(
                name=f"{prefix}/{index:0{width}d}",
                label=name_of_number(int(label), class_names, f"{_labels_of(path)} label {index}"),
                split=split,
                content=IdxImage(path, index),
                weight=math.prod(pixels.shape[1:]),
            )
            for index, label in enumerate(labels)
        )
    if not samples:
        raise PackError(f"{images[0]} holds no images")
    names = class_names or tuple(map(str, range(top + 1)))
    return Source(samples=tuple(samples), numbered_classes=names, unit="images")


def _labels_of(images: Path) -> Path:
    """The labels beside an images file, gzipped or not."""
    name = images.name.replace("-images-idx3-", "-labels-idx1-")
    return next(
        (path for path in (images.with_name(name), images.with_name(name.removesuffix(".gz"))) if path.is_file()),
        images.with_name(name),
    )


@lru_cache(maxsize=1)
def _images(path: Path) -> np.ndarray[Any, Any]:
    """All images of a file: a packing process reads it once."""
    return _load(path, 3)


def _load(path: Path, dimensions: int) -> np.ndarray[Any, Any]:
    """The uint8 array of an idx file, gzipped or not."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; it lies beside its images or labels") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut ({error})") from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)) or len(content) < start:
        raise DataError(
            f"{path} is no idx file of {dimensions} dimensions of bytes (it begins with {content[:4].hex()})"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path} holds {len(content) - start} bytes, its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
