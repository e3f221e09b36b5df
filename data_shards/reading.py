"""The bytes of one sample out of its shard: whole and checked against the manifest, or only the parts asked for."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from data_shards.activity import DECODING, READING
from data_shards.errors import SampleError
from data_shards.manifest import Manifest
from data_shards.storage import ReadCosts, Storage, open_storage


class Payload:
    """The encoded bytes of one sample, read when asked for; `costs` says what that took."""

    def __init__(self, reader: "ShardReader", sample_id: int, begins: Callable[[int], None]) -> None:
        self._reader, self._sample_id, self._begins = reader, sample_id, begins
        row = reader.manifest.samples[sample_id]
        self._offset, self._crc32 = int(row["offset"]), int(row["crc32"])
        self.size = int(row["size"])
        self.costs = ReadCosts()

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
    """Reads payloads of a manifest's shards. One reader belongs to one process.

    Close it, or use it in a `with` statement.
    """

    def __init__(self, manifest: Manifest, storage: Storage | None = None) -> None:
        self.manifest = manifest
        self.storage = storage or open_storage(manifest.root)

    def open(self, sample_id: int, begins: Callable[[int], None] = lambda _stage: None) -> Payload:
        """The payload of a sample; nothing is read yet. `begins` is called as reads begin and end (`READING`, ...)."""
        return Payload(self, sample_id, begins)

    def read(self, sample_id: int) -> bytes:
        """All bytes of a sample; raises as `Payload.whole` does."""
        return self.open(sample_id).whole()

    def close(self) -> None:
        """Let go of files and connections; the reader can be used again."""
        self.storage.close()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe_sample(manifest: Manifest, sample_id: int) -> str:
    """Where a sample is, for messages: "FOLDER/shard-000003.tar:KEY"."""
    return str(Path(manifest.root) / manifest.describe(sample_id))
