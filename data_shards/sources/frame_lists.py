"""The lists of the TSN and TSM code bases: `path num_frames label` a line, a folder of JPEG frames each.

    some_folder/video_0001 120 3        frames img_00001.jpg ... img_00120.jpg (or image_00001.jpg, 000001.jpg, ...)
    some_folder/video.mp4 3             lists of video files have no number of frames

A list's name says its split (train_videofolder.txt); paths are relative to --videos, or to the list's own folder.
Labels are numbers from 0 and keep their number; a file with a class name a line (--class-names) names them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import DataError, PackError
from data_shards.sources.base import (
    IMAGE_SUFFIXES,
    Content,
    PictureContent,
    Source,
    SourceSample,
    VideoFile,
    is_video,
    name_of_number,
)
from data_shards.sources.folders import sizes_of
from data_shards.sources.splits import SPLIT_NAMES

_SERIES = ("image_", "img_", "frame_", "")  # first that is there; others (flow_x_) may lie beside them
_FRAME_NAME = re.compile(r"(.*?)(\d+)(\.\w+)")


class PictureFiles(Sequence[bytes]):
    """Picture files, each read when it is taken: of a video of which few frames are stored, few are read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> bytes:  # type: ignore[override]
        return self._paths[number].read_bytes()


@dataclass(frozen=True, slots=True)
class FrameFolder(PictureContent):
    """A folder with one numbered picture a frame."""

    path: Path
    num_frames: int

    @property
    def where(self) -> str:
        """See `Content.where`."""
        return str(self.path)

    def read(self) -> Sequence[bytes]:
        """The pictures in order, counted from 1, or from 0 where there is a picture 0; each is read when it is taken.

        Raises DataError where the folder holds no series of pictures, or not all of it.
        """
        series: dict[str, dict[int, str]] = {}
        for entry in sorted(path.name for path in self.path.iterdir()):
            match = _FRAME_NAME.fullmatch(entry)
            if match and match[3].lower() in IMAGE_SUFFIXES:
                series.setdefault(match[1], {}).setdefault(int(match[2]), entry)
        prefix = next((prefix for prefix in _SERIES if prefix in series), None)
        if prefix is None and len(series) != 1:
            found = (
                f"several series of pictures ({', '.join(sorted(series)[:3])})" if series else "no numbered pictures"
            )
            raise DataError(f"the folder holds {found}; frames are named image_00001.jpg, img_00001.jpg or 00001.jpg")
        by_number = series[prefix] if prefix is not None else next(iter(series.values()))
        first = 0 if 0 in by_number else 1
        for number in range(first, first + self.num_frames):
            if number not in by_number:
                raise DataError(f"frame {number} is missing: the list says {self.num_frames} frames from {first}")
        wanted = range(first, first + self.num_frames)
        return PictureFiles([self.path / by_number[number] for number in wanted])


def read_lists(lists: Sequence[Path], base: Path | None, class_names: tuple[str, ...] | None) -> Source:
    """The samples of the lists; without splits where there is one list alone.

    Raises:
        PackError: one line that names the list, the line and the value.
    """
    found: list[tuple[str, int, str, Content | Path]] = []
    line_of: dict[str, str] = {}
    for path in lists:
        split = (list_split(path) or "") if len(lists) > 1 else ""
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            name, num_frames, label = _fields(line, where)
            if name in line_of:
                raise PackError(f"{where}: {name!r} is in {line_of[name]} already; keep one of them")
            line_of[name] = where
            name_of_number(label, class_names, where)
            full = (base or path.parent) / name
            found.append((name, label, split, full if num_frames is None else FrameFolder(full, num_frames)))
    if not found:
        raise PackError(f"{lists[0]} holds no lines; it needs `path num_frames label`")
    names = class_names or tuple(map(str, range(1 + max(label for _, label, _, _ in found))))
    sizes = sizes_of([content for _, _, _, content in found if isinstance(content, Path)])
    samples = [
        SourceSample(
            name=name,
            label=names[label],
            split=split,
            content=VideoFile(content) if isinstance(content, Path) else content,
            weight=next(sizes) if isinstance(content, Path) else getattr(content, "num_frames", 1),
        )
        for name, label, split, content in found
    ]
    samples.sort(key=lambda sample: sample.name)
    return Source(samples=tuple(samples), numbered_classes=names)


def find_lists(folder: Path) -> list[Path]:
    """The lists in a folder: text files named after a split whose first line is that of a list."""
    return [path for path in sorted(folder.glob("*.txt")) if list_split(path) and is_list(path)]


def is_list(path: Path) -> bool:
    """Whether a text file begins with a line of a list."""
    with path.open("rb") as file:
        first = file.readline(4096).decode(errors="replace").split()
    return len(first) >= 2 and first[-1].isdigit() and (first[-2].isdigit() or is_video(first[-2]))


def list_split(path: Path) -> str | None:
    """The split that a list's name begins with: "train" for train_videofolder.txt."""
    return SPLIT_NAMES.get(re.split(r"[^a-z]", path.stem.lower())[0])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from None


def _fields(line: str, where: str) -> tuple[str, int | None, int]:
    """Name, number of frames (None for a video file) and label of a line."""
    name, _, last = line.strip().rpartition(" ")
    rest, _, frames = name.rstrip().rpartition(" ")
    try:
        if is_video(name):
            return name.strip(), None, int(last)
        count, label = int(frames), int(last)
    except ValueError:
        raise PackError(f"{where} is {line.strip()!r:.120}; a line is `path num_frames label`") from None
    if count < 1 or not rest.strip():
        raise PackError(
            f"{where}: the number of frames is {count} of {rest.strip()!r}; a line is `path num_frames label`"
        )
    return rest.strip(), count, label
