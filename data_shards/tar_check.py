"""The structure of one shard against the manifest: every header, every member's name and place, the end.

Readers of tars forgive much: a damaged header in the middle is the end of the archive to most. Here it is a problem
with its place, and the walk goes on at the next sample that the manifest knows.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.manifest import Manifest

_BLOCK = tarfile.BLOCKSIZE
_MAX_SIDE_BYTES = 1 << 20  # of a label or a description; what is larger is not read


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """What the manifest says of a sample."""

    key: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """What a header says of a member."""

    name: str
    offset: int
    size: int


def check_tar(manifest: Manifest, shard_index: int) -> Iterator[str]:
    """What is wrong with a shard's tar, one line each, without reading the payloads.

    Checked: the file is there and of the size that the manifest says; each header's checksum, kind and size; that each
    sample's payload, label (.cls) and description (.json) are where and what the manifest says; that nothing else is
    there; the end. A file that cannot be read is a line too.
    """
    path = Path(manifest.root) / manifest.shards[shard_index].name
    try:
        with path.open("rb") as file:
            for problem in _Walk(manifest, shard_index, file.fileno()).problems():
                yield f"{path}{problem}"
    except OSError as error:
        yield f"{path}: cannot be read: {error.strerror}"


class _Walk:
    """One pass over the headers of an open tar. Problems begin with ":KEY: " or ": "."""

    def __init__(self, manifest: Manifest, shard_index: int, descriptor: int) -> None:
        self._descriptor = descriptor
        self._num_bytes = os.fstat(descriptor).st_size
        self._shard = manifest.shards[shard_index]
        self._classes = manifest.classes
        ids = range(self._shard.first_sample, self._shard.first_sample + self._shard.num_samples)
        rows = [(sample_id, manifest.samples[sample_id]) for sample_id in ids]
        self._samples = {
            int(row["offset"]): _Sample(
                key=manifest.key(sample_id), offset=int(row["offset"]), size=int(row["size"]), label=int(row["label"])
            )
            for sample_id, row in rows
        }
        self._by_key = {sample.key: sample for sample in self._samples.values()}
        self._offsets = sorted(self._samples)

    def problems(self) -> Iterator[str]:
        """See `check_tar`."""
        if self._num_bytes != self._shard.num_bytes:
            yield (
                f": has {self._num_bytes} bytes, the manifest says {self._shard.num_bytes}: cut or replaced; "
                "copy it again"
            )
        if len(self._by_key) < self._shard.num_samples:
            yield ": the manifest has a key or an offset twice; pack the set again"
        met: set[int] = set()
        for found in self._members(met):
            if isinstance(found, str):
                yield found
            else:
                yield from self._check_member(found, met)
        for offset in self._offsets:
            if offset not in met:
                yield f":{self._samples[offset].key}: no member begins at byte {offset}, where the manifest has it"

    def _members(self, met: set[int]) -> Iterator[_Member | str]:
        """The members in order; a string where the tar is damaged. Samples whose own header is are put into `met`."""
        position, last = 0, "the start"
        while True:
            header = os.pread(self._descriptor, _BLOCK, position)
            trouble, size = "", 0
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                size = member.size
                last = repr(member.name)
                if not member.isreg():
                    trouble = f"is of kind {member.type!r}, not a plain file"
                elif size < 0 or position + _BLOCK + size > self._num_bytes:
                    trouble = f"says {size} bytes, more than the tar has left"
                else:
                    yield _Member(name=member.name, offset=position + _BLOCK, size=size)
            except tarfile.HeaderError as error:
                if not header.strip(b"\0"):
                    if position >= self._offsets[-1]:
                        yield from self._check_end(position, whole=len(header) == _BLOCK)
                        return
                    trouble = "is empty, which ends the tar for most readers"
                else:
                    trouble = f"is damaged ({error})"
            if not trouble:
                position += _BLOCK + -(-size // _BLOCK) * _BLOCK
                continue
            sample = self._samples.get(position + _BLOCK)
            if sample is not None:
                met.add(sample.offset)
            where = f":{sample.key}: its header" if sample is not None else f": after {last}, the header"
            yield f"{where} at byte {position} {trouble}"
            following = self._next_header(position)
            if following is None:
                return
            position = following

    def _next_header(self, position: int) -> int | None:
        """Where the first sample behind `position` begins, by the manifest."""
        return next((offset - _BLOCK for offset in self._offsets if offset - _BLOCK > position), None)

    def _check_end(self, position: int, *, whole: bool) -> Iterator[str]:
        """The tar ends with two empty blocks and nothing behind them."""
        if not whole or self._num_bytes < position + 2 * _BLOCK:
            yield f": ends at byte {self._num_bytes} without the two empty blocks of a whole tar: it was cut"
        while rest := os.pread(self._descriptor, 1 << 16, position):
            if rest.strip(b"\0"):
                yield f": there are bytes behind its end at byte {position}"
                return
            position += len(rest)

    def _check_member(self, member: _Member, met: set[int]) -> Iterator[str]:
        sample = self._samples.get(member.offset)
        if sample is not None:
            met.add(member.offset)
            if not member.name.startswith(sample.key + "."):
                yield f":{sample.key}: the member at byte {member.offset} is {member.name!r}"
            elif member.size != sample.size:
                yield f":{sample.key}: {member.name!r} has {member.size} bytes, the manifest says {sample.size}"
            return
        key, _, suffix = member.name.partition(".")
        owner = self._by_key.get(key)
        if owner is None:
            yield f": the member {member.name!r} at byte {member.offset} belongs to no sample of the manifest"
        elif suffix in ("cls", "json") and member.size <= _MAX_SIDE_BYTES:
            content = os.pread(self._descriptor, member.size, member.offset)
            said = _label_in(suffix, content)
            if said is not None and said not in (owner.label, self._classes[owner.label]):
                yield f":{key}: {member.name!r} says {said!r}, the manifest says label {owner.label}"


def _label_in(suffix: str, content: bytes) -> object:
    """The label that a .cls or .json member states; None where a description has none, "..." where it is damaged."""
    try:
        if suffix == "cls":
            return int(content)
        return json.loads(content).get("label")
    except (ValueError, AttributeError):
        return content.decode(errors="replace")[:40]
