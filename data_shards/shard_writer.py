"""Writes samples into WebDataset tars and notes where each payload lies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from data_shards.manifest import Shard, samples_dtype
from data_shards.probe import VideoInfo

__all__ = ["MAX_PAYLOAD_BYTES", "ShardWriter", "sample_keys"]

MAX_PAYLOAD_BYTES = 8**11 - 1  # what the header of a plain tar (USTAR) can state: 8 GiB
_MAX_KEY_BYTES = 100 - len(".mpeg")  # a member's name in a plain tar has 100 bytes
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
        raise ValueError(f"two videos come to the same key {twice}: {same[0]!r} and {same[1]!r}; rename one")
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
    """Writes `shard-000000.tar`, ... into a folder, a new one when the next sample would exceed a limit.

    Members are plain USTAR, without times and owners: equal samples give equal bytes.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int, max_shard_samples: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._max_shard_samples = max_shard_samples
        self._file: BinaryIO | None = None
        self._shard_samples = 0
        self._shards: list[Shard] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(self, key: str, suffix: str, payload: bytes, *, label: int, info: VideoInfo, meta: dict[str, Any]) -> None:
        """Append a sample: KEY + suffix with the payload as it is, KEY.cls and KEY.json."""
        assert len(payload) <= MAX_PAYLOAD_BYTES, key
        members = (
            (key + suffix, payload),
            (key + ".cls", str(label).encode()),
            (key + ".json", json.dumps(meta | asdict(info), ensure_ascii=False).encode()),
        )
        num_bytes = sum(tarfile.BLOCKSIZE + _padded(len(content)) for _, content in members)
        file = self._file_for(num_bytes)
        offset = file.tell() + tarfile.BLOCKSIZE
        for name, content in members:
            file.write(_header(name, len(content)))
            file.write(content)
            file.write(bytes(_padded(len(content)) - len(content)))
        self._shard_samples += 1
        self._rows.append(
            (
                len(self._shards),
                offset,
                len(payload),
                zlib.crc32(payload),
                label,
                info.num_frames,
                info.width,
                info.height,
                info.fps,
                key.encode(),
            )
        )

    def close(self) -> tuple[list[Shard], np.ndarray[Any, np.dtype[np.void]]]:
        """Finish the last tar; returns the shards and the rows for `data_shards.manifest.write_manifest`."""
        self._finish_shard()
        key_bytes = max((len(row[-1]) for row in self._rows), default=1)
        return self._shards, np.array(self._rows, samples_dtype(key_bytes))

    def discard(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _file_for(self, num_bytes: int) -> BinaryIO:
        if self._file is not None and (
            self._shard_samples >= self._max_shard_samples or self._file.tell() + num_bytes > self._max_shard_bytes
        ):
            self._finish_shard()
        if self._file is None:
            self._file = (self._folder / f"shard-{len(self._shards):06d}.tar").open("xb")
        return self._file

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE  # the end is two empty blocks, in whole records
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        num_bytes = self._file.tell()
        self._file.close()
        self._shards.append(
            Shard(
                name=Path(self._file.name).name,
                num_samples=self._shard_samples,
                num_bytes=num_bytes,
                first_sample=len(self._rows) - self._shard_samples,
            )
        )
        self._file = None
        self._shard_samples = 0


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    header = member.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == tarfile.BLOCKSIZE, name
    return header


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
