"""Why a collective does not complete, in one sentence, from the ranks' records. Pure functions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_train.activity import Record, Ticket, process_fault, spell_ranks, spell_seconds

_NAMED = 4
"""So many ranks are described one by one."""


class CollectiveError(RuntimeError):
    """A collective that will not complete; the message is the same on every rank.

    `on_every_rank` is false on a rank that has to say it because rank 0 cannot.
    """

    consequence = False

    def __init__(self, message: str, *, on_every_rank: bool = True) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


class CollectiveTimeout(CollectiveError):
    """A rank did not come in time."""


class PeerLost(CollectiveError):
    """A rank has gone; where its own words are known, they say more."""

    consequence = True


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong."""

    message: str
    culprits: tuple[int, ...]
    """The ranks that the others wait for."""


def find_faults(
    records: Mapping[int, Record], *, node: str, earlier: Mapping[int, Record], patience_over: bool
) -> dict[int, str]:
    """Which ranks cannot go on, and why.

    Args:
        records: as just read.
        node: this process's `node_id`: it can see whether the processes of its own node run.
        earlier: as read a while ago.
        patience_over: that while was longer than ranks take between two records: who has the same one is silent.
    """
    faults = {}
    for rank, record in records.items():
        fault = None
        if record.ended is not None:
            fault = f"it ended with {record.ended}" if record.ended else "it has finished its run"
        elif node and record.node == node:
            fault = process_fault(record.pid)
        elif patience_over and rank in earlier and earlier[rank].beat == record.beat:
            fault = "no sign of life: its process is dead or stopped, or its host cannot be reached"
        if fault is not None:
            faults[rank] = fault
    return faults


def missing_ranks(records: Mapping[int, Record], world_size: int, ticket: Ticket) -> list[int]:
    """Ranks that have not started the collective `ticket`."""
    members = ticket.members or range(world_size)
    return [r for r in members if r not in records or records[r].started.get(ticket.channel, 0) < ticket.number]


def diagnose(
    records: Mapping[int, Record],
    world_size: int,
    *,
    about: Record,
    faults: Mapping[int, str],
    happened: str,
    advice: str = "",
    error: str = "",
) -> Diagnosis:
    """Says who holds up `about`, the record of a rank that waits, and what each of them was doing.

    Args:
        records: of the ranks that have left one.
        world_size: number of ranks.
        about: the rank for which this is found out; `about.waiting` is None where it is not known what it waits for.
        faults: ranks that cannot go on.
        happened: ends the clause "rank 2 ...": `did not come within 60 s`.
        advice: closes the sentence where no rank is at fault by itself.
        error: the transport's own words, where it gave any.
    """
    ticket = about.waiting
    others = {rank: record for rank, record in records.items() if rank != about.rank}
    here = ", ".join(part for part in (about.place, ticket.name if ticket else "") if part)
    here = f"{here}: " if here else ""
    behind = missing_ranks(records, world_size, ticket) if ticket else _behind(records)
    members = ticket.members if ticket and ticket.members else range(world_size)
    lost = [rank for rank in sorted(faults) if rank != about.rank and (rank in members or rank in behind)]
    # A rank that waits itself is held up too: the ones to name are those that do not.
    idle = [rank for rank in behind if rank not in records or (rank in others and records[rank].waiting is None)]
    culprits = sorted({*lost, *idle})
    waiting = [rank for rank, record in sorted(records.items()) if record.waiting and rank not in culprits]
    tail = f"; {spell_ranks(waiting)} {'waits' if len(waiting) == 1 else 'wait'}" if waiting else ""
    if culprits:
        told = "; ".join(_sentence(rank, records.get(rank), faults.get(rank)) for rank in culprits[:_NAMED])
        more = f"; likewise {spell_ranks(culprits[_NAMED:])}" if len(culprits) > _NAMED else ""
        advice = "" if lost else advice
        message = f"{here}{spell_ranks(culprits)} {happened}: {told}{more}{tail}{advice}"
        return Diagnosis(message=message, culprits=tuple(culprits))
    places = _places(records)
    if ticket and len(places) > 1:
        told = ", ".join(f"{spell_ranks(ranks)} in {place}" for place, ranks in places.items())
        message = f"{here}the ranks wait in different collectives, each for the others: {told}; {_mismatch(records)}"
        return Diagnosis(message=message, culprits=())
    reason = f" ({error})" if error else ""
    if ticket is None:  # one that PyTorch started by itself: nobody counts those, so all ranks are described
        apart = {
            (record.step, record.stage, record.code): rank for rank, record in sorted(records.items(), reverse=True)
        }
        told = "; ".join(_sentence(rank, records[rank], None) for rank in sorted(apart.values())[:_NAMED])
        return Diagnosis(message=f"{here}a collective did not complete{reason}: {told}", culprits=())
    message = f"{here}every rank has come, but it did not complete{reason}: look at the network between the hosts"
    return Diagnosis(message=f"{message}{tail}", culprits=())


def _behind(records: Mapping[int, Record]) -> list[int]:
    """Without a collective to compare by: the ranks that have started fewer than the most advanced one."""
    totals = {rank: sum(record.started.values()) for rank, record in records.items()}
    return [rank for rank, total in totals.items() if total < max(totals.values())]


def _places(records: Mapping[int, Record]) -> dict[str, Sequence[int]]:
    """Ranks by the collective that they wait in."""
    places: dict[str, list[int]] = {}
    for rank, record in sorted(records.items()):
        if record.waiting is not None:
            channel = f" of group {record.waiting.channel}" if record.waiting.channel else ""
            places.setdefault(f"{record.waiting.name} (number {record.waiting.number}{channel})", []).append(rank)
    return dict(places)


def _mismatch(records: Mapping[int, Record]) -> str:
    """Where the first rank of each place stands in the code."""
    first = {record.waiting: record for _, record in sorted(records.items(), reverse=True) if record.waiting}
    return ", ".join(
        f"rank {record.rank} is at {record.code or record.place or record.stage}"
        for record in sorted(first.values(), key=lambda record: record.rank)
    )


def _sentence(rank: int, record: Record | None, fault: str | None) -> str:
    if record is None:
        return f"rank {rank} has never reported"
    if fault is None:
        return f"{record.who} has been {record.doing} for {spell_seconds(record.doing_seconds)}"
    if record.ended is not None:
        return f"{record.who}: {fault}"
    age = max(time.time() - record.unix_seconds, 0.0)
    return f"{record.who}: {fault}; last heard of {spell_seconds(age)} ago, {record.doing}"
