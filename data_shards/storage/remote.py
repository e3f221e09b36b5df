"""Ranges of files behind a URL, through fsspec: near ones merged, several at a time, retried, kept in a cache."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import perf_counter
from typing import TypeVar

from data_shards.storage.base import ReadCosts, StorageConfig
from data_shards.storage.cache import BLOCK_BYTES, BlockCache
from data_shards.storage.ranges import Span, cut_ranges, merge_ranges, split_spans
from data_shards.storage.remote_files import RemoteFiles, open_remote_files
from data_shards.storage.retries import Backoff, retried

Result = TypeVar("Result")

_GAP_BYTES = 256 << 10
"""Ranges nearer than this are one request, which costs 1.2 (HTTP) to 2.7 (S3) ms of CPU; these bytes cost about 0.3."""
_PART_BYTES = 8 << 20
"""A request asks for this much at most, so that its timeout means something; longer ranges are several."""


class RemoteStorage:
    """Reads ranges of the files below a URL. Threads of a process can share it."""

    def __init__(
        self, root: str, config: StorageConfig, *, cache: BlockCache | None = None, backoff: Backoff | None = None
    ) -> None:
        self.root = root.rstrip("/")
        self._config, self._cache = config, cache
        self._backoff = backoff or Backoff()
        self._opened: RemoteFiles | None = None
        self._slots = asyncio.Semaphore(config.num_connections)

    def read(self, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes]:
        """See `Storage.read`. Costs go to "remote", those of blocks that the node's cache has to "cache"."""
        if self._cache is not None:
            return self._read_cached(self._cache, name, ranges, costs)
        spans = split_spans(merge_ranges(ranges, gap=_GAP_BYTES), at_most=_PART_BYTES)
        return cut_ranges(ranges, self._fetch(name, spans, costs))

    def read_file(self, name: str) -> bytes:
        """All of a file that fits into memory."""
        content = b""
        while True:
            (more,) = self.read(name, [(len(content), _PART_BYTES)], ReadCosts())
            content += more
            if len(more) < _PART_BYTES:
                return content

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Size in bytes of each file, None where the server does not say; raises FileNotFoundError for the first."""
        files = self._files()
        return files.run(self._sizes(files, names))

    def for_thread(self) -> RemoteStorage:
        """Itself."""
        return self

    def close(self) -> None:
        """Nothing to do: fsspec keeps the connections of a process, for all that read from the same place."""

    def _read_cached(
        self, cache: BlockCache, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts
    ) -> list[bytes]:
        started = perf_counter()
        blocks = sorted({block for offset, size in ranges if size for block in _blocks_of(offset, offset + size)})
        found = cache.get(name, blocks)
        costs.add("cache", perf_counter() - started, sum(map(len, found.values())))
        missing = [(block * BLOCK_BYTES, BLOCK_BYTES) for block in blocks if block not in found]
        if missing:
            spans = split_spans(merge_ranges(missing, gap=_GAP_BYTES), at_most=_PART_BYTES)
            fetched = {block: part for piece in self._fetch(name, spans, costs) for block, part in _as_blocks(*piece)}
            started = perf_counter()
            cache.put(name, fetched)
            costs.add("cache", perf_counter() - started, 0)
            found |= fetched  # some may have been there already, between two that were missing
        return cut_ranges(ranges, [(block * BLOCK_BYTES, content) for block, content in found.items()])

    def _fetch(self, name: str, spans: Sequence[Span], costs: ReadCosts) -> list[tuple[int, bytes]]:
        """(offset, bytes) of each span."""
        started = perf_counter()
        files = self._files()
        contents = files.run(self._fetch_all(files, name, spans))
        costs.add("remote", perf_counter() - started, sum(map(len, contents)))
        return [(span.start, content) for span, content in zip(spans, contents, strict=True)]

    async def _fetch_all(self, files: RemoteFiles, name: str, spans: Sequence[Span]) -> list[bytes]:
        async def fetch(span: Span) -> bytes:
            return await self._retried(name, lambda: files.fetch(name, span.start, span.stop))

        return await _all_or_first_error([fetch(span) for span in spans])

    async def _sizes(self, files: RemoteFiles, names: Sequence[str]) -> list[int | None]:
        async def size(name: str) -> int | None:
            return await self._retried(name, lambda: files.size(name))

        return await _all_or_first_error([size(name) for name in names])

    async def _retried(self, name: str, request: Callable[[], Awaitable[Result]]) -> Result:
        try:
            return await retried(
                request,
                num_attempts=self._config.num_attempts,
                timeout_seconds=self._config.timeout_seconds,
                backoff=self._backoff,
                slots=self._slots,
            )
        except OSError as error:
            error.filename = name
            raise

    def _files(self) -> RemoteFiles:
        if self._opened is None:
            self._opened = open_remote_files(self.root, num_connections=self._config.num_connections)
        return self._opened


async def _all_or_first_error(requests: Sequence[Awaitable[Result]]) -> list[Result]:
    """All results; the first error only when every request has ended, so that none goes on behind the caller's back."""
    done = await asyncio.gather(*requests, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done  # type: ignore[return-value]


def _blocks_of(start: int, stop: int) -> range:
    """Numbers of the blocks that bytes `start` to `stop - 1` touch."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))


def _as_blocks(start: int, content: bytes) -> Iterator[tuple[int, bytes]]:
    """A piece that begins at a block, as (number, bytes) of its blocks; the file's last one may be short."""
    for offset in range(0, len(content), BLOCK_BYTES):
        yield (start + offset) // BLOCK_BYTES, content[offset : offset + BLOCK_BYTES]
