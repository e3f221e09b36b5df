"""What a storage promises, what its reads cost, and how it is configured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal, Protocol

from data_shards.storage.retries import Backoff

TIERS = ("disk", "cache", "remote")
"""Where bytes come from: a file of the split itself, the node's cache of a remote file, the network."""


@dataclass(kw_only=True)
class ReadCosts:
    """What reads have cost since it was made, by tier."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIERS, 0.0))
    """Wall time of the thread that asked."""
    num_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    """Bytes read, those between wanted ranges included."""

    def add(self, tier: str, seconds: float, num_bytes: int) -> None:
        """Count one read."""
        self.seconds[tier] += seconds
        self.num_bytes[tier] += num_bytes

    def add_read_ahead(self, others: ReadCosts, *, waited_seconds: float) -> None:
        """Count what another thread has read: its bytes, and the time that this one waited for it.

        The wait goes to the tier that the other thread spent most of its time on.
        """
        for tier, num_bytes in others.num_bytes.items():
            self.num_bytes[tier] += num_bytes
        self.seconds[max(TIERS, key=lambda tier: others.seconds[tier])] += waited_seconds

    def total_seconds(self) -> float:
        """Over all tiers."""
        return sum(self.seconds.values())


class Storage(Protocol):
    """The files of one split. One object belongs to one process, and to one thread of it."""

    root: str
    """Folder or URL, for messages."""

    def read(self, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes]:
        """The bytes of each (offset, size) of file `name`; shorter only where the file ends.

        Raises OSError where the machine or the network does not give them, after its own retries.
        """

    def for_thread(self) -> Storage:
        """The same files for another thread: the object itself where threads can share it."""

    def close(self) -> None:
        """Let go of files and connections; the object can be used again."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """How the files of a split are read: over the network, through a cache on the node, ahead of need."""

    cache_folder: Path | None = None
    """Folder on a disk of this node that keeps what was read of a remote set, shared by all processes of the node."""
    cache_gigabytes: float = 100.0
    """Size of the cache at most (10^9 bytes), over all sets in its folder."""
    read_ahead: Literal["auto", "on", "off"] = "auto"
    """Read in threads what the order wants next; `auto` does for remote sets, `on` suits slow file systems as well."""
    read_ahead_megabytes: int = 64
    """Bytes (10^6) that a worker holds at most before they are used, beside the samples that are being read."""
    num_connections: int = 8
    """Requests that a worker has under way at a time, and its threads that read ahead."""
    timeout_seconds: float = 30.0
    """A request to a remote set that takes longer has failed."""
    num_attempts: int = 6
    """Attempts at a request, with growing pauses between them, before its error ends the run. All of them must fit into
    the loader's `worker_timeout_seconds`."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, it must be {what}"
            for name, what, good in (
                ("cache_gigabytes", "a number above 0", 0 < self.cache_gigabytes < inf),
                ("read_ahead", '"auto", "on" or "off"', self.read_ahead in ("auto", "on", "off")),
                ("read_ahead_megabytes", "at least 1", self.read_ahead_megabytes >= 1),
                ("num_connections", "at least 1", self.num_connections >= 1),
                ("timeout_seconds", "a number above 0", 0 < self.timeout_seconds < inf),
                ("num_attempts", "at least 1", self.num_attempts >= 1),
            )
            if not good
        ]
        if problems:
            raise ValueError("storage: " + "; ".join(problems))

    def longest_seconds(self) -> float:
        """How long a request may take with all its attempts and pauses, before it ends in an error."""
        return self.num_attempts * self.timeout_seconds + Backoff().longest_seconds(self.num_attempts)
