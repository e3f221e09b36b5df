"""Files of a mounted file system, read with `pread`."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from time import perf_counter

from data_shards.storage.base import ReadCosts

_MAX_OPEN_FILES = 64
_MAX_OPEN_FILES_OF_A_THREAD = 16  # a worker has many threads, and a mixture many sets; 1024 files are a usual limit


class LocalStorage:
    """Reads ranges of the files in a folder, keeping those used last open."""

    def __init__(self, root: str | os.PathLike[str], *, max_open_files: int = _MAX_OPEN_FILES) -> None:
        self.root, self._max_open_files = os.fspath(root), max_open_files
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes]:
        """See `Storage.read`: one `pread` a range."""
        started = perf_counter()
        descriptor = self._file_of(name)
        found = [_read_exactly(descriptor, size, offset) for offset, size in ranges]
        costs.add("disk", perf_counter() - started, sum(map(len, found)))
        return found

    def for_thread(self) -> LocalStorage:
        """Another: the files that are open belong to one thread."""
        return LocalStorage(self.root, max_open_files=_MAX_OPEN_FILES_OF_A_THREAD)

    def close(self) -> None:
        """Close all files; the object can be used again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _file_of(self, name: str) -> int:
        descriptor = self._files.pop(name, None)
        if descriptor is None:
            if len(self._files) >= self._max_open_files:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH118 (also URLs)
        self._files[name] = descriptor
        return descriptor


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file (a single `pread` may return less)."""
    payload = os.pread(descriptor, size, offset)
    while len(payload) < size:
        more = os.pread(descriptor, size - len(payload), offset + len(payload))
        if not more:
            break
        payload += more
    return payload
