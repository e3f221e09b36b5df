"""What a run's ledger says: frozen results of `dist_train.ledger.summary.read_ledger`.

A run has attempts (the first start, and one for each resume), an attempt has ranks, and a rank has its totals
and the series over its training steps. Times are seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.ledger.communication import Communication
from dist_train.ledger.rows import RANK_ROWS, REMAINDER, WAIT_FOR_PEER

BYTE_ROWS = ("read", "decode", "host_to_device", "wire")
_STEADY_FROM_POINTS = 10


@dataclass(frozen=True, kw_only=True)
class StepSeries:
    """One rank's training steps in order: S points of one step each, or of several where thinned."""

    step: np.ndarray
    """Number of the last step in the point, counted from 1; int64 [S]."""
    clips_seen: np.ndarray
    """Clips that all ranks had seen after it; int64 [S]."""
    num_steps: np.ndarray
    """Steps in the point; int64 [S]. The arrays below are sums over them."""
    end_seconds: np.ndarray
    """When the point ended, in seconds since the process started; float64 [S]."""
    wall_seconds: np.ndarray
    """Wall time; float64 [S]."""
    seconds: np.ndarray
    """Seconds per row in the order of `RANK_ROWS`; float32 [S, 15]."""
    num_bytes: np.ndarray
    """Bytes per row in the order of `BYTE_ROWS`; float64 [S, 4]."""

    def __len__(self) -> int:
        return len(self.step)

    @property
    def clips_per_step(self) -> float:
        """Clips of a global batch (all ranks and micro-batches), read off `clips_seen`; 0 without steps."""
        if len(self) == 0:
            return 0.0
        if len(self) > 1 and self.step[-1] > self.step[0]:
            return float((self.clips_seen[-1] - self.clips_seen[0]) / (self.step[-1] - self.step[0]))
        return float(self.clips_seen[-1] / max(self.step[-1], 1))


@dataclass(frozen=True, kw_only=True)
class WorkerTotals:
    """What a rank's loader workers spent on the batches that the rank consumed, summed over the workers."""

    wall_seconds: float
    """Their time, all workers together."""
    seconds: Mapping[str, float]
    """Seconds per row of `WORKER_ROWS`."""
    frames_decoded: int
    """Frames that went through the decoder."""
    frames_used: int
    """Frames that became part of a clip."""
    skipped: int
    """Samples skipped as unreadable."""
    tier_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of reading by the tier of storage that the bytes came from, as the loader names it."""
    tier_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes read by tier."""


@dataclass(frozen=True, kw_only=True)
class RankSummary:
    """One rank in one attempt."""

    rank: int
    """Its rank."""
    attempt: int
    """0 for the first start of the run, one more for each resume."""
    identity: Mapping[str, Any]
    """The `start` line: world_size, host, device, launcher, started_unix, ..."""
    exit: str
    """"ok", "error" or "preempted"; "killed" where the process left no end line (or is still running)."""
    wall_seconds: float
    """Process start to exit, or to the last line written where the process was killed."""
    seconds: Mapping[str, float]
    """Seconds per row of `RANK_ROWS`, all spans."""
    step_row_seconds: Mapping[str, float]
    """Seconds per row of `RANK_ROWS`, training steps only."""
    span_seconds: Mapping[str, float]
    """Wall seconds per span name (startup, step, evaluation, checkpoint, shutdown)."""
    num_bytes: Mapping[str, int]
    """Bytes per row of `BYTE_ROWS`, all spans."""
    workers: WorkerTotals | None
    """Loader workers; None where there were none."""
    num_steps: int
    """Training steps."""
    worst_span_gap: tuple[float, int]
    """The largest difference in seconds between a span's wall time and its rows, and that span's line."""
    steps: StepSeries
    """The steps one by one."""
    communication: Communication = field(default_factory=Communication)
    """Its collectives, and what the operating system counted."""

    @property
    def world_size(self) -> int:
        """Ranks in this attempt."""
        return int(self.identity.get("world_size", 1))

    @property
    def remainder_share(self) -> float:
        """Share of the wall time that no row claims."""
        return self.seconds[REMAINDER] / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def steady_row_seconds(self) -> dict[str, float]:
        """`step_row_seconds` without the series' first point, where caches are cold and workers start.

        With fewer than 10 points nothing is left out.
        """
        if len(self.steps) < _STEADY_FROM_POINTS:
            return dict(self.step_row_seconds)
        cold = self.steps.seconds[0].tolist()
        return {row: max(self.step_row_seconds[row] - first, 0.0) for row, first in zip(RANK_ROWS, cold, strict=True)}

    @property
    def busy_seconds(self) -> float:
        """Seconds in steady steps that were not spent waiting for another rank."""
        steady = self.steady_row_seconds
        return sum(steady.values()) - steady[WAIT_FOR_PEER]


@dataclass(frozen=True, kw_only=True)
class AttemptSummary:
    """One start of the run: its ranks in order."""

    attempt: int
    """0 for the first start of the run."""
    ranks: tuple[RankSummary, ...]
    """The ranks whose file was found, sorted; at least one."""

    @property
    def world_size(self) -> int:
        """Ranks that the attempt was started with."""
        return max(rank.world_size for rank in self.ranks)

    @property
    def missing_ranks(self) -> tuple[int, ...]:
        """Ranks that left no file."""
        found = {rank.rank for rank in self.ranks}
        return tuple(rank for rank in range(self.world_size) if rank not in found)

    @property
    def wall_seconds(self) -> float:
        """Wall time of the rank that ran longest."""
        return max(rank.wall_seconds for rank in self.ranks)

    @property
    def num_steps(self) -> int:
        """Training steps of the rank that got furthest."""
        return max(rank.num_steps for rank in self.ranks)

    @property
    def slowest_rank(self) -> RankSummary:
        """The rank that the others wait for: most seconds in steps that are not waiting for a peer."""
        return max(self.ranks, key=lambda rank: rank.busy_seconds)

    @property
    def clips_per_second(self) -> float:
        """Clips of all ranks per second of steady training steps (see `RankSummary.steady_row_seconds`).

        The time is that of the rank that took longest; 0 without steps.
        """
        rates = []
        for rank in self.ranks:
            cold = 1 if len(rank.steps) >= _STEADY_FROM_POINTS else 0
            wall = float(rank.steps.wall_seconds[cold:].sum())
            if wall > 0:
                rates.append(rank.steps.clips_per_step * float(rank.steps.num_steps[cold:].sum()) / wall)
        return min(rates, default=0.0)


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """A run's ledger."""

    run_dir: Path
    """The run folder."""
    attempts: tuple[AttemptSummary, ...]
    """In order; at least one."""

    @property
    def last(self) -> AttemptSummary:
        """The latest attempt that made a step; the latest of all where none did."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.num_steps), self.attempts[-1])

    @property
    def wall_seconds(self) -> float:
        """Wall time of all attempts, without the pauses between them."""
        return sum(attempt.wall_seconds for attempt in self.attempts)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per row over all ranks and attempts (rank-seconds)."""
        return _total(RANK_ROWS, [rank.seconds for rank in self._ranks()])

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes per row over all ranks and attempts."""
        return {row: int(n) for row, n in _total(BYTE_ROWS, [rank.num_bytes for rank in self._ranks()]).items()}

    def _ranks(self) -> list[RankSummary]:
        return [rank for attempt in self.attempts for rank in attempt.ranks]


def _total(names: tuple[str, ...], parts: list[Mapping[str, Any]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in names}
