"""The bytes of one sample, whole or in parts, wherever they come from: what a form is opened from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class SamplePayload(Protocol):
    """One sample's bytes; `data_shards.reading.Payload` reads them from a shard."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    @property
    def num_frames(self) -> int | None:
        """Frames as the manifest has them; None where nobody knows before the bytes are read."""

    def whole(self) -> bytes:
        """All bytes, checked; raises DataError where they are damaged."""

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size), not checked; raises DataError where there are fewer."""


class MemoryPayload:
    """A sample that is in memory; counts the bytes that are asked for."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)
        self.num_frames: int | None = None
        self.bytes_read = 0
        """Bytes that `whole` and `parts` have given out."""

    def whole(self) -> bytes:
        """All bytes."""
        self.bytes_read += self.size
        return self._content

    def parts(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size); the ranges must lie within the sample."""
        assert all(offset >= 0 and offset + size <= self.size for offset, size in ranges), (ranges, self.size)
        self.bytes_read += sum(size for _, size in ranges)
        return [self._content[offset : offset + size] for offset, size in ranges]
