"""Writes samples into a WebDataset tar and notes where each payload lies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data_shards.durable import fsync_folder
from data_shards.probe import VideoInfo

__all__ = ["MAX_PAYLOAD_BYTES", "ShardWriter", "sample_keys", "stored_bytes"]

MAX_PAYLOAD_BYTES = 8**11 - 1  # what the header of a plain tar (USTAR) can state: 8 GiB
_MAX_KEY_BYTES = 100 - len(".frames")  # a member's name in a plain tar has 100 bytes
_HASH_CHARACTERS = 8


def sample_keys(names: Sequence[str]) -> list[str]:
    """Keys for the source-relative paths `names`: unique, ASCII, without dots, short enough for a plain tar.

    A key is the path without its extension, with what is not a letter, digit, "-", "_" or "/" as "_". Where that
    is too long, or two paths come to the same, a hash of the path is added.
    """
    plain = [_plain_key(name) for name in names]
    uses = Counter(key.casefold() for key in plain)  # file systems without case, when a tar is unpacked
    keys = [
        key if uses[key.casefold()] == 1 and len(key) <= _MAX_KEY_BYTES else _with_hash(key, name)
        for key, name in zip(plain, names, strict=True)
    ]
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        same = [name for key, name in zip(keys, names, strict=True) if key == twice]
        raise ValueError(f"two samples come to the same key {twice}: {same[0]!r} and {same[1]!r}; rename one")
    return keys


def _plain_key(name: str) -> str:
    path = PurePosixPath(name)
    stem = str(path.with_suffix("")).lstrip("/")
    return re.sub(r"[^A-Za-z0-9_/-]", "_", stem)


def _with_hash(key: str, name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:_HASH_CHARACTERS]
    kept = key[-(_MAX_KEY_BYTES - _HASH_CHARACTERS - 1) :].lstrip("/")
    return f"{kept}-{digest}"


class ShardWriter:
    """Writes one tar into PATH.partial, which becomes PATH when it is finished; use it in a `with` statement.

    Members are plain USTAR, without times and owners: equal samples give equal bytes. Leaving the block without
    `finish` removes what was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._partial.unlink(missing_ok=True)  # of a killed process: a file of its own, whoever may still hold it open
        self._file = self._partial.open("xb")
        self.rows: list[list[Any]] = []
        """The fields of `data_shards.manifest.samples_dtype` after `shard`, for each sample."""

    def add(self, key: str, suffix: str, payload: bytes, label: int, info: VideoInfo, meta: Mapping[str, Any]) -> None:
        """Append a sample: KEY + suffix with the payload as it is, KEY.cls and KEY.json."""
        assert len(payload) <= MAX_PAYLOAD_BYTES, key
        members = (
            (key + suffix, payload),
            (key + ".cls", str(label).encode()),
            (key + ".json", json.dumps(meta, ensure_ascii=False).encode(errors="backslashreplace")),
        )
        offset = self._file.tell() + tarfile.BLOCKSIZE
        for name, content in members:
            self._file.write(_header(name, len(content)))
            self._file.write(content)
            self._file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        facts = [label, info.num_frames, info.width, info.height, info.fps, key]
        self.rows.append([offset, len(payload), zlib.crc32(payload), *facts])

    def finish(self) -> int:
        """Make the tar durable and visible; returns its size. A tar without samples is not kept: 0."""
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE  # the end is two empty blocks, in whole records
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        num_bytes = self._file.tell()
        self._file.close()
        if self.rows:
            self._partial.replace(self._path)
        else:
            self._path.unlink(missing_ok=True)
            num_bytes = 0
        fsync_folder(self._path.parent)
        return num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk says so a second time, when what is left is written
            self._file.close()
        self._partial.unlink(missing_ok=True)


def stored_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar."""
    return tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    header = member.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == tarfile.BLOCKSIZE, name
    return header
