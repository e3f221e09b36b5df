"""Existing WebDataset tars: SRC/*.tar or SRC/SPLIT/*.tar, members grouped by key, labels in KEY.cls or KEY.json.

A key is a member's name up to the first dot of its last part; hidden files (._take.mp4) are left out, as webdataset
does. The label is the "class" or "label" of KEY.json where that is a name, else KEY.cls: a name, or a number, which
stays the same number (--class-names names it).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from data_shards.errors import DataError, PackError
from data_shards.parallel import ordered_map
from data_shards.sources.base import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Missing,
    PictureContent,
    Source,
    SourceSample,
    VideoContent,
    is_video,
    name_of_number,
)
from data_shards.sources.splits import SPLIT_NAMES

_MAX_FACTS_BYTES = 1 << 20  # a .cls or .json beyond this is something else


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a tar: where its bytes are."""

    path: Path
    name: str
    offset: int
    size: int

    def bytes(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)  # unlike one pread, it goes on after 2 GiB
        if len(content) < self.size:
            raise DataError(f"the tar has been cut: {len(content)} of {self.size} bytes are in the file")
        return content


@dataclass(frozen=True, slots=True)
class _TarContent:
    """The payload of a sample, and the JSON beside it."""

    member: _Member
    facts: _Member | None
    """Its JSON member."""

    @property
    def where(self) -> str:
        """See `Content.where`."""
        return f"{self.member.path}:{self.member.name}"

    @property
    def path(self) -> Path:
        """See `Content.path`."""
        return self.member.path

    @property
    def num_meta_bytes(self) -> int:
        """See `Content.num_meta_bytes`."""
        return 0 if self.facts is None else self.facts.size

    def more_meta(self) -> dict[str, Any]:
        """The JSON member that the sample has in the source, as it is."""
        if self.facts is None:
            return {}
        text = self.facts.bytes()
        try:
            return {"source": json.loads(text)}
        except ValueError as error:  # one too large to be looked at before
            raise DataError(f"{self.facts.name} is not JSON ({error})") from None


@dataclass(frozen=True, slots=True)
class TarVideo(_TarContent, VideoContent):  # type: ignore[override]  # num_meta_bytes is a property here
    """A video file in a tar."""

    @property
    def suffix(self) -> str:
        """See `Content.suffix`."""
        return Path(self.member.name).suffix

    def read(self) -> bytes:
        """The whole file."""
        return self.member.bytes()


@dataclass(frozen=True, slots=True)
class TarImage(_TarContent, PictureContent):  # type: ignore[override]
    """A picture in a tar."""

    def read(self) -> Sequence[bytes]:
        """The one picture, still encoded."""
        return [self.member.bytes()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """One sample of a tar, before its label has a name."""

    name: str
    content: TarVideo | TarImage | None
    weight: int
    class_name: str | None
    number: int | None


def find_tars(folder: Path) -> list[Path]:
    """SRC/*.tar, or SRC/SPLIT/*.tar."""
    splits = [path for path in sorted(folder.iterdir()) if path.name.lower() in SPLIT_NAMES and path.is_dir()]
    return sorted(folder.glob("*.tar")) or [tar for split in splits for tar in sorted(split.glob("*.tar"))]


def read_tars(tars: Sequence[Path], root: Path, class_names: tuple[str, ...] | None, *, workers: int) -> Source:
    """The samples of tars below `root`, whose headers are read by `workers` processes.

    Raises:
        PackError: a tar is damaged, or its labels are absent or contradict each other.
    """
    samples: list[SourceSample] = []
    missing: list[Missing] = []
    found: list[tuple[str, _Found]] = []
    listed = ordered_map(partial(_list_tar, root), tars, workers=workers)
    for path, in_tar in zip(tars, listed, strict=True):
        parts = path.relative_to(root).parts
        split = SPLIT_NAMES.get(parts[0].lower(), "") if len(parts) > 1 else ""
        found += ((split, sample) for sample in in_tar)
    names = _names_of_numbers([sample for _, sample in found], class_names)
    for split, sample in found:
        label = sample.class_name or ("" if sample.number is None else names[sample.number])
        if sample.content is None or not label:
            reason = "no video or picture under this key" if sample.content is None else "no label: no .cls, no .json"
            missing.append(Missing(name=sample.name, label=label, split=split, reason=reason))
            continue
        samples.append(
            SourceSample(name=sample.name, label=label, split=split, content=sample.content, weight=sample.weight)
        )
    if not samples and missing:
        raise PackError(
            f"none of the {len(missing)} samples in {root} can be packed: {missing[0].name}: {missing[0].reason}"
        )
    _refuse_same_names(samples)
    kinds = {type(sample.content) for sample in samples}
    if len(kinds) > 1:
        raise PackError(f"{root} holds videos and pictures; pack them one after the other, from folders of their own")
    numbered = all(sample.number is not None for _, sample in found)
    return Source(
        samples=tuple(samples),
        missing=tuple(missing),
        numbered_classes=names if numbered else None,
        unit="images" if kinds == {TarImage} else "videos",
    )


def _names_of_numbers(found: Sequence[_Found], class_names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The class name of each number: the list's, else the one that samples give it, else the number."""
    named: dict[int, str] = {}
    top = -1
    for sample in found:
        if sample.number is None:
            continue
        top = max(top, sample.number)
        name_of_number(sample.number, class_names, sample.name)
        if class_names is None and sample.class_name is not None:
            other = named.setdefault(sample.number, sample.class_name)
            if other != sample.class_name:
                raise PackError(
                    f"{sample.name}: label {sample.number} is {sample.class_name!r} here and {other!r} in an earlier "
                    "sample; name the classes (--class-names FILE)"
                )
    names = class_names or tuple(named.get(number, str(number)) for number in range(top + 1))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PackError(f"two numbers stand for the class {twice!r}; name the classes (--class-names FILE)")
    return names


def _refuse_same_names(samples: Sequence[SourceSample]) -> None:
    first: set[str] = set()
    for sample in samples:
        if sample.name in first:
            raise PackError(
                f"the key {sample.name} stands twice in its tar, with other samples between; repair the tar"
            )
        first.add(sample.name)


def _list_tar(root: Path, path: Path) -> list[_Found]:
    """The samples of one tar, in its order."""
    groups = groupby(_members(path), key=lambda found: _key(found[0].name))
    return [_sample(root, key, list(group)) for key, group in groups]


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _members(path: Path) -> Iterator[tuple[_Member, bytes]]:
    """The files of a tar, and what is in those that tell labels.

    Other readers end silently at a damaged header: this one looks at what follows.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isfile() and not member.name.rpartition("/")[2].startswith("."):
                    tells = member.name.lower().endswith((".cls", ".json")) and member.size <= _MAX_FACTS_BYTES
                    content = os.pread(file.fileno(), member.size, member.offset_data) if tells else b""
                    yield _Member(path, member.name, member.offset_data, member.size), content
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
            goes_on = any(block.strip(b"\0") for block in iter(partial(file.read, 1 << 20), b""))
    except tarfile.TarError as error:
        raise PackError(f"{path} is damaged or no tar ({error}); copy it again or take it away") from None
    if end.strip(b"\0"):
        raise PackError(f"{path} is damaged: there is no header at byte {tar.offset}; copy it again or take it away")
    if goes_on:
        raise PackError(
            f"{path} goes on after its end at byte {tar.offset} (a damaged header, or tars joined by hand); "
            "copy it again or take it away"
        )


def _sample(root: Path, key: str, group: Sequence[tuple[_Member, bytes]]) -> _Found:
    """A sample from the members of one key."""
    by_suffix = {Path(member.name).suffix.lower(): (member, content) for member, content in reversed(group)}
    payload = next((by_suffix[suffix][0] for suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES if suffix in by_suffix), None)
    facts, text = by_suffix.get(".json", (None, b""))
    number, class_name = _label(by_suffix.get(".cls", (None, b""))[1], _json(facts, text))
    content: TarVideo | TarImage | None = None
    if payload is not None:
        content = (TarVideo if is_video(payload.name) else TarImage)(payload, facts)
    return _Found(
        name=f"{group[0][0].path.relative_to(root).as_posix()}/{key}",
        content=content,
        weight=0 if payload is None else payload.size,
        class_name=class_name,
        number=number,
    )


def _label(cls: bytes, facts: dict[str, Any]) -> tuple[int | None, str | None]:
    """The label's number and its name, as far as the sample says."""
    name = next((facts[field] for field in ("class", "label") if isinstance(facts.get(field), str)), None)
    number = facts["label"] if type(facts.get("label")) is int else None
    text = cls.decode(errors="replace").strip()
    if text.lstrip("-").isdecimal():
        return int(text), name
    return number, name or text or None


def _json(member: _Member | None, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text or "{}")
    except ValueError as error:
        where = "" if member is None else f"{member.path}:{member.name}"
        raise PackError(f"{where} is not JSON ({error}); repair the tar") from None
    return values if isinstance(values, dict) else {}
