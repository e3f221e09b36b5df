"""The ledger of one rank: which row was running at every instant, and which bytes moved.

The recorder keeps marks ("from this stamp on, this row") in memory and turns them into seconds at `flush`, which the
loop calls at log intervals, so nothing is waited for in between. Because a mark ends one row exactly where it begins
the next, the rows add up to the wall time whatever the code does between them.

A wait for a collective is split when it is flushed: the ranks of each channel exchange (one all-reduce) when each
started each collective, and the part of a wait before the last rank's start is `wait_for_peer`, the rest `wire`. From
the same exchange comes one `collectives` line a flush: for each name how often, how many bytes, how late this rank was,
how long the wire took and how much of that was hidden (see `flights`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from dist_train.jsonlines import JsonLines
from dist_train.ledger.clock import Clock, ClockOffset, HostClock, clock_for, process_start_seconds
from dist_train.ledger.flights import MAX_FLIGHTS, Blocked, Entry, Flight, empty_entry, rounded, summarize, wire_seconds
from dist_train.ledger.interface import NullLedger, Peers, Recorder
from dist_train.ledger.rows import LOGGING, REMAINDER, STARTUP, TRAINING_ROWS, WAIT_FOR_PEER, WIRE

__all__ = ["Ledger", "NullLedger", "Recorder", "start_ledger"]


class _Row:
    """Context manager of `Ledger.row`; a class because it runs some twenty times a step."""

    __slots__ = ("_absorb", "_ledger", "_name")

    def __init__(self, ledger: Ledger, name: str, absorb: bool) -> None:
        self._ledger, self._name, self._absorb = ledger, name, absorb

    def __enter__(self) -> None:
        self._ledger._enter(self._name, self._absorb)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger._leave()


class _Wait:
    """Context manager of `Ledger.waiting`."""

    __slots__ = ("_flight", "_ledger")

    def __init__(self, ledger: Ledger, flight: Flight | None) -> None:
        self._ledger, self._flight = ledger, flight

    def __enter__(self) -> None:
        self._ledger._enter_wait(self._flight)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger._leave_wait(self._flight)


class Ledger:
    """Records one rank's time and bytes and appends them to `path` as JSON lines.

    Args:
        path: the rank's file; its folder is made. Lines are appended, so a resumed run goes on in the same file.
        identity: fields of the `start` line (rank, world_size, host, ...).
        clock: what stamps moments.
        started: process start on the host's monotonic clock, in seconds.
        offset: this host's clock minus rank 0's; taken off the stamps that ranks exchange.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: Mapping[str, Any],
        clock: Clock | None = None,
        started: float | None = None,
        offset: ClockOffset | None = None,
    ) -> None:
        self._clock = clock or HostClock()
        self._started = process_start_seconds() if started is None else started
        self.offset = offset or ClockOffset()
        self._marks: list[tuple[Any, str]] = [(self._started, STARTUP)]
        self._waits: dict[int, Flight | None] = {}  # index of the mark at which a wait began -> what it waited for
        self._flights: list[Flight] = []
        self._num_flights: dict[int, int] = {}  # of each channel since the last flush
        self._of_steps: set[str] = set()  # names of collectives of training steps
        self._untimed: dict[str, Entry] = {}
        self._communication: dict[str, Entry] = {}
        self.wire_seconds = 0.0
        """Of the last flush that had peers: time in which a collective of a training step was on the wire."""
        self._spans: list[tuple[int, dict[str, Any], dict[str, float]]] = []  # end mark, fields, seconds moved
        self._stack = [STARTUP]
        self._absorbed = 0  # rows entered inside an absorbing row
        self._absorbing = False
        self._bytes: dict[str, int] = {}
        self._workers: dict[str, float] = {}
        self._moved: dict[str, float] = {}
        self._ended = False
        self._place: dict[str, Any] = {"step": 0, "end_seconds": 0.0}
        self._lines = JsonLines(path)
        self._lines.write({"kind": "start", **identity, "started_unix": round(time.time() - self._age(), 3)})
        self._lines.flush()

    # -- while it runs -----------------------------------------------------------------------------------------

    def row(self, name: str, *, absorb: bool = False) -> _Row:
        """A `with` block whose time belongs to row `name`, minus the rows entered inside it.

        With `absorb` the rows inside are not split off: the whole block is `name` (evaluation, checkpoint).
        """
        return _Row(self, name, absorb)

    def launch(
        self,
        name: str,
        *,
        op: str,
        num_bytes: int,
        sent_bytes: float,
        num_ranks: int,
        channel: int = 0,
        on_host: bool = False,
    ) -> Flight | None:
        """Notes that this rank starts a collective now.

        Args:
            name: what it is, the same on every rank and in every step.
            op: one of `bandwidth.Op`.
            num_bytes: payload, by nccl-tests' definition.
            sent_bytes: what the algorithm sends from this rank.
            num_ranks: members of the channel.
            channel: its number; within a channel all members start the same collectives between two flushes.
            on_host: of host memory, whatever the device: the host's clock tells when.

        Returns:
            What `waiting` takes; None where so much is noted already that only bytes are counted.
        """
        self.add_bytes(WIRE, num_bytes)
        count = self._num_flights[channel] = self._num_flights.get(channel, 0) + 1
        if count > MAX_FLIGHTS:
            self._count_untimed(name, op, num_bytes, sent_bytes, num_ranks)
            return None
        now, row = self._clock.now, self._stack[-1]
        if row in TRAINING_ROWS:
            self._of_steps.add(name)
        elif name in self._of_steps:  # what evaluation does as training steps do is kept apart
            name = f"{name} ({row})"
        flight = Flight(
            name,
            op=op,
            num_bytes=num_bytes,
            sent_bytes=sent_bytes,
            num_ranks=num_ranks,
            channel=channel,
            row=row,
            launched=now() if on_host else self._clock.stamp(),
            now=now,
        )
        self._flights.append(flight)
        return flight

    def add_untimed(self, name: str, *, op: str, num_bytes: int, sent_bytes: float, num_ranks: int) -> None:
        """Notes a collective (or a message) of which only the bytes are known: not when it came and went."""
        self.add_bytes(WIRE, num_bytes)
        self._count_untimed(name, op, num_bytes, sent_bytes, num_ranks)

    def _count_untimed(self, name: str, op: str, num_bytes: int, sent_bytes: float, num_ranks: int) -> None:
        entry = self._untimed.get(name)
        if entry is None:
            entry = self._untimed[name] = empty_entry(op, self._stack[-1], num_ranks)
        entry["count"] += 1
        entry["bytes"] += num_bytes
        entry["sent"] += sent_bytes

    def waiting(self, flight: Flight | None) -> _Wait:
        """A `with` block that waits for what `launch` returned."""
        return _Wait(self, flight)

    def now(self) -> float:
        """Seconds on the host's clock that stamps are resolved to."""
        return self._clock.now()

    def stamp(self) -> Any:
        """A stamp of this moment."""
        return self._clock.stamp()

    def current(self) -> str:
        """The row that is running now; any thread may ask."""
        return self._stack[-1]

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

    @property
    def communication(self) -> Mapping[str, Entry]:
        """The collectives of the last flush that had peers, summed for each name (see `flights.summarize`)."""
        return self._communication

    def note(self, kind: str, content: Mapping[str, Any]) -> None:
        """Writes a line of another kind, at the place of the last step flushed."""
        self._lines.write({"kind": kind, **self._place, **content})

    def flush(self, peers: Peers | None = None) -> list[dict[str, Any]]:
        """Writes the spans closed since the last flush and returns their lines.

        Args:
            peers: compares the ranks' arrivals (a collective: then every rank has to call `flush` after the same
                collectives). Without it waits count as `wire` alone and there is no `collectives` line.

        Returns:
            The spans written, oldest first; the time since the last `close_span` stays for the next flush.
        """
        if not self._spans:
            return []
        with self.row(LOGGING, absorb=True):  # absorbing: the exchange below leaves no marks of its own
            return self._flush(peers)

    def _flush(self, peers: Peers | None) -> list[dict[str, Any]]:
        last = self._spans[-1][0]
        times = self._resolve()
        landed = [flight for flight in self._flights if flight.settled]
        self._flights = [flight for flight in self._flights if not flight.settled]
        self._num_flights = {}
        for index, flight in self._waits.items():
            if flight is not None and flight.waited is None:
                flight.waited, flight.ended = times[index], times[index + 1]
        for flight in landed:
            end = times[-1] if flight.ended is None else flight.ended
            flight.finished = end if flight.finished is None else min(flight.finished, end)
            flight.last = flight.launched
        if peers is not None:
            self._compare_arrivals(landed, peers)

        lines, begin = [], 0
        for end, fields, moved in self._spans:
            rows = self._seconds_of_rows(times, begin, end)
            for row, seconds in moved.items():
                rows[row] = rows.get(row, 0.0) + seconds
            fields["end_seconds"] = round(times[end] - self._started, 6)
            fields["wall_seconds"] = round(times[end] - times[begin], 6)
            fields["seconds"] = {row: round(value, 6) for row, value in rows.items() if value}
            self._lines.write(fields)
            lines.append(fields)
            begin = end
        self._place = {"step": lines[-1]["step"], "end_seconds": lines[-1]["end_seconds"]}
        if peers is not None:
            self._communication = summarize(landed, self._blocked(times, landed), self._untimed)
            self._untimed = {}
            self.wire_seconds = wire_seconds([flight for flight in landed if flight.row in TRAINING_ROWS])
            if self._communication:
                content = {"wire_seconds": round(self.wire_seconds, 6), "of": rounded(self._communication)}
                self.note("collectives", content)
        self._lines.flush()

        rows_after = [row for _, row in self._marks[last:]]
        self._marks = list(zip(times[last:], rows_after, strict=True))
        self._waits = {index - last: flight for index, flight in self._waits.items() if index >= last}
        self._spans = []
        return lines

    def _resolve(self) -> list[float]:
        """Turns every stamp so far into seconds, those of flights in place; returns the marks' times."""
        stamps = [stamp for stamp, _ in self._marks]
        places = [
            (flight, name)
            for flight in self._flights
            for name in ("launched", "finished", "waited", "ended")
            if getattr(flight, name) is not None and (flight.settled or name == "launched")
        ]
        resolved = self._clock.resolve(stamps + [getattr(flight, name) for flight, name in places])
        for (flight, name), seconds in zip(places, resolved[len(stamps) :], strict=True):
            setattr(flight, name, seconds)
        return resolved[: len(stamps)]

    def _compare_arrivals(self, landed: list[Flight], peers: Peers) -> None:
        """Fills in the first and the last rank's arrival; the same order on every rank: by name, then by launch."""
        by_channel: dict[int, list[Flight]] = {}
        for flight in landed:
            by_channel.setdefault(flight.channel, []).append(flight)
        for channel in sorted(by_channel):
            flights = sorted(by_channel[channel], key=lambda flight: flight.name)
            offsets = [self.offset.at(flight.launched) for flight in flights]
            moments = [flight.launched - offset for flight, offset in zip(flights, offsets, strict=True)]
            firsts, lasts = peers.first_and_last(moments, channel)
            for flight, offset, first, last in zip(flights, offsets, firsts, lasts, strict=True):
                flight.first, flight.last = first + offset, last + offset

    def _blocked(self, times: list[float], landed: list[Flight]) -> Blocked:
        inside = [(f.waited, f.ended) for f in landed if f.waited is not None]
        counted = set(inside)
        inside += [
            (times[index], times[index + 1]) for index in self._waits if (times[index], times[index + 1]) not in counted
        ]
        return Blocked(inside)

    def _seconds_of_rows(self, times: list[float], begin: int, end: int) -> dict[str, float]:
        rows: dict[str, float] = {}
        for index in range(begin, end):
            row, duration = self._marks[index][1], max(times[index + 1] - times[index], 0.0)
            flight = self._waits.get(index)
            if flight is not None:
                peer = min(max(flight.last - times[index], 0.0), duration)
                if peer:
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

    def _enter(self, name: str, absorb: bool) -> None:
        if self._absorbing:
            self._absorbed += 1
            return
        self._absorbing = absorb
        self._stack.append(name)
        self._mark(name)

    def _enter_wait(self, flight: Flight | None) -> None:
        if not self._absorbing:
            self._waits[len(self._marks)] = flight
        elif flight is not None:
            flight.waited = self._clock.stamp()
        self._enter(WIRE, False)

    def _leave_wait(self, flight: Flight | None) -> None:
        if flight is not None:
            flight.settled = True
            if self._absorbing:
                flight.ended = self._clock.stamp()
        self._leave()

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


def start_ledger(
    run_dir: Path, *, device: torch.device, identity: Mapping[str, Any], offset: ClockOffset | None = None
) -> Ledger:
    """The ledger of the rank `identity["rank"]` in `run_dir/ledger/rank_00000.jsonl`."""
    path = run_dir / "ledger" / f"rank_{identity['rank']:05d}.jsonl"
    return Ledger(path, identity=identity, clock=clock_for(device), offset=offset)
