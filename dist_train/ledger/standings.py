"""The straggler of a run that has ended (or is running), from its ledger's files."""

from __future__ import annotations

import itertools
import math

import numpy as np

from dist_train.ledger.rows import RANK_ROWS
from dist_train.ledger.stragglers import (
    SECTIONS,
    Standing,
    Straggler,
    find_straggler,
    link_straggler,
    steady,
)
from dist_train.ledger.totals import AttemptSummary, RankSummary

_MAX_STRETCHES = 8
_STEPS_OF_A_STRETCH = 5
_NAMED = [row for row in RANK_ROWS if row in Standing.__dataclass_fields__]


def straggler_of(attempt: AttemptSummary) -> Straggler | None:
    """The rank that held the others up for at least half of the attempt, or outside its steps; None without one.

    The steps, without the first, are cut into up to eight stretches of five or more; two at least have to agree, so a
    run of few steps names nobody for what happened in them.
    """
    ranks = [rank for rank in attempt.ranks if rank.num_steps]
    if len(ranks) < 2:
        return None
    hosts = {rank.rank: str(rank.identity.get("host", "?")) for rank in ranks}
    num_points = min(len(rank.steps) for rank in ranks)
    first = 1 if num_points >= 2 * _STEPS_OF_A_STRETCH else 0
    num_stretches = max(1, min(_MAX_STRETCHES, (num_points - first) // _STEPS_OF_A_STRETCH))
    cuts = np.linspace(first, num_points, num_stretches + 1).astype(int).tolist()
    stretches = [
        find_straggler({rank.rank: _in_steps(rank, begin, end) for rank in ranks}, hosts)
        for begin, end in itertools.pairwise(cuts)
    ]
    often = steady(stretches, at_least=max(2, math.ceil(num_stretches / 2)))
    whole = {rank.rank: _in_steps(rank, first, num_points) for rank in ranks}
    overall = find_straggler(whole, hosts)
    if often is not None and overall is not None and (overall.rank, overall.cause) == (often.rank, often.cause):
        often = overall
    sections = find_straggler({rank.rank: _outside_steps(rank) for rank in ranks}, hosts)
    links = {(a, b): seconds for rank in ranks for a, b, seconds in rank.communication.links}
    leaders = next((rank.communication.leaders for rank in ranks if rank.communication.leaders), ())
    found = [often, sections, link_straggler(links, whole, leaders, hosts)]
    return max((one for one in found if one is not None), key=lambda one: one.share, default=None)


def _in_steps(rank: RankSummary, begin: int, end: int) -> Standing:
    """Of the points `begin` to `end` of its series; the host's counts are means over the whole attempt."""
    steps, all_steps = rank.steps, max(rank.num_steps, 1)
    count = max(int(steps.num_steps[begin:end].sum()), 1)
    seconds = dict(zip(RANK_ROWS, (steps.seconds[begin:end].sum(axis=0) / count).tolist(), strict=True))
    workers = dict(rank.workers.seconds) if rank.workers is not None else {}
    return Standing(
        num_steps=count,
        **{row: seconds[row] for row in _NAMED},
        bookkeeping=sum(value for row, value in seconds.items() if row not in _NAMED),
        **{f"worker_{row}": workers.get(row, 0.0) / all_steps for row in ("read", "decode", "augment")},
        run_queue=rank.communication.run_queue_seconds / all_steps,
        gc=rank.communication.gc_seconds / all_steps,
    )


def _outside_steps(rank: RankSummary) -> Standing:
    """Waits in evaluation, checkpoints and logging; in those that came once only, nothing says what is usual."""
    peers = dict.fromkeys(SECTIONS, 0.0)
    for one in rank.communication.collectives:
        if one.row in peers and one.count > 1:
            peers[one.row] += one.peer_seconds
    wall = rank.wall_seconds - rank.span_seconds.get("startup", 0.0)
    return Standing(all_seconds=wall, **{f"{section}_peer": seconds for section, seconds in peers.items()})
