"""What a storage promises, and what its reads cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

TIERS = ("disk", "cache", "remote")
"""Where bytes come from: a file of the split itself, the node's cache of a remote file, the network."""


@dataclass(kw_only=True)
class ReadCosts:
    """What reads have cost since it was made, by tier."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIERS, 0.0))
    """Wall time of the reading thread."""
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    """Bytes read, those between wanted ranges included."""

    def add(self, tier: str, seconds: float, num_bytes: int) -> None:
        """Count one read."""
        self.seconds[tier] += seconds
        self.num_bytes[tier] += num_bytes

    def total_seconds(self) -> float:
        """Over all tiers."""
        return sum(self.seconds.values())


class Storage(Protocol):
    """The files of one split. One object belongs to one process."""

    root: str
    """Folder or URL, for messages."""

    def read(self, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes]:
        """The bytes of each (offset, size) of file `name`; shorter only where the file ends.

        Raises OSError where the machine or the network does not give them, after its own retries.
        """

    def close(self) -> None:
        """Let go of files and connections; the object can be used again."""
