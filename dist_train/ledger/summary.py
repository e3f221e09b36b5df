"""Reads a run's ledger files back: seconds and bytes per row, rank and attempt, and the series over steps.

    summary = read_ledger(Path("runs/motion_tsm"))
    summary.last.slowest_rank.rank, summary.last.clips_per_second
    check_closed(summary, 0.02).describe()

`read_ledger` streams `ledger/rank_*.jsonl` line by line and keeps numbers only (about 130 bytes a step and
rank, or a bounded number of points with `max_points`), so that 30,000 steps of 64 ranks are readable on a
laptop. A file may hold several attempts (a resumed run appends a `start` line and goes on) and the folder may
hold ranks of another world size from an earlier attempt. A killed process leaves no `end` line and perhaps
half a line; that is no error. Any other line that cannot be read is: `LedgerError` names the file and the
line.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.ledger.communication import CommunicationTotals
from dist_train.ledger.rows import RANK_ROWS, REMAINDER, TIER_COST, WORKER_ROWS
from dist_train.ledger.totals import (
    BYTE_ROWS,
    AttemptSummary,
    LedgerSummary,
    RankSummary,
    StepSeries,
    WorkerTotals,
)

__all__ = [
    "BYTE_ROWS",
    "AttemptSummary",
    "ClosureCheck",
    "LedgerError",
    "LedgerSummary",
    "RankClosure",
    "RankSummary",
    "StepSeries",
    "WorkerTotals",
    "check_closed",
    "read_ledger",
    "read_rank_file",
]

_WORKER_KEYS = ("wall", *WORKER_ROWS, "frames_decoded", "frames_used", "skipped")
_ROW_INDEX = {row: index for index, row in enumerate(RANK_ROWS)}
_BYTE_INDEX = {row: index for index, row in enumerate(BYTE_ROWS)}


class LedgerError(ValueError):
    """A ledger file that is not one, or is damaged; the message names the file and the line."""


@dataclass(frozen=True, kw_only=True)
class RankClosure:
    """Whether one rank's rows add up to its wall time."""

    rank: int
    """The rank."""
    attempt: int
    """Its attempt."""
    wall_seconds: float
    """Process start to exit."""
    gap_seconds: float
    """Wall time minus all rows, the remainder among them: missing, or counted twice (negative)."""
    remainder_seconds: float
    """Time that was counted, but that no named row claims."""
    closed: bool
    """True if the gap alone, and the gap and the remainder together, are within the tolerance."""


@dataclass(frozen=True, kw_only=True)
class ClosureCheck:
    """The answer of `check_closed`."""

    tolerance: float
    """Share of a rank's wall time that may be unexplained."""
    ranks: tuple[RankClosure, ...]
    """Every rank of every attempt."""

    @property
    def closed(self) -> bool:
        """True if every rank's ledger closes."""
        return all(rank.closed for rank in self.ranks)

    def describe(self) -> str:
        """One sentence: how many ranks close, and the worst of them."""
        num_open = sum(not rank.closed for rank in self.ranks)
        worst = max(self.ranks, key=_unexplained_share)
        head = (
            f"{num_open} of {len(self.ranks)} rank ledgers do not add up" if num_open else "every rank's ledger adds up"
        )
        return (
            f"{head} within {self.tolerance:.1%} of wall time; worst is rank {worst.rank} "
            f"of attempt {worst.attempt}: {worst.remainder_seconds:.3f} s remainder "
            f"and {worst.gap_seconds:.3f} s missing of {worst.wall_seconds:.3f} s"
        )


def _unexplained_share(rank: RankClosure) -> float:
    return (abs(rank.gap_seconds) + abs(rank.remainder_seconds)) / max(rank.wall_seconds, 1e-9)


def check_closed(summary: LedgerSummary, tolerance: float) -> ClosureCheck:
    """Says for each rank and attempt whether its rows add up to its wall time.

    Args:
        tolerance: share of the wall time that may be missing or without a named row (0.02 is 2 %).
    """
    return ClosureCheck(
        tolerance=tolerance,
        ranks=tuple(_closure(rank, tolerance) for attempt in summary.attempts for rank in attempt.ranks),
    )


def _closure(rank: RankSummary, tolerance: float) -> RankClosure:
    gap = rank.wall_seconds - sum(rank.seconds.values())
    remainder = rank.seconds[REMAINDER]
    allowed = tolerance * rank.wall_seconds + 1e-6  # lines are rounded to microseconds
    return RankClosure(
        rank=rank.rank,
        attempt=rank.attempt,
        wall_seconds=rank.wall_seconds,
        gap_seconds=gap,
        remainder_seconds=remainder,
        closed=abs(gap) <= allowed and abs(gap + remainder) <= allowed,
    )


def read_ledger(run_dir: Path, *, max_points: int | None = None) -> LedgerSummary:
    """Reads `run_dir/ledger/rank_*.jsonl`.

    Args:
        max_points: keeps between this number and twice as many points of each rank's series, by adding up
            neighboring steps; None keeps every step. Totals are exact either way.

    Raises:
        LedgerError: no ledger file, or a damaged line that is not the torn end of an attempt.
    """
    files = sorted((Path(run_dir) / "ledger").glob("rank_*.jsonl"))
    ranks = [rank for path in files for rank in read_rank_file(path, max_points=max_points)]
    if not ranks:
        raise LedgerError(
            f"no ledger in {run_dir}: expected ledger/rank_00000.jsonl, which a run writes when it starts"
        )
    numbers = sorted({rank.attempt for rank in ranks})
    return LedgerSummary(
        run_dir=Path(run_dir),
        attempts=tuple(
            AttemptSummary(
                attempt=number,
                ranks=tuple(sorted((r for r in ranks if r.attempt == number), key=lambda r: r.rank)),
            )
            for number in numbers
        ),
    )


def read_rank_file(path: Path, *, max_points: int | None = None) -> list[RankSummary]:
    """The attempts in one rank's file, in order; see `read_ledger`."""
    attempts: list[_Attempt] = []
    for number, line in _lines(path):
        try:
            if line["kind"] == "start":
                attempts.append(_Attempt(line, max_points))
            elif line["kind"] in ("span", "end") and attempts:
                attempts[-1].add(line, number)
            elif line["kind"] in CommunicationTotals.kinds and attempts:
                attempts[-1].communication.add(line)
            else:
                raise LedgerError(
                    f"kind {line['kind']!r} before any start" if not attempts else f"kind {line['kind']!r}"
                )
        except (LedgerError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise LedgerError(f"{path}, line {number}: not a ledger line ({what})") from error
    return [attempt.summary() for attempt in attempts]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and contents of the lines, without the torn end of an attempt (alone, or glued to a start)."""
    damaged: tuple[int, str] | None = None
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            line, problem = _parse(raw)
            if line is None:
                line, _ = _parse(raw[max(raw.rfind(b'{"kind"'), 0) :])
                if line is not None and line.get("kind") != "start":
                    line = None
            if damaged is not None and (line is None or line.get("kind") != "start"):
                raise LedgerError(f"{path}, line {damaged[0]}: damaged ({damaged[1]}); the lines around it are whole")
            damaged = (number, problem) if line is None else None
            if line is not None:
                yield number, line


def _parse(raw: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return None, str(error)
    return (line, "") if isinstance(line, dict) else (None, "not an object")


class _Attempt:
    """Grows one `RankSummary` line by line."""

    def __init__(self, start: dict[str, Any], max_points: int | None) -> None:
        self.identity = start
        self.rank, self.attempt = int(start["rank"]), int(start["attempt"])
        self.exit, self.wall = "killed", 0.0
        self.seconds = [0.0] * len(RANK_ROWS)
        self.step_seconds = [0.0] * len(RANK_ROWS)
        self.spans: dict[str, float] = {}
        self.bytes = [0.0] * len(BYTE_ROWS)
        self.workers: dict[str, float] | None = None
        self.tiers: dict[tuple[str, str], float] = {}
        self.num_steps = 0
        self.worst_gap = (0.0, 0)
        self.series = _Series(max_points)
        self.communication = CommunicationTotals()

    def add(self, line: dict[str, Any], number: int) -> None:
        if line["kind"] == "end":
            self.exit, self.wall = str(line["exit"]), _finite(line["wall_seconds"])
            return
        wall, name = _finite(line["wall_seconds"]), str(line["name"])
        end = _finite(line["end_seconds"])
        seconds = _row(line["seconds"], _ROW_INDEX, "row")
        num_bytes = _row(line.get("bytes") or {}, _BYTE_INDEX, "byte row")
        gap = abs(wall - sum(seconds))
        if gap > self.worst_gap[0]:
            self.worst_gap = (gap, number)
        self.wall = max(self.wall, end)
        self.spans[name] = self.spans.get(name, 0.0) + wall
        self.seconds = [a + b for a, b in zip(self.seconds, seconds, strict=True)]
        self.bytes = [a + b for a, b in zip(self.bytes, num_bytes, strict=True)]
        if line.get("workers"):
            workers = self.workers or dict.fromkeys(_WORKER_KEYS, 0.0)
            self.workers = {key: workers[key] + _finite(line["workers"].get(key, 0)) for key in _WORKER_KEYS}
            for key, value in line["workers"].items():
                if found := TIER_COST.fullmatch(key):
                    place = (found["tier"], found["unit"])
                    self.tiers[place] = self.tiers.get(place, 0.0) + _finite(value)
        if name == "step":
            self.num_steps += 1
            self.step_seconds = [a + b for a, b in zip(self.step_seconds, seconds, strict=True)]
            self.series.append(int(line["step"]), int(line["clips_seen"]), end, wall, seconds, num_bytes)

    def summary(self) -> RankSummary:
        workers = self.workers
        return RankSummary(
            rank=self.rank,
            attempt=self.attempt,
            identity=self.identity,
            exit=self.exit,
            wall_seconds=self.wall,
            seconds=dict(zip(RANK_ROWS, self.seconds, strict=True)),
            step_row_seconds=dict(zip(RANK_ROWS, self.step_seconds, strict=True)),
            span_seconds=self.spans,
            num_bytes={row: int(n) for row, n in zip(BYTE_ROWS, self.bytes, strict=True)},
            workers=None
            if workers is None
            else WorkerTotals(
                wall_seconds=workers["wall"],
                seconds={row: workers[row] for row in WORKER_ROWS},
                frames_decoded=int(workers["frames_decoded"]),
                frames_used=int(workers["frames_used"]),
                skipped=int(workers["skipped"]),
                tier_seconds={tier: value for (tier, unit), value in self.tiers.items() if unit == "seconds"},
                tier_bytes={tier: int(value) for (tier, unit), value in self.tiers.items() if unit == "bytes"},
            ),
            num_steps=self.num_steps,
            worst_span_gap=self.worst_gap,
            steps=self.series.finish(),
            communication=self.communication.finish(),
        )


class _Series:
    """Grows a `StepSeries`; halves itself by adding neighbours when it holds twice `max_points`."""

    def __init__(self, max_points: int | None) -> None:
        if max_points is not None and max_points < 1:
            raise ValueError(f"max_points is {max_points}; give at least 1, or None for every step")
        self.limit = None if max_points is None else 2 * max_points
        self.stride = 1
        self.exact = array("d")  # step, clips_seen, end_seconds: the last of a point
        self.sums = array("d")  # num_steps, wall_seconds, bytes: added up
        self.seconds = array("f")
        self.open = 0  # steps in the last point

    def append(
        self, step: int, clips: int, end: float, wall: float, seconds: list[float], num_bytes: list[float]
    ) -> None:
        if self.open in (0, self.stride):
            if self.limit is not None and len(self.exact) // 3 >= self.limit:
                self._halve()
            self.open = 0
        if self.open == 0:
            self.exact.extend((step, clips, end))
            self.sums.extend(chain((1, wall), num_bytes))
            self.seconds.extend(seconds)
        else:
            self.exact[-3:] = array("d", (step, clips, end))
            _add_to_tail(self.sums, [1, wall, *num_bytes])
            _add_to_tail(self.seconds, seconds)
        self.open += 1

    def _halve(self) -> None:
        exact, sums, seconds = self._arrays()
        self.exact = array("d", exact[1::2].tobytes())
        self.sums = array("d", (sums[0::2] + sums[1::2]).tobytes())
        self.seconds = array("f", (seconds[0::2] + seconds[1::2]).tobytes())
        self.stride *= 2

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (
            np.array(self.exact, dtype=np.float64).reshape(-1, 3),
            np.array(self.sums, dtype=np.float64).reshape(-1, 2 + len(BYTE_ROWS)),
            np.array(self.seconds, dtype=np.float32).reshape(-1, len(RANK_ROWS)),
        )

    def finish(self) -> StepSeries:
        exact, sums, seconds = self._arrays()
        return StepSeries(
            step=exact[:, 0].astype(np.int64),
            clips_seen=exact[:, 1].astype(np.int64),
            num_steps=sums[:, 0].astype(np.int64),
            end_seconds=exact[:, 2],
            wall_seconds=sums[:, 1],
            seconds=seconds,
            num_bytes=sums[:, 2:],
        )


def _add_to_tail(values: array[float], addends: list[float]) -> None:
    first = len(values) - len(addends)
    for index, addend in enumerate(addends, start=first):
        values[index] += addend


def _row(values: Mapping[str, Any], index: Mapping[str, int], what: str) -> list[float]:
    row = [0.0] * len(index)
    for name, value in values.items():
        if name not in index:
            raise LedgerError(f"unknown {what} {name!r}; this version knows {', '.join(index)}")
        row[index[name]] = _finite(value)
    return row


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise LedgerError(f"{value!r} is not a finite number")
    return number
