"""What a source is: samples in a fixed order, each with a label and a content that is read when it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data_shards.errors import PackError
from data_shards.forms.encoding import SampleSource

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts",
)  # fmt: skip
"""File names that count as videos, in any case of letters."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""File names that count as still pictures, in any case of letters."""

Unit = Literal["videos", "images"]
"""What a source holds; an image is a clip of one frame."""


class Content(Protocol):
    """The data of one sample, not read yet; picklable and small."""

    @property
    def path(self) -> Path:
        """The file or folder that holds it."""

    @property
    def where(self) -> str:
        """Path, for messages and for rejected.csv."""

    @property
    def suffix(self) -> str:
        """Ending of a video file's name, with its dot."""

    @property
    def num_meta_bytes(self) -> int:
        """About the size of `more_meta` as JSON."""

    def read(self) -> SampleSource:
        """What `data_shards.forms.encoding.encode_sample` takes.

        Raises DataError where the source is damaged, OSError where it cannot be read.
        """

    def more_meta(self) -> dict[str, Any]:
        """Facts about the sample that the source holds beside it, for its JSON member; {} for most sources.

        Raises as `read` does.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSample:
    """One sample with its label."""

    name: str
    """Its path as the source writes it (relative to SRC or the CSV), with forward slashes."""
    label: str
    """Class name, verbatim."""
    split: str
    """"train", "val", "test", or "" while it has none."""
    content: Content
    """Where its data is."""
    weight: int
    """Bytes, frames or pixels of the source: shards are planned by it, and where it has changed since a shard was
    written, the shard is written again."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A sample that the source names and does not hold."""

    name: str
    """What was looked for."""
    label: str
    """Class name, or "" where it has none."""
    split: str
    """Split, or "" where the source has none for it."""
    reason: str = "missing: no such file"
    """Why it cannot be packed, in one line."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """All samples of a source, in a fixed order."""

    samples: tuple[SourceSample, ...]
    """Samples found."""
    missing: tuple[Missing, ...] = ()
    """Samples that are named and not there."""
    warnings: tuple[str, ...] = ()
    """What a person should look at, one line each."""
    numbered_classes: tuple[str, ...] | None = None
    """Class names in the source's own numbering, where it has one; a label keeps its number then."""
    unit: Unit = "videos"
    """What is packed."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the label: the source's own numbering, else the names sorted."""
        if self.numbered_classes is not None:
            return self.numbered_classes
        return tuple(sorted({sample.label for sample in self.samples}))

    @property
    def are_pictures(self) -> bool:
        """True where the samples are still pictures or pixels, which cannot be packed as mp4."""
        return not isinstance(self.samples[0].content, VideoContent)


class VideoContent:
    """Base of contents that are whole video files."""

    __slots__ = ()
    num_meta_bytes = 0

    def more_meta(self) -> dict[str, Any]:
        """See `Content.more_meta`."""
        return {}


class PictureContent:
    """Base of contents that are still pictures or pixels."""

    __slots__ = ()
    suffix = ""
    num_meta_bytes = 0

    def more_meta(self) -> dict[str, Any]:
        """See `Content.more_meta`."""
        return {}


@dataclass(frozen=True, slots=True)
class VideoFile(VideoContent):
    """A video file."""

    path: Path

    @property
    def where(self) -> str:
        """See `Content.where`."""
        return str(self.path)

    @property
    def suffix(self) -> str:
        """See `Content.suffix`."""
        return self.path.suffix

    def read(self) -> bytes:
        """The whole file."""
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class ImageFile(PictureContent):
    """A picture file."""

    path: Path

    @property
    def where(self) -> str:
        """See `Content.where`."""
        return str(self.path)

    def read(self) -> Sequence[bytes]:
        """The one picture, still encoded."""
        return [self.path.read_bytes()]


def content_of_file(path: Path) -> VideoFile | ImageFile:
    """The content of a file, by its name."""
    return ImageFile(path) if is_image(path.name) else VideoFile(path)


def is_video(name: str) -> bool:
    """Whether a file of this name counts as a video; hidden files do not."""
    return Path(name).suffix.lower() in VIDEO_SUFFIXES and not Path(name).name.startswith(".")


def is_image(name: str) -> bool:
    """Whether a file of this name counts as a still picture; hidden files do not."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not Path(name).name.startswith(".")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Class names, one a line; the line's position, from 0, is the label.

    Raises:
        PackError: the file is absent, empty, no text, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise PackError(f"the list of class names, {path}, does not exist") from None
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    row_of: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name or name in row_of:
            what = f"is {name!r}, as line {row_of[name]} is" if name else "is empty"
            raise PackError(f"{path} line {number} {what}; write each class name once, one a line, label 0 first")
        row_of[name] = number
    if not names:
        raise PackError(f"{path} is empty; write one class name a line, label 0 first")
    return tuple(names)


def name_of_number(number: int, names: tuple[str, ...] | None, where: str) -> str:
    """The class name of a label that is a number: from the list of names, or the number itself."""
    if number < 0:
        raise PackError(f"{where}: the label is {number}; labels count from 0")
    if names is None:
        return str(number)
    if number >= len(names):
        raise PackError(f"{where}: the label is {number}, the list of class names has 0 to {len(names) - 1}")
    return names[number]
