"""Which rank holds the others up, and why, from what every rank spent in a stretch of training.

A rank is a straggler when, in a step,

1. the other ranks wait for a peer `COSTS` of the step or more (the median of the others), and `LEAST_SECONDS`;
2. it waits itself at most a third of that: ranks that are late in turn wait for each other alike; and
3. it spends more than the others (their median) on something, by half or more of what they wait.

The cause is what it spends most more on. Where that is computing, or loading without workers, the operating system's
own counts tell a core that it had to share (its main thread waited on the run queue for half of the excess or more)
and Python's garbage collector from a device that is slow. Outside steps, a rank for which the others wait
`SECTION_COSTS` of all the time in evaluation, checkpoints or logging is one too. A slow link makes everyone's wire time
long and nobody late, so it is found by timing pairs of hosts, see `slow_link`.

One stretch can be chance: callers ask for `steady`, the same rank and cause in three stretches, or half of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Literal

COSTS = 0.05
LEAST_SECONDS = 0.002
SECTION_COSTS = 0.1
LINK_WIRE_SHARE = 0.1
SECTIONS = ("evaluation", "checkpoint", "logging")

Cause = Literal["loader", "transfer", "core", "garbage collector", "device", "bookkeeping", "link"] | str

_LOADER = ("loader_wait", "read", "decode", "augment")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What one rank spent: seconds a step, means over the steps of a stretch, unless said otherwise."""

    num_steps: float = 0.0
    """Steps in the stretch."""
    wait_for_peer: float = 0.0
    wire: float = 0.0
    loader_wait: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    host_to_device: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    bookkeeping: float = 0.0
    """In steps: all other rows."""
    worker_read: float = 0.0
    worker_decode: float = 0.0
    worker_augment: float = 0.0
    run_queue: float = 0.0
    """The main thread was ready, but had no core."""
    gc: float = 0.0
    """In Python's garbage collector."""
    all_seconds: float = 0.0
    """Wall time of the stretch."""
    evaluation_peer: float = 0.0
    """In all: blocked before the last rank's arrival, in evaluation."""
    checkpoint_peer: float = 0.0
    logging_peer: float = 0.0
    in_flight: float = 0.0
    """In all: collectives of training steps under way."""
    hidden: float = 0.0
    """Of which this rank was not blocked."""

    @classmethod
    def from_floats(cls, values: Sequence[float]) -> Standing:
        """The reverse of `floats`."""
        return cls(**{field.name: value for field, value in zip(fields(cls), values, strict=True)})

    def floats(self) -> list[float]:
        """In the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def step_seconds(self) -> float:
        """A step's wall time."""
        return self.wait_for_peer + self.wire + sum(self._spent().values())

    @property
    def worker_seconds(self) -> float:
        """What the loader's workers spent for a step; 0 where the rank loads by itself."""
        return self.worker_read + self.worker_decode + self.worker_augment

    def _spent(self) -> dict[str, float]:
        return {
            "loader": sum(getattr(self, row) for row in _LOADER),
            "transfer": self.host_to_device,
            "device": self.forward + self.backward + self.optimizer,
            "bookkeeping": self.bookkeeping,
        }


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that holds the others up."""

    rank: int
    """Its number."""
    host: str
    """Its host."""
    cause: Cause
    """What it spends its time on."""
    share: float
    """Of the time of a step (outside steps: of all the time) that the others wait for it."""
    detail: str
    """The cause in words: a clause about the rank."""

    @property
    def sentence(self) -> str:
        """`rank 1 (n1) holds the others up, 23.0% of step time: its loader needs 80.1 ms more a step (decode)`."""
        return f"rank {self.rank} ({self.host}) holds the others up, {self.share:.1%} of the time: {self.detail}"


def find_straggler(standings: Mapping[int, Standing], hosts: Mapping[int, str]) -> Straggler | None:
    """The straggler of a stretch by the module's rules, the costliest where there are several; None without any."""
    if len(standings) < 2:
        return None
    suspect = min(standings, key=lambda rank: standings[rank].wait_for_peer)
    found = [_in_steps(suspect, standings, hosts.get(suspect, "?"))]
    for section in SECTIONS:
        suspect = min(standings, key=lambda rank: getattr(standings[rank], f"{section}_peer"))
        found.append(_in_section(suspect, section, standings, hosts.get(suspect, "?")))
    return max((one for one in found if one is not None), key=lambda one: one.share, default=None)


def steady(stretches: Sequence[Straggler | None], *, at_least: int) -> Straggler | None:
    """The last of those that were found in `at_least` stretches with the same rank and cause, or None."""
    named = [one for one in stretches if one is not None]
    counts = Counter((one.rank, one.cause) for one in named)
    often = [one for one in named if counts[one.rank, one.cause] >= max(at_least, 1)]
    return max(often, key=lambda one: counts[one.rank, one.cause]) if often else None


def _in_steps(rank: int, standings: Mapping[int, Standing], host: str) -> Straggler | None:
    own = standings[rank]
    others = [standing for other, standing in standings.items() if other != rank]
    waiting = median(other.wait_for_peer for other in others)
    step = median(standing.step_seconds for standing in standings.values())
    if waiting < max(COSTS * step, LEAST_SECONDS) or own.wait_for_peer > waiting / 3:
        return None
    excess = _excess(own, others)
    cause = max(excess, key=lambda name: excess[name])
    if excess[cause] < waiting / 2:
        return None
    share = waiting / step
    more = f"{excess[cause] * 1e3:.3g} ms more a step than the others"
    by_others = _not_its_own(own, others, excess[cause])
    if by_others is not None and (cause == "device" or not own.worker_seconds):
        cause, detail = by_others[0], f"it needs {more}, {by_others[1]}"
    elif cause == "loader":
        detail = f"its loader needs {more}{_loader_row(own, others)}"
    elif cause == "transfer":
        detail = f"it copies to the device for {more}"
    elif cause == "bookkeeping":
        detail = f"it spends {more} outside loading and computing"
    else:
        detail = f"it computes {more}, and not for want of a core"
    return Straggler(rank=rank, host=host, cause=cause, share=share, detail=detail)


def _excess(own: Standing, others: Sequence[Standing]) -> dict[str, float]:
    typical = [other._spent() for other in others]
    return {name: value - median(other[name] for other in typical) for name, value in own._spent().items()}


def _loader_row(own: Standing, others: Sequence[Standing]) -> str:
    """Which part of loading it is: of the rank itself, or of its workers where it only waits for them."""
    more = {row: getattr(own, row) - median(getattr(o, row) for o in others) for row in _LOADER[1:]}
    workers = {row: getattr(own, f"worker_{row}") - median(getattr(o, f"worker_{row}") for o in others) for row in more}
    for parts, where in ((more, ""), (workers, " in its workers")):
        row = max(parts, key=lambda name: parts[name])
        if parts[row] > 0.5 * (own.loader_wait if where else sum(more.values())) and parts[row] > 1e-3:
            return f" ({row}{where})"
    return ""


def _not_its_own(own: Standing, others: Sequence[Standing], excess: float) -> tuple[Cause, str] | None:
    """Where half of the excess is Python's garbage collector, or waiting for a core: that, and in words."""
    collected = own.gc - median(other.gc for other in others)
    if collected >= excess / 2:
        return "garbage collector", f"{min(collected, excess) * 1e3:.3g} ms of it in Python's garbage collector"
    queued = own.run_queue - median(other.run_queue for other in others)
    if queued >= excess / 2:
        return "core", f"{min(queued, excess) * 1e3:.3g} ms of it waiting for a core that something else uses"
    return None


def _in_section(rank: int, section: str, standings: Mapping[int, Standing], host: str) -> Straggler | None:
    waits = {other: getattr(standing, f"{section}_peer") for other, standing in standings.items()}
    waiting = median(wait for other, wait in waits.items() if other != rank)
    everything = median(standing.all_seconds for standing in standings.values())
    if not everything or waiting < SECTION_COSTS * everything or waits[rank] > waiting / 3:
        return None
    detail = f"the others wait {waiting:.3g} s of {everything:.3g} s for it in {section}"
    return Straggler(rank=rank, host=host, cause=section, share=waiting / everything, detail=detail)


Pairs = Mapping[tuple[int, int], float]
"""Seconds that a message of one size took, from one node to another."""


def slow_link(pairs: Pairs) -> tuple[tuple[int, ...], float] | None:
    """The node whose link is slow (or the two between which it is, where one pair alone is slow), and how much slower.

    Sorted by time, the pairs fall apart at the largest ratio between neighbors, if it is 2 or more; those above it are
    slow. A node is named when it is in every slow pair, and all that it sends is slow, or all that it receives. Where
    all pairs are alike, none is.
    """
    times = sorted(pairs.values())
    gaps = [after / before for before, after in itertools.pairwise(times)]
    if not gaps or max(gaps) < 2:
        return None
    cut = gaps.index(max(gaps)) + 1
    slow = {pair for pair, seconds in pairs.items() if seconds >= times[cut]}
    factor = median(times[cut:]) / median(times[:cut])
    if len(slow) == 1:
        return next(iter(slow)), factor
    for node in sorted(set.intersection(*map(set, slow))):
        for end in (0, 1):
            own = [pair for pair in pairs if pair[end] == node]
            if all(pair in slow for pair in own):
                return (node,), factor
    return None


def link_straggler(
    pairs: Pairs, standings: Mapping[int, Standing], leaders: Sequence[int], hosts: Mapping[int, str]
) -> Straggler | None:
    """The rank at the end of a slow link, where the wire takes `LINK_WIRE_SHARE` of a step or more."""
    found = slow_link(pairs)
    step = median(standing.step_seconds for standing in standings.values()) if standings else 0.0
    wire = median(standing.wire + standing.wait_for_peer for standing in standings.values()) if standings else 0.0
    if found is None or not step or wire < LINK_WIRE_SHARE * step:
        return None
    nodes, factor = found
    names = " and ".join(hosts.get(leaders[node], f"node {node}") for node in nodes)
    where = f"the link of {names}" if len(nodes) == 1 else f"the link between {names}"
    rank = leaders[nodes[0]]
    detail = f"{where} is {factor:.1f} times slower than the others'"
    return Straggler(rank=rank, host=hosts.get(rank, "?"), cause="link", share=wire / step, detail=detail)
