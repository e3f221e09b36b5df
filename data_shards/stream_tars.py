"""Samples out of tars that are read from beginning to end, by webdataset's own pipeline.

A reader goes through its part of the shards, in a new order each epoch, endlessly.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_shards.errors import DataError
from data_shards.storage import ReadCosts, Storage, StorageConfig, open_storage

_CHUNK_BYTES = 4 << 20
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz

Sample = dict[str, Any]
"""Members of a sample by the ending of their names, with "__key__" and "__url__", as webdataset has them."""


@dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """Which tars a reader reads, and how their samples are mixed."""

    urls: tuple[str, ...]
    """All tars of the set: paths or URLs."""
    seed: int
    """Of the order of the tars and of the shuffle buffers."""
    num_readers: int
    """Readers over all ranks and their workers; each tar of an epoch goes to one of them."""
    shuffle_samples: int
    """Samples in the shuffle buffer of a reader."""

    def of_epoch(self, epoch: int, reader: int) -> list[str]:
        """The tars of reader `reader` in an epoch, in its order: another one every epoch."""
        urls = list(self.urls)
        random.Random(f"{self.seed} {epoch}").shuffle(urls)
        return urls[reader :: self.num_readers]


class StreamReader:
    """The samples of one reader, epoch after epoch.

    Raises DataError, naming the tar, for one that is damaged, unless `skip_damaged`: then the rest of that tar is left,
    and a line put into what `take_account` gives. Raises OSError, naming the tar, where it cannot be read.
    """

    def __init__(self, order: ShardOrder, reader: int, *, storage: StorageConfig, skip_damaged: bool) -> None:
        self._costs = ReadCosts()
        self._problems: list[str] = []
        self._order, self._reader = order, reader
        self._config, self._skip_damaged = storage, skip_damaged
        self._storages: dict[str, Storage] = {}

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        """(epoch, sample), endlessly."""
        from webdataset.filters import shuffle

        epoch = 0
        while True:
            samples: Iterator[Sample] = self._samples(self._order.of_epoch(epoch, self._reader))
            if self._order.shuffle_samples > 1:
                generator = random.Random(f"{self._order.seed} {epoch} {self._reader}")
                samples = shuffle(self._order.shuffle_samples, initial=self._order.shuffle_samples, rng=generator)(
                    samples
                )
            num_samples = 0
            for sample in samples:
                num_samples += 1
                yield epoch, sample
            if not num_samples:
                raise DataError(f"{self._order.of_epoch(epoch, self._reader)[0]}: no sample in it nor in its like")
            epoch += 1

    def take_account(self) -> tuple[ReadCosts, list[str]]:
        """What was read since the last call, and a line for each tar that was found damaged."""
        costs = ReadCosts(seconds=self._costs.seconds.copy(), num_bytes=self._costs.num_bytes.copy())
        for tier in costs.seconds:  # in place: the open tar counts there
            self._costs.seconds[tier], self._costs.num_bytes[tier] = 0.0, 0
        problems, self._problems = self._problems, []
        return costs, problems

    def _samples(self, urls: Sequence[str]) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for url in urls:
            try:
                # A tar to a pipeline, for an error ends the generators that it passes through.
                tar = _Tar(*self._storage_of(url), self._costs)
                stream = io.BufferedReader(tar, _CHUNK_BYTES)
                if stream.peek(8).startswith(_COMPRESSED):
                    raise DataError(f"{url}: the tar is compressed, which cannot be checked to be whole: unpack it")
                yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
                while stream.read(_CHUNK_BYTES):
                    pass
                if tar.tail != _END_OF_TAR:  # `tarfile` takes a tar that is cut between two members for a whole one
                    raise EOFError("it has no end")
            except DataError:
                raise
            except OSError as error:
                raise type(error)(error.errno, f"{error.strerror}, reading {url}") from error
            except (tarfile.TarError, EOFError, ValueError) as error:
                line = f"{url}: the tar is damaged or cut ({' '.join(str(error.args[0]).split())}); copy it again"
                if not self._skip_damaged:
                    raise DataError(line) from error
                self._problems.append(f"{line}; the rest of it is left out")

    def _storage_of(self, url: str) -> tuple[Storage, str]:
        root, _, name = url.rpartition("/")
        storage = self._storages.get(root)
        if storage is None:
            storage = self._storages[root] = open_storage(root or ".", self._config)
        return storage, name


class _Tar(io.RawIOBase):
    """A file of a storage as a stream; `tail` is its end as far as it was read."""

    def __init__(self, storage: Storage, name: str, costs: ReadCosts) -> None:
        self._storage, self._name, self._costs = storage, name, costs
        self._position = 0
        self.tail = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        (content,) = self._storage.read(self._name, [(self._position, len(buffer))], self._costs)
        buffer[: len(content)] = content
        self._position += len(content)
        self.tail = (self.tail + content[-len(_END_OF_TAR) :])[-len(_END_OF_TAR) :]
        return len(content)


def expand_tars(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Paths and URLs of tars with webdataset's brace notation ("set/shard-{000000..000009}.tar") written out."""
    from webdataset.shardlists import expand_urls

    listed = [urls] if isinstance(urls, str) else urls
    return tuple(str(url) for pattern in listed for url in expand_urls(str(pattern)))
