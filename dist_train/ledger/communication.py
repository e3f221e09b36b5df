"""A run's communication as the ledger's files tell it: totals per collective, host counters, the straggler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.ledger.bandwidth import bus_bytes
from dist_train.ledger.rows import TRAINING_ROWS

_SUMS = ("count", "bytes", "last", "sent", "late", "early", "wire", "hidden", "peer")


@dataclass(frozen=True, kw_only=True)
class CollectiveTotals:
    """One rank's collectives of one name, summed over an attempt; see `flights` for what is measured."""

    name: str
    """What it is: "main bucket 3"."""
    op: str
    """all_reduce, all_gather, ...; `exchange` has several stages."""
    row: str
    """The ledger's row in which it was first started."""
    num_ranks: int
    """Ranks that took part."""
    count: int
    """How often."""
    num_bytes: int
    """Payload."""
    sent_bytes: int
    """What the algorithm sent from this rank, without the transport's headers."""
    num_last: int
    """How often this rank was the last to arrive."""
    late_seconds: float
    """Behind the first rank's arrival."""
    early_seconds: float
    """Ahead of the last rank's arrival."""
    wire_seconds: float
    """From the last arrival to the result."""
    hidden_seconds: float
    """Part of `early_seconds + wire_seconds` in which this rank was not blocked."""
    peer_seconds: float
    """Part of the wait for it that was before the last rank's arrival."""

    @property
    def in_step(self) -> bool:
        """True for collectives of training steps, False for those of start-up, evaluation, checkpoints and logging."""
        return self.row in TRAINING_ROWS

    @property
    def algorithm_bandwidth(self) -> float:
        """Payload over wire time, in bytes a second (nccl-tests' algbw); 0 where nothing was timed."""
        return self.num_bytes / self.wire_seconds if self.wire_seconds > 0 else 0.0

    @property
    def bus_bandwidth(self) -> float:
        """nccl-tests' busbw in bytes a second: algbw times a factor of the operation and the number of ranks."""
        entry = {"op": self.op, "ranks": self.num_ranks, "bytes": self.num_bytes, "sent": self.sent_bytes}
        return bus_bytes([entry]) / self.wire_seconds if self.wire_seconds > 0 else 0.0

    @property
    def hidden_share(self) -> float:
        """Share of its time under way in which this rank was not blocked; 1 where it took none."""
        under_way = self.early_seconds + self.wire_seconds
        return min(self.hidden_seconds / under_way, 1.0) if under_way > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class InterfaceTotals:
    """What a host's network interface moved while a rank trained, by its own counters; headers included."""

    name: str
    """Its name; "infiniband" for all InfiniBand ports."""
    tx_bytes: int
    rx_bytes: int
    tx_packets: int = 0
    rx_packets: int = 0


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What one rank's file says of communication, and of what the operating system counted."""

    collectives: tuple[CollectiveTotals, ...] = ()
    """By name, in the order of their first launch."""
    wire_seconds: float = 0.0
    """Time in which at least one collective of a training step was on the wire."""
    run_queue_seconds: float = 0.0
    """The main thread was ready to run and had no core."""
    cpu_seconds: float = 0.0
    """CPU time of the process."""
    gc_seconds: float = 0.0
    """In Python's garbage collector."""
    num_switches: int = 0
    """Involuntary context switches."""
    interfaces: tuple[InterfaceTotals, ...] = ()
    """Of the host, where this rank is the one of its node that counts."""
    clock_uncertainty_seconds: float = 0.0
    """The largest uncertainty of this host's clock against rank 0's."""
    leaders: tuple[int, ...] = ()
    """One rank of each node, where links were timed."""
    links: tuple[tuple[int, int, float], ...] = ()
    """The last timing of the links: from node, to node, seconds."""

    @property
    def sent_bytes(self) -> int:
        """What all collectives sent from this rank, without headers."""
        return sum(one.sent_bytes for one in self.collectives)


class CommunicationTotals:
    """Grows a `Communication` line by line."""

    kinds = frozenset(("collectives", "host", "clock", "links"))

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {}
        self._host = dict.fromkeys(("run_queue", "cpu", "gc", "switches"), 0.0)
        self._interfaces: dict[str, dict[str, int]] = {}
        self._wire_seconds = self._uncertainty = 0.0
        self._leaders: Sequence[int] = ()
        self._links: Sequence[Sequence[float]] = ()

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes a line of one of `kinds`."""
        if line["kind"] == "collectives":
            self._wire_seconds += float(line["wire_seconds"])
            for name, entry in line["of"].items():
                total = self._entries.setdefault(
                    name, {key: entry[key] for key in ("op", "row", "ranks")} | dict.fromkeys(_SUMS, 0)
                )
                for key in _SUMS:
                    total[key] += entry.get(key, 0)
        elif line["kind"] == "host":
            for key in self._host:
                self._host[key] += float(line.get(key, 0))
            for key in ("interface", "infiniband"):
                if key in line:
                    counts = {name: value for name, value in line[key].items() if name != "name"}
                    total = self._interfaces.setdefault(line[key].get("name", key), dict.fromkeys(counts, 0))
                    for name, value in counts.items():
                        total[name] += int(value)
        elif line["kind"] == "clock":
            self._uncertainty = max(self._uncertainty, float(line["uncertainty"]))
        else:
            self._leaders, self._links = line["leaders"], line["pairs"]

    def finish(self) -> Communication:
        """All of it."""
        return Communication(
            collectives=tuple(_totals(name, entry) for name, entry in self._entries.items()),
            wire_seconds=self._wire_seconds,
            run_queue_seconds=self._host["run_queue"],
            cpu_seconds=self._host["cpu"],
            gc_seconds=self._host["gc"],
            num_switches=int(self._host["switches"]),
            interfaces=tuple(InterfaceTotals(name=name, **counts) for name, counts in self._interfaces.items()),
            clock_uncertainty_seconds=self._uncertainty,
            leaders=tuple(int(rank) for rank in self._leaders),
            links=tuple((int(a), int(b), float(seconds)) for a, b, seconds in self._links),
        )


def _totals(name: str, entry: Mapping[str, Any]) -> CollectiveTotals:
    return CollectiveTotals(
        name=name,
        op=str(entry["op"]),
        row=str(entry["row"]),
        num_ranks=int(entry["ranks"]),
        count=int(entry["count"]),
        num_bytes=int(entry["bytes"]),
        sent_bytes=int(entry["sent"]),
        num_last=int(entry["last"]),
        late_seconds=float(entry["late"]),
        early_seconds=float(entry["early"]),
        wire_seconds=float(entry["wire"]),
        hidden_seconds=float(entry["hidden"]),
        peer_seconds=float(entry["peer"]),
    )
