"""The ledger of one rank: which row was running at every instant, and which bytes moved.

The recorder keeps marks ("from this stamp on, this row") in memory and turns them into seconds at `flush`, which the
loop calls at log intervals, so nothing is waited for in between. Because a mark ends one row exactly where it begins
the next, the rows add up to the wall time whatever the code does between them.

A wait for a collective is split when it is flushed: the ranks exchange (one MAX all-reduce) when each started each
collective, and the part of a wait before the last rank's start is `wait_for_peer`, the rest `wire`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, ContextManager, Protocol  # noqa: UP035

import torch

from dist_train.jsonlines import JsonLines
from dist_train.ledger.clock import Clock, HostClock, clock_for, process_start_seconds
from dist_train.ledger.rows import LOGGING, REMAINDER, STARTUP, WAIT_FOR_PEER, WIRE

MaxOverRanks = Callable[[list[float]], list[float]]


class Recorder(Protocol):
    """What the engine asks of a ledger; `Ledger` does it, `NullLedger` does nothing."""

    def row(self, name: str, *, absorb: bool = False) -> ContextManager[Any]: ...
    def waiting(self, launched: Any) -> ContextManager[Any]: ...
    def stamp(self) -> Any: ...
    def add_bytes(self, row: str, num_bytes: int) -> None: ...
    def add_worker_costs(self, costs: Mapping[str, float]) -> None: ...
    def split_row(self, row: str, parts: Mapping[str, float]) -> None: ...
    def close_span(self, name: str, *, step: int, clips_seen: int) -> None: ...
    def training_begins(self) -> None: ...
    def flush(self, max_over_ranks: MaxOverRanks | None = None) -> list[dict[str, Any]]: ...
    def end(self, exit_status: str) -> None: ...


class _Row:
    """Context manager of `Ledger.row`; a class because it runs some twenty times a step."""

    __slots__ = ("_absorb", "_launched", "_ledger", "_name")

    def __init__(self, ledger: Ledger, name: str, absorb: bool, launched: Any = None) -> None:
        self._ledger, self._name, self._absorb, self._launched = ledger, name, absorb, launched

    def __enter__(self) -> None:
        self._ledger._enter(self._name, self._absorb, self._launched)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger._leave()


class Ledger:
    """Records one rank's time and bytes and appends them to `path` as JSON lines.

    Args:
        path: the rank's file; its folder is made. Lines are appended, so a resumed run goes on in the same file.
        identity: fields of the `start` line (rank, world_size, host, ...).
        clock: what stamps moments.
        started: process start on the host's monotonic clock, in seconds.
        clock_offset: this host's clock minus rank 0's, in seconds; taken off the stamps that ranks exchange.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: Mapping[str, Any],
        clock: Clock | None = None,
        started: float | None = None,
        clock_offset: float = 0.0,
    ) -> None:
        self._clock = clock or HostClock()
        self._started = process_start_seconds() if started is None else started
        self.clock_offset = clock_offset
        self._marks: list[tuple[Any, str]] = [(self._started, STARTUP)]
        self._launches: dict[int, Any] = {}  # index of the mark at which a wait began -> stamp of its launch
        self._spans: list[tuple[int, dict[str, Any], dict[str, float]]] = []  # end mark, fields, seconds moved
        self._stack = [STARTUP]
        self._absorbed = 0  # rows entered inside an absorbing row
        self._absorbing = False
        self._bytes: dict[str, int] = {}
        self._workers: dict[str, float] = {}
        self._moved: dict[str, float] = {}
        self._ended = False
        self._lines = JsonLines(path)
        self._lines.write({"kind": "start", **identity, "started_unix": round(time.time() - self._age(), 3)})
        self._lines.flush()

    # -- while it runs -----------------------------------------------------------------------------------------

    def row(self, name: str, *, absorb: bool = False) -> _Row:
        """A `with` block whose time belongs to row `name`, minus the rows entered inside it.

        With `absorb` the rows inside are not split off: the whole block is `name` (evaluation, checkpoint).
        """
        return _Row(self, name, absorb)

    def waiting(self, launched: Any) -> _Row:
        """A `with` block that waits for a collective which this rank started at stamp `launched`."""
        return _Row(self, WIRE, False, launched)

    def stamp(self) -> Any:
        """A stamp of this moment, for `waiting`."""
        return self._clock.stamp()

    def add_bytes(self, row: str, num_bytes: int) -> None:
        """Adds bytes that `row` moved."""
        self._bytes[row] = self._bytes.get(row, 0) + num_bytes

    def add_worker_costs(self, costs: Mapping[str, float]) -> None:
        """Adds what a loader's worker says that it spent on a batch (rows of `WORKER_ROWS` and counts)."""
        for name, value in costs.items():
            self._workers[name] = self._workers.get(name, 0) + value

    def split_row(self, row: str, parts: Mapping[str, float]) -> None:
        """Moves seconds of this span from `row` to the rows of `parts` (what a block turned out to consist of)."""
        for name, seconds in parts.items():
            self._moved[name] = self._moved.get(name, 0.0) + seconds
            self._moved[row] = self._moved.get(row, 0.0) - seconds

    def close_span(self, name: str, *, step: int, clips_seen: int) -> None:
        """Ends a span here: the time since the last one is written under `name` at the next `flush`."""
        fields: dict[str, Any] = {"kind": "span", "name": name, "step": step, "clips_seen": clips_seen}
        if self._bytes:
            fields["bytes"] = self._bytes
        if self._workers:
            fields["workers"] = {key: round(value, 6) for key, value in self._workers.items()}
        self._mark(self._stack[-1])
        self._spans.append((len(self._marks) - 1, fields, self._moved))
        self._bytes, self._workers, self._moved = {}, {}, {}

    def training_begins(self) -> None:
        """Ends the start-up: from here on, time that no row claims is `remainder`."""
        self._stack[0] = REMAINDER
        self.close_span(STARTUP, step=0, clips_seen=0)

    # -- at log intervals --------------------------------------------------------------------------------------

    def flush(self, max_over_ranks: MaxOverRanks | None = None) -> list[dict[str, Any]]:
        """Writes the spans closed since the last flush and returns their lines.

        Args:
            max_over_ranks: element-wise maximum of a list over the ranks (a collective: then every rank has to
                call `flush` after the same collectives). Without it waits count as `wire` alone.

        Returns:
            The lines written, oldest first; the time since the last `close_span` stays for the next flush.
        """
        if not self._spans:
            return []
        with self.row(LOGGING, absorb=True):  # absorbing: the exchange below leaves no marks of its own
            return self._flush(max_over_ranks)

    def _flush(self, max_over_ranks: MaxOverRanks | None) -> list[dict[str, Any]]:
        last = self._spans[-1][0]
        waits = [index for index in self._launches if index < last]
        stamps = [stamp for stamp, _ in self._marks] + [self._launches.pop(index) for index in waits]
        resolved = self._clock.resolve(stamps)
        times, launches = resolved[: len(self._marks)], resolved[len(self._marks) :]
        if max_over_ranks is not None and launches:
            latest = max_over_ranks([launch - self.clock_offset for launch in launches])
            launches = [value + self.clock_offset for value in latest]
        started_by_all = dict(zip(waits, launches, strict=True))

        lines, begin = [], 0
        for end, fields, moved in self._spans:
            rows = self._seconds_of_rows(times, begin, end, started_by_all)
            for row, seconds in moved.items():
                rows[row] = rows.get(row, 0.0) + seconds
            fields["end_seconds"] = round(times[end] - self._started, 6)
            fields["wall_seconds"] = round(times[end] - times[begin], 6)
            fields["seconds"] = {row: round(value, 6) for row, value in rows.items() if value}
            self._lines.write(fields)
            lines.append(fields)
            begin = end
        self._lines.flush()

        rows_after = [row for _, row in self._marks[last:]]
        self._marks = list(zip(times[last:], rows_after, strict=True))
        self._launches = {index - last: stamp for index, stamp in self._launches.items()}
        self._spans = []
        return lines

    def _seconds_of_rows(
        self, times: list[float], begin: int, end: int, started_by_all: Mapping[int, float]
    ) -> dict[str, float]:
        rows: dict[str, float] = {}
        for index in range(begin, end):
            row, duration = self._marks[index][1], max(times[index + 1] - times[index], 0.0)
            if index in started_by_all:
                peer = min(max(started_by_all[index] - times[index], 0.0), duration)
                rows[WAIT_FOR_PEER] = rows.get(WAIT_FOR_PEER, 0.0) + peer
                duration -= peer
            rows[row] = rows.get(row, 0.0) + duration
        return rows

    def end(self, exit_status: str) -> None:
        """Writes what is left and the `end` line ("ok", "error" or "preempted"). Later calls do nothing."""
        if self._ended:
            return
        self._ended = True
        self.close_span("shutdown", step=-1, clips_seen=-1)
        self.flush()
        self._lines.write({"kind": "end", "wall_seconds": round(self._age(), 6), "exit": exit_status})
        self._lines.close()

    # -- marks -------------------------------------------------------------------------------------------------

    def _enter(self, name: str, absorb: bool, launched: Any) -> None:
        if self._absorbing:
            self._absorbed += 1
            return
        self._absorbing = absorb
        self._stack.append(name)
        self._mark(name)
        if launched is not None:
            self._launches[len(self._marks) - 1] = launched

    def _leave(self) -> None:
        if self._absorbing and self._absorbed:
            self._absorbed -= 1
            return
        self._absorbing = False
        self._stack.pop()
        self._mark(self._stack[-1])

    def _mark(self, row: str) -> None:
        self._marks.append((self._clock.stamp(), row))

    def _age(self) -> float:
        return time.perf_counter() - self._started


class NullLedger:
    """A ledger that records nothing (`--ledger off`), to measure what the ledger costs."""

    _nothing = nullcontext()

    def row(self, name: str, *, absorb: bool = False) -> ContextManager[Any]:  # noqa: ARG002
        """A block that is not recorded."""
        return self._nothing

    def waiting(self, launched: Any) -> ContextManager[Any]:  # noqa: ARG002
        """A wait that is not recorded."""
        return self._nothing

    def stamp(self) -> None:
        """No stamp."""

    def add_bytes(self, row: str, num_bytes: int) -> None:
        """Not recorded."""

    def add_worker_costs(self, costs: Mapping[str, float]) -> None:
        """Not recorded."""

    def split_row(self, row: str, parts: Mapping[str, float]) -> None:
        """Not recorded."""

    def close_span(self, name: str, *, step: int, clips_seen: int) -> None:
        """Not recorded."""

    def training_begins(self) -> None:
        """Not recorded."""

    def flush(self, max_over_ranks: MaxOverRanks | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """Nothing was recorded: an empty list."""
        return []

    def end(self, exit_status: str) -> None:
        """Not recorded."""


def start_ledger(
    run_dir: Path, *, device: torch.device, identity: Mapping[str, Any], clock_offset: float = 0.0
) -> Ledger:
    """The ledger of the rank `identity["rank"]` in `run_dir/ledger/rank_00000.jsonl`."""
    path = run_dir / "ledger" / f"rank_{identity['rank']:05d}.jsonl"
    return Ledger(path, identity=identity, clock=clock_for(device), clock_offset=clock_offset)
