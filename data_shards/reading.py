"""The bytes of one sample out of its shard: one `pread` of exactly the payload, checked against the manifest."""

import os
import zlib
from collections import OrderedDict
from pathlib import Path

from data_shards.errors import DataError
from data_shards.manifest import Manifest

_MAX_OPEN_SHARDS = 64


class ShardReader:
    """Reads payloads of a manifest's shards, keeping the files of the shards used last open.

    One reader belongs to one process. Close it, or use it in a `with` statement.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample_id: int) -> bytes:
        """The encoded video of a sample.

        Raises DataError, naming shard and key, where the tar is shorter than the manifest says or holds other bytes;
        OSError, naming them as well, where the file cannot be opened or read.
        """
        row = self.manifest.samples[sample_id]
        size, offset = int(row["size"]), int(row["offset"])
        try:
            payload = _read_exactly(self._file_of(sample_id, int(row["shard"])), size, offset)
        except OSError as error:
            where = describe_sample(self.manifest, sample_id)
            raise type(error)(error.errno, f"{error.strerror}, reading {where}") from error
        if len(payload) < size:
            raise DataError(
                f"{describe_sample(self.manifest, sample_id)}: the tar ends after {offset + len(payload)} bytes, the "
                f"manifest wants {size} bytes at {offset}; copy the shard again or pack the set again"
            )
        checksum = zlib.crc32(payload)
        if checksum != row["crc32"]:
            raise DataError(
                f"{describe_sample(self.manifest, sample_id)}: the video's crc32 is {checksum:08x}, the manifest says "
                f"{int(row['crc32']):08x}: tar and manifest do not match; copy the shard again or pack the set again"
            )
        return payload

    def close(self) -> None:
        """Close all files; the reader can be used again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _file_of(self, sample_id: int, shard: int) -> int:
        descriptor = self._files.pop(shard, None)
        if descriptor is None:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(self.manifest.shard_path(sample_id), os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        return descriptor


def describe_sample(manifest: Manifest, sample_id: int) -> str:
    """Where a sample is, for messages: "FOLDER/shard-000003.tar:KEY"."""
    return str(Path(manifest.root) / manifest.describe(sample_id))


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file (a single `pread` may return less)."""
    payload = os.pread(descriptor, size, offset)
    while len(payload) < size:
        more = os.pread(descriptor, size - len(payload), offset + len(payload))
        if not more:
            break
        payload += more
    return payload
