"""Live accounts of communication, at log intervals: bandwidth, what is hidden, which rank holds the others up and why.

At each log every rank tells every other what it spent (`Standing`: some 200 bytes a rank in one all-gather, 0.3 MB
received for 1,536 ranks), so that decisions are the same everywhere without a word more: when to compare clocks again,
and when to time the links between hosts because the wire is much slower than it has been.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.clocks import Clocks
from dist_train.collectives import Collectives
from dist_train.ledger.bandwidth import bus_bytes
from dist_train.ledger.flights import Entry
from dist_train.ledger.host import HostCounters, group_interface
from dist_train.ledger.recorder import Ledger, Recorder
from dist_train.ledger.rows import AUGMENT, DECODE, RANK_ROWS, READ, TRAINING_ROWS
from dist_train.ledger.stragglers import (
    SECTIONS,
    Standing,
    Straggler,
    find_straggler,
    link_straggler,
    slow_link,
    steady,
)
from dist_train.links import time_links

CLOCK_SECONDS = 60.0
"""Clocks are compared again after so long: two hosts whose crystals differ by 20 ppm are then 1.2 ms apart."""
PROBE_BELOW = 0.5
"""Links are timed again when the bus bandwidth falls below this share of the best so far, and with the clocks as long
as one of them is slow."""
PROBE_PAUSE = 100.0
"""But not before this many times what the last timing took: 1 % of the time at most."""
_LEAST_BYTES = 1e6  # an interval that moved less says nothing about bandwidth

_NAMED = {row for row in RANK_ROWS if row in Standing.__dataclass_fields__}


def standing(
    spans: Sequence[Mapping[str, Any]], communication: Mapping[str, Entry], host: Mapping[str, Any]
) -> Standing:
    """What this rank spent in the stretch of these spans.

    Args:
        spans: lines that `Ledger.flush` returned.
        communication: sums by name of collective, as `flights.summarize` makes them.
        host: `HostCounters.since_last`.
    """
    steps = [span for span in spans if span["name"] == "step"]
    count = max(len(steps), 1)
    rows = {row: sum(span["seconds"].get(row, 0.0) for span in steps) / count for row in RANK_ROWS}
    workers = {
        row: sum(span.get("workers", {}).get(row, 0.0) for span in steps) / count for row in (READ, DECODE, AUGMENT)
    }
    of_steps = [entry for entry in communication.values() if entry["row"] in TRAINING_ROWS]
    peers = {
        f"{section}_peer": sum(entry.get("peer", 0.0) for entry in communication.values() if entry["row"] == section)
        for section in SECTIONS
    }
    return Standing(
        num_steps=len(steps),
        **{row: rows[row] for row in _NAMED},
        bookkeeping=sum(rows[row] for row in RANK_ROWS if row not in _NAMED),
        **{f"worker_{row}": seconds for row, seconds in workers.items()},
        run_queue=host.get("run_queue", 0.0) / count,
        gc=host.get("gc", 0.0) / count,
        all_seconds=sum(span["wall_seconds"] for span in spans),
        **peers,
        in_flight=sum(entry.get("early", 0.0) + entry.get("wire", 0.0) for entry in of_steps),
        hidden=sum(entry.get("hidden", 0.0) for entry in of_steps),
    )


class Accounts:
    """See the module. Every rank makes one at the same time, after its ledger, and calls `at_log` at the same steps."""

    def __init__(self, collectives: Collectives, ledger: Recorder) -> None:
        world = collectives.world
        self._collectives, self._world = collectives, world
        self._ledger = ledger if isinstance(ledger, Ledger) else None
        self._stragglers: list[Straggler | None] = []
        self._links: dict[tuple[int, int], float] = {}
        self._best_bandwidth = 0.0
        self.num_probes = 0
        if self._ledger is None:
            return
        self._host = HostCounters(interface=group_interface() if world.local_rank == 0 else None)
        if world.world_size == 1:
            return
        self._hosts = dict(enumerate(collectives.gather_objects(socket.gethostname())))
        self._clocks = Clocks(collectives, now=self._ledger.now)
        self._read_clock()
        if world.num_nodes > 1:
            self._time_links()

    def at_log(self, spans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Writes what this rank's host counted and returns metrics `comm` and `straggler`, complete on rank 0.

        Args:
            spans: the lines that the ledger's flush with all ranks has just returned.
        """
        ledger = self._ledger
        if ledger is None or not spans:
            return {}
        host = self._host.since_last()
        ledger.note("host", host)
        if self._world.world_size == 1:
            return {}
        own = standing(spans, ledger.communication, host)
        moved = bus_bytes(entry for entry in ledger.communication.values() if entry["row"] in TRAINING_ROWS)
        bandwidth = moved / ledger.wire_seconds if moved >= _LEAST_BYTES and ledger.wire_seconds > 0 else 0.0
        now = time.perf_counter()
        table = self._collectives.all_of_floats(
            [*own.floats(), bandwidth, now > self._read_clock_after, now > self._time_links_after],
            name="ledger: standing",
        )
        standings = {rank: Standing.from_floats(row[:-3]) for rank, row in enumerate(table)}
        bandwidth, clock_is_due, links_may_be_timed = table[0][-3:]  # rank 0's, for all: they decide alike
        if self._world.num_nodes > 1:
            if clock_is_due:
                self._read_clock()
            slower = bandwidth and bandwidth < PROBE_BELOW * self._best_bandwidth
            named = clock_is_due and slow_link(self._links) is not None  # it may be well again, or was chance
            if (slower or named) and links_may_be_timed:
                self._time_links()
        self._best_bandwidth = max(self._best_bandwidth, bandwidth)
        return self._metrics(standings, bandwidth) if self._world.is_first else {}

    def close(self) -> None:
        """The last flush with all ranks, and an end to counting."""
        if self._ledger is not None:
            spans = self._ledger.flush(self._collectives if self._world.world_size > 1 else None)
            if spans:
                self._ledger.note("host", self._host.since_last())
            self._host.close()

    def _metrics(self, standings: Mapping[int, Standing], bandwidth: float) -> dict[str, Any]:
        in_flight = sum(one.in_flight for one in standings.values())
        hidden = sum(one.hidden for one in standings.values())
        self._stragglers = [*self._stragglers[-2:], find_straggler(standings, self._hosts)]
        found = steady(self._stragglers, at_least=3)
        found = found or link_straggler(self._links, standings, self._clocks.leaders, self._hosts)
        metrics: dict[str, Any] = {
            "comm": {
                "busbw_gbit": 8e-9 * bandwidth,
                "hidden_share": hidden / in_flight if in_flight > 0 else 1.0,
                "wait_for_peer_seconds": sum(one.wait_for_peer for one in standings.values()) / len(standings),
                "wire_seconds": sum(one.wire for one in standings.values()) / len(standings),
            },
            "straggler": {"rank": -1, "cause": "none", "share": 0.0},
        }
        if found is not None:
            metrics["straggler"] = {
                "rank": found.rank,
                "cause": found.cause,
                "share": found.share,
                "host": found.host,
                "detail": found.detail,
            }
        return metrics

    def _read_clock(self) -> None:
        assert self._ledger is not None
        reading = self._clocks.read()
        self._read_clock_after = time.perf_counter() + CLOCK_SECONDS
        self._ledger.offset.add(reading)
        if self._world.num_nodes > 1:
            offset, uncertainty = round(reading.offset, 9), round(reading.uncertainty, 9)
            self._ledger.note("clock", {"offset": offset, "uncertainty": uncertainty})

    def _time_links(self) -> None:
        assert self._ledger is not None
        begun = time.perf_counter()
        self._links = time_links(self._collectives, self._clocks.leaders)
        if slow_link(self._links) is not None:  # noise only ever makes a message slower
            again = time_links(self._collectives, self._clocks.leaders)
            self._links = {pair: min(seconds, again[pair]) for pair, seconds in self._links.items()}
        ended = time.perf_counter()
        self._time_links_after = ended + PROBE_PAUSE * (ended - begun)
        self.num_probes += 1
        if self._world.is_first:
            pairs = [[a, b, round(seconds, 6)] for (a, b), seconds in self._links.items()]
            self._ledger.note("links", {"leaders": self._clocks.leaders, "pairs": pairs})

    _read_clock_after = _time_links_after = 0.0
