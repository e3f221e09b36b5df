"""The bytes of one sample out of its shard: whole and checked against the manifest, or only the parts asked for.

    with ShardReader(manifest) as reader:
        reader.want((number, whole_sample(manifest, number)) for number in coming)      # optional; returns at once
        for number in coming:
            payload = reader.open(number).whole()

A reader that is told what comes reads it in threads meanwhile, where that helps (`StorageConfig.read_ahead`).
"""

import zlib
from collections.abc import Callable, Iterable, Sequence

from data_shards.activity import DECODING, READING
from data_shards.errors import SampleError
from data_shards.manifest import Manifest
from data_shards.storage import Held, ReadAhead, ReadCosts, Reads, Storage, open_storage


class Payload:
    """The encoded bytes of one sample, read when asked for; `costs` says what that took."""

    def __init__(self, reader: "ShardReader", sample_id: int, begins: Callable[[int], None]) -> None:
        self._reader, self._sample_id, self._begins = reader, sample_id, begins
        row = reader.manifest.samples[sample_id]
        self._offset, self._crc32 = int(row["offset"]), int(row["crc32"])
        self.size, self.num_frames = int(row["size"]), int(row["num_frames"])
        self.costs = ReadCosts()
        self._held = reader.take_held(sample_id)

    def whole(self) -> bytes:
        """All bytes, checked against the manifest's crc32.

        Raises SampleError, naming shard and key, where the tar is shorter than the manifest says or holds other bytes;
        OSError, naming them as well, where the file cannot be opened or read.
        """
        payload = self.parts([(0, self.size)])[0]
        checksum = zlib.crc32(payload)
        if checksum != self._crc32:
            raise SampleError(
                f"{self._where()}: the sample's crc32 is {checksum:08x}, the manifest says {self._crc32:08x}: "
                "tar and manifest do not match; copy the shard again or pack the set again"
            )
        return payload

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size) within the sample, not checked: a form with parts has its own checksums.

        Raises SampleError and OSError as `whole` does.
        """
        manifest = self._reader.manifest
        name = manifest.shards[manifest.samples["shard"][self._sample_id]].name
        absolute = [(self._offset + offset, size) for offset, size in ranges]
        self._begins(READING)
        try:
            found = self._held.parts(absolute, self.costs) if self._held is not None else None
            if found is None:
                found = self._reader.storage.read(name, absolute, self.costs)
        except OSError as error:
            raise type(error)(error.errno, f"{error.strerror}, reading {self._where()}") from error
        self._begins(DECODING)
        for part, (offset, size) in zip(found, absolute, strict=True):
            if len(part) < size:
                raise SampleError(
                    f"{self._where()}: the tar ends after {offset + len(part)} bytes, the manifest wants "
                    f"{size} bytes at {offset}; copy the shard again or pack the set again"
                )
        return found

    def _where(self) -> str:
        return describe_sample(self._reader.manifest, self._sample_id)


class ShardReader:
    """Reads payloads of a manifest's shards. One reader belongs to one process, and to one thread of it.

    Close it, or use it in a `with` statement.
    """

    def __init__(self, manifest: Manifest, storage: Storage | None = None) -> None:
        self.manifest = manifest
        config = manifest.storage
        self.storage = storage or open_storage(manifest.location, config, cache=manifest.root)
        self._ahead: ReadAhead | None = None
        if config.read_ahead == "on" or (config.read_ahead == "auto" and manifest.url is not None):
            self._ahead = ReadAhead(
                self.storage, max_bytes=config.read_ahead_megabytes * 10**6, num_threads=config.num_connections
            )

    @property
    def reads_ahead(self) -> bool:
        """Whether `want` does anything; where it does not, nobody needs to work out what comes."""
        return self._ahead is not None

    def want(self, samples: Iterable[tuple[int, Reads]]) -> None:
        """Say which samples will be opened after those wanted already, in that order, each with its reads.

        Returns at once. `data_shards.planned_reads.clip_reads` makes the reads of a clip: (offset, size) ranges within
        the sample. They are gone through in threads, in which they are also worked out; `open` then finds the bytes.
        A sample that is wanted and never opened holds memory until `forget`.
        """
        if self._ahead is None:
            return
        for sample_id, reads in samples:
            self._ahead.want(sample_id, *self._in_shard(sample_id, reads))

    def forget(self) -> None:
        """What was wanted will not be opened: the stream has ended, or begins anew elsewhere."""
        if self._ahead is not None:
            self._ahead.forget()

    def open(self, sample_id: int, begins: Callable[[int], None] = lambda _stage: None) -> Payload:
        """The payload of a sample; nothing is read yet, unless it was wanted.

        `begins` is called as reads begin and end (`READING`, ...); waiting for what is read ahead counts as reading.
        """
        return Payload(self, sample_id, begins)

    def read(self, sample_id: int) -> bytes:
        """All bytes of a sample; raises as `Payload.whole` does."""
        return self.open(sample_id).whole()

    def take_held(self, sample_id: int) -> Held | None:
        """What has been read ahead of a sample, for its payload; None where nothing was."""
        return None if self._ahead is None else self._ahead.take(sample_id)

    def close(self) -> None:
        """Let go of files, connections and threads; the reader can be used again."""
        if self._ahead is not None:
            self._ahead.close()
        self.storage.close()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _in_shard(self, sample_id: int, reads: Reads) -> tuple[str, Reads]:
        """The shard's name, and the reads with offsets within it."""
        row = self.manifest.samples[sample_id]
        return self.manifest.shards[row["shard"]].name, _shifted(reads, int(row["offset"]))


def describe_sample(manifest: Manifest, sample_id: int) -> str:
    """Where a sample is, for messages: "FOLDER/shard-000003.tar:KEY", with a remote split's URL for FOLDER."""
    return f"{manifest.location}/{manifest.describe(sample_id)}"


def _shifted(reads: Reads, start: int) -> Reads:
    found: list[bytes] | None = None
    while True:
        try:
            ranges = next(reads) if found is None else reads.send(found)
        except StopIteration:
            return
        found = yield [(start + offset, size) for offset, size in ranges]
