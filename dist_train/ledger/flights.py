"""Collectives under way and done: from the stamps of each to sums per name and log interval.

A `Flight` is one collective of one rank: launched (the rank has arrived), finished, and the wait in between, if any.
At a flush the members of each channel exchange when they arrived, and `summarize` says for each name how often, how
many bytes, and in seconds summed over the interval:

- `late`: this rank's arrival behind the first rank's; `early`: ahead of the last rank's;
- `wire`: from the last rank's arrival until the result was here;
- `hidden`: the part of `early + wire` in which this rank was not blocked by any collective;
- `peer`: the part of its own wait for this collective that was before the last rank's arrival.

`last` counts how often this rank was the last to arrive.

Size: a line a flush with some 150 bytes for each name, and 16 bytes a collective in the exchange. A model of 12 buckets
with a flush every 10 steps writes 0.25 kB a step and rank, 0.4 MB a step for 1,536 ranks, and exchanges 3 kB a flush.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

MAX_FLIGHTS = 20_000  # of a channel between two flushes, some 300 bytes each; what is beyond has bytes but no times

Entry = dict[str, Any]
_SECONDS = ("late", "early", "wire", "hidden", "peer")


class Flight:
    """One collective of this rank; a class with slots because there are dozens in a step."""

    __slots__ = (
        "channel",
        "ended",
        "finished",
        "first",
        "last",
        "launched",
        "name",
        "now",
        "num_bytes",
        "num_ranks",
        "op",
        "row",
        "sent_bytes",
        "settled",
        "waited",
    )

    def __init__(
        self,
        name: str,
        *,
        op: str,
        num_bytes: int,
        sent_bytes: float,
        num_ranks: int,
        channel: int,
        row: str,
        launched: Any,
        now: Any,
    ) -> None:
        self.name, self.op, self.num_bytes, self.sent_bytes = name, op, num_bytes, sent_bytes
        self.num_ranks, self.channel, self.row, self.launched, self.now = num_ranks, channel, row, launched, now
        self.finished: Any = None  # a stamp; None where the backend does not tell: then the end of the wait counts
        self.waited: Any = None  # stamp: its wait began
        self.ended: Any = None  # stamp: its wait ended
        self.settled = False  # this rank has waited for it, so it belongs to the next flush, on every rank alike
        self.first = self.last = 0.0  # arrivals, on this host's clock

    def finish(self, _: Any = None) -> None:
        """Notes that the result is here; called on the communication thread."""
        self.finished = self.now()


class Blocked:
    """The times in which a rank was blocked by collectives: disjoint intervals, in order."""

    def __init__(self, intervals: Sequence[tuple[float, float]]) -> None:
        ordered = sorted(intervals)
        self._begins = [begin for begin, _ in ordered]
        self._ends = [end for _, end in ordered]
        self._before = list(accumulate((end - begin for begin, end in ordered), initial=0.0))

    def between(self, begin: float, end: float) -> float:
        """Seconds blocked between two moments."""
        return max(self._until(end) - self._until(begin), 0.0)

    def _until(self, moment: float) -> float:
        index = bisect_right(self._begins, moment)
        if index == 0:
            return 0.0
        return self._before[index] - max(self._ends[index - 1] - moment, 0.0)


def empty_entry(op: str, row: str, num_ranks: int) -> Entry:
    """Sums of nothing yet, for collectives of one name."""
    sums = {**dict.fromkeys(("count", "bytes", "last"), 0), **dict.fromkeys(_SECONDS, 0.0)}
    return {"op": op, "row": row, "ranks": num_ranks, "sent": 0.0, **sums}


def summarize(flights: Sequence[Flight], blocked: Blocked, untimed: Mapping[str, Entry]) -> dict[str, Entry]:
    """Sums over the resolved `flights` (their stamps are seconds) for each name; see the module.

    `untimed` holds what has bytes only; it is added to.
    """
    entries: dict[str, Entry] = dict(untimed)
    for flight in flights:
        entry = entries.get(flight.name)
        if entry is None:
            entry = entries[flight.name] = empty_entry(flight.op, flight.row, flight.num_ranks)
        launched = flight.launched
        finished = max(flight.finished, flight.last)  # clocks are aligned to microseconds, not exactly
        early = flight.last - launched
        entry["count"] += 1
        entry["bytes"] += flight.num_bytes
        entry["sent"] += flight.sent_bytes
        entry["late"] += launched - flight.first
        entry["early"] += early
        entry["last"] += early < 1e-9
        entry["wire"] += finished - flight.last
        entry["hidden"] += max(finished - launched - blocked.between(launched, finished), 0.0)
        if flight.waited is not None:
            entry["peer"] += min(max(flight.last - flight.waited, 0.0), max(flight.ended - flight.waited, 0.0))
    return entries


def wire_seconds(flights: Sequence[Flight]) -> float:
    """Seconds in which at least one of the resolved `flights` was on the wire: where several are, they share it."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((flight.last, max(flight.finished, flight.last)) for flight in flights):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def rounded(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries as they are written: microseconds and whole bytes, zeros left out."""
    return {
        name: {
            key: round(value, 6)
            if isinstance(value, float) and key != "sent"
            else int(value)
            if key == "sent"
            else value
            for key, value in entry.items()
            if value
        }
        for name, entry in entries.items()
    }
