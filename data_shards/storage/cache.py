"""What was read of a remote set, kept on a disk of this node for all processes of the node and for later epochs.

A shard is kept as segments of 16 MiB, each a sparse file that holds the 64 KiB blocks which somebody has read, behind a
table with the size and crc32 of each. So a kill, a power cut or two writers at once can do no harm: a block that does
not match its crc32 is not there. Nothing is locked to read or write blocks; a lock that the kernel releases with its
process guards the account of the cache's size.

When the cache is full, segments of other sets that nobody has used for an hour go, the least recently used first; those
of the set itself stay, and what is new is not kept. Where epochs read each sample once in random order and a share c of
the set fits, this hits c of the reads; replacing the least recently used would hit c + (1 - c) ln(1 - c) of them, 0.15
at c = 0.5. (MinIO in Mohan et al., Analyzing and Mitigating Data Stalls in DNN Training, VLDB 2021, is this policy.)
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 10
"""Unit of what is kept: small, for frames are read one by one."""

_BLOCKS_A_SEGMENT = 256
_ROW = struct.Struct("<II")  # crc32 and size of a block; size 0: not there
_TABLE_BYTES = 4096  # the table of 256 rows, and a page in the file
_SUFFIX = ".blocks"
_ACCOUNT_NAME = "account"
_UNUSED_SECONDS = 3600.0
_TOUCH_SECONDS = 60.0
_FULL_SECONDS = 30.0
_SLACK = 0.05


class BlockCache:
    """The blocks of one set, in `folder`; the folder above it is the cache, which holds `max_bytes` over all its sets.

    Threads and processes can use the same folder at the same time. A disk that fails, or is full, turns the cache off
    for this process, with a warning: it never ends a run.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self._max_bytes = folder, max_bytes
        self._account = folder.parent / _ACCOUNT_NAME
        self._full_until = 0.0
        self._broken = False
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, blocks: Sequence[int]) -> dict[int, bytes]:
        """Those of the blocks (ascending numbers) of file `name` that are here, by number."""
        found: dict[int, bytes] = {}
        if self._broken:
            return found
        for segment, numbers in groupby(blocks, lambda block: block // _BLOCKS_A_SEGMENT):
            try:
                descriptor = os.open(self._path(name, segment), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._give_up(error)
                return found
            try:
                _touch(descriptor)
                table = os.pread(descriptor, _TABLE_BYTES, 0)
                for number in numbers:
                    content = _read_block(descriptor, table, number % _BLOCKS_A_SEGMENT)
                    if content is not None:
                        found[number] = content
            except OSError as error:
                self._give_up(error)
            finally:
                os.close(descriptor)
        return found

    def put(self, name: str, blocks: Mapping[int, bytes]) -> None:
        """Keep blocks of file `name`, by number, where there is room; each BLOCK_BYTES long but for the file's last."""
        if self._broken or time.monotonic() < self._full_until:
            return
        segments = [
            (segment, list(numbers))
            for segment, numbers in groupby(sorted(blocks), lambda block: block // _BLOCKS_A_SEGMENT)
        ]
        try:
            if not self._reserve(sum(map(len, blocks.values())) + _TABLE_BYTES * len(segments)):
                self._full_until = time.monotonic() + _FULL_SECONDS
                return
            for segment, numbers in segments:
                descriptor = os.open(self._path(name, segment), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    for number in numbers:
                        _write_block(descriptor, number % _BLOCKS_A_SEGMENT, blocks[number])
                finally:
                    os.close(descriptor)
        except OSError as error:
            self._give_up(error)

    def _path(self, name: str, segment: int) -> Path:
        return self.folder / f"{name.replace('/', '%2F')}.{segment:05d}{_SUFFIX}"

    def _reserve(self, num_bytes: int) -> bool:
        """Count bytes that are about to be written; False where there is no room for them.

        The account may err upwards (a kill between counting and writing, one block from two writers) and is made right
        when it says that the cache is full; what others are writing at that moment is then not in it, so that the
        cache can exceed its size by that.
        """
        with _locked(self._account) as account:
            noted = os.pread(account, 8, 0)
            used = int.from_bytes(noted, "little") if len(noted) == 8 else self._count()
            if used + num_bytes > self._max_bytes:
                used = self._count()
            if used + num_bytes > self._max_bytes:
                used -= self._evict(used + num_bytes - int(self._max_bytes * (1 - _SLACK)))
            fits = used + num_bytes <= self._max_bytes
            os.pwrite(account, (used + num_bytes if fits else used).to_bytes(8, "little"), 0)
            return fits

    def _count(self) -> int:
        return sum(status.st_blocks * 512 for _, status in self._segments())

    def _evict(self, num_bytes: int) -> int:
        """Remove segments of other sets that are not in use until `num_bytes` are gone; returns how many are."""
        before = time.time() - _UNUSED_SECONDS
        others = [(path, status) for path, status in self._segments() if path.parent != self.folder]
        gone = 0
        for path, status in sorted(others, key=lambda found: found[1].st_mtime):
            if gone >= num_bytes or status.st_mtime > before:
                break
            path.unlink(missing_ok=True)
            gone += status.st_blocks * 512
        return gone

    def _segments(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.parent.glob(f"*/*{_SUFFIX}"):
            try:
                yield path, path.stat()
            except FileNotFoundError:  # another process has evicted it
                continue

    def _give_up(self, error: OSError) -> None:
        if not self._broken:
            logger.warning("the cache %s is off for this process: %s", self.folder.parent, error)
        self._broken = True


def _read_block(descriptor: int, table: bytes, place: int) -> bytes | None:
    row = table[place * _ROW.size : (place + 1) * _ROW.size]
    if len(row) < _ROW.size:
        return None
    crc32, size = _ROW.unpack(row)
    if not 0 < size <= BLOCK_BYTES:
        return None
    content = os.pread(descriptor, size, _TABLE_BYTES + place * BLOCK_BYTES)
    return content if len(content) == size and zlib.crc32(content) == crc32 else None


def _write_block(descriptor: int, place: int, content: bytes) -> None:
    assert 0 < len(content) <= BLOCK_BYTES, len(content)
    os.pwrite(descriptor, content, _TABLE_BYTES + place * BLOCK_BYTES)
    os.pwrite(descriptor, _ROW.pack(zlib.crc32(content), len(content)), place * _ROW.size)


def _touch(descriptor: int) -> None:
    """Note that a segment is in use, now and then."""
    if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_SECONDS:
        os.utime(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open, with nobody else in here; a process that is killed lets go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)
