"""Where the time of a loader's workers went: rows that add up to each worker's wall time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

ACCOUNT_ROWS = ("startup", "read", "decode", "augment", "idle", "lost")
"""`lost`: since the last batch that the worker handed over (waiting, or work that nobody uses); at most that of one
batch, unless the worker was killed or its stream left."""


@dataclass(kw_only=True)
class WorkerAccount:
    """One worker process, from its start to its end or to now."""

    worker: int
    """Its number in the loader; a process that replaces another has the same."""
    pid: int
    """Its process id."""
    started: float
    """When it was started (`perf_counter`, one clock for all processes of a machine)."""
    ready: float | None = None
    """When it was ready to work."""
    ended: float | None = None
    """When it ended; None while it runs."""
    end: str = ""
    """How it ended; "" while it runs, or where it was told to."""
    num_batches: int = 0
    """Batches handed over."""
    counted_seconds: dict[str, float]
    """Seconds of `read`, `decode`, `augment` and `idle`, up to the last batch handed over."""
    tier_seconds: dict[str, float]
    """Seconds of `read` by storage tier."""
    tier_bytes: dict[str, float]
    """Bytes read by storage tier."""
    frames_decoded: int = 0
    """Frames that the decoder put out."""
    frames_used: int = 0
    """Frames that became part of a clip."""
    peak_bytes: int = 0
    """Most memory that it held for itself after a batch."""

    @property
    def wall_seconds(self) -> float:
        """From its start to its end, or to now."""
        return (perf_counter() if self.ended is None else self.ended) - self.started

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each of `ACCOUNT_ROWS`: they add up to `wall_seconds` of the same moment."""
        wall = self.wall_seconds
        startup = wall if self.ready is None else self.ready - self.started
        counted = {"startup": startup, **self.counted_seconds}
        return {**counted, "lost": wall - sum(counted.values())}

    def add(self, costs: Mapping[str, float]) -> None:
        """Count a batch that was handed over."""
        self.num_batches += 1
        for row in self.counted_seconds:
            self.counted_seconds[row] += costs[f"{row}_seconds"]
        for tier in self.tier_seconds:
            self.tier_seconds[tier] += costs[f"read_{tier}_seconds"]
            self.tier_bytes[tier] += costs[f"read_{tier}_bytes"]
        self.frames_decoded += int(costs["frames_decoded"])
        self.frames_used += int(costs["frames_used"])
        self.peak_bytes = max(self.peak_bytes, int(costs["worker_bytes"]))


def new_account(worker: int, pid: int, tiers: tuple[str, ...]) -> WorkerAccount:
    """The account of a worker that has just been started."""
    return WorkerAccount(
        worker=worker,
        pid=pid,
        started=perf_counter(),
        counted_seconds=dict.fromkeys(("read", "decode", "augment", "idle"), 0.0),
        tier_seconds=dict.fromkeys(tiers, 0.0),
        tier_bytes=dict.fromkeys(tiers, 0.0),
    )
