"""Says in one line what holds a run back, from the rows of its training steps without the first, cold one.

Compute is what a run is for, so something else is named only when it costs `COSTS_ENOUGH` of the time of a
step: input (waiting for the loader, copying to the device), communication on the wire, waiting for a
straggler, or bookkeeping. Input and communication are means over the ranks. A straggler's cost is what the
*other* ranks wait, and it is a straggler only if it waits much less than they do; ranks that wait for each
other in turn are uneven, which no single rank causes.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from dist_train.ledger.summary import AttemptSummary, RankSummary
from launch.report.palette import STYLE_OF, row_label
from launch.report.units import seconds_text, share_text

COSTS_ENOUGH = 0.2
_INPUT = ("read", "decode", "augment", "loader_wait", "host_to_device")
_COMPUTE = ("forward", "backward", "optimizer")
_WAITING = ("wait_for_peer", "wire")

Bottleneck = Literal["compute", "input", "communication", "straggler", "uneven ranks", "bookkeeping", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What holds a run back."""

    bottleneck: Bottleneck
    """Its kind; "nothing" where no step was recorded."""
    share: float
    """Its share of the time of a step."""
    rank: int | None
    """The straggler."""
    sentence: str
    """The verdict, in one line without markup."""


def judge(attempt: AttemptSummary) -> Verdict:
    """Names what holds the attempt back; see the module's docstring for the rule."""
    ranks = [rank for rank in attempt.ranks if sum(rank.step_row_seconds.values()) > 0]
    if not ranks:
        return Verdict(
            bottleneck="nothing", share=0.0, rank=None, sentence="No training step was recorded: nothing to judge."
        )
    means = {row: fmean(_share(rank, row) for rank in ranks) for row in STYLE_OF}
    compute = sum(means[row] for row in _COMPUTE)
    slowest = max(ranks, key=lambda rank: rank.busy_seconds)
    waits = [_share(rank, "wait_for_peer") for rank in ranks if rank is not slowest]
    waiting = fmean(waits) if waits else 0.0
    costs: dict[Bottleneck, float] = {
        "input": sum(means[row] for row in _INPUT),
        "communication": means["wire"],
        "straggler": waiting,
        "bookkeeping": 1.0 - compute - sum(means[row] for row in (*_INPUT, *_WAITING)),
    }
    worst = max(costs, key=lambda kind: costs[kind])
    context = f"compute {share_text(compute)}"
    if costs[worst] < COSTS_ENOUGH:
        rest = f"I/O {share_text(costs['input'])}"
        if len(ranks) > 1:
            wire, peers = share_text(costs["communication"]), share_text(means["wait_for_peer"])
            rest += f", wire {wire}, waiting for peers {peers}"
        sentence = f"Compute holds the run back: {share_text(compute)} of step time ({rest})."
        return Verdict(bottleneck="compute", share=compute, rank=None, sentence=sentence)
    if worst == "straggler":
        return _straggler(ranks, slowest, waiting, context)
    names = {"input": "I/O holds", "communication": "Communication holds", "bookkeeping": "Bookkeeping holds"}
    rows = {
        "input": _INPUT,
        "communication": ("wire",),
        "bookkeeping": [row for row in STYLE_OF if row not in (*_COMPUTE, *_INPUT, *_WAITING)],
    }[worst]
    largest = max(rows, key=lambda row: means[row])
    of_which = (
        f"{row_label(largest)} alone {share_text(means[largest])}"
        if share_text(means[largest]) != share_text(costs[worst])
        else f"all of it {row_label(largest)}"
    )
    sentence = f"{names[worst]} the run back: {share_text(costs[worst])} of step time, {of_which} ({context})."
    return Verdict(bottleneck=worst, share=costs[worst], rank=None, sentence=sentence)


def _straggler(ranks: list[RankSummary], slowest: RankSummary, waiting: float, context: str) -> Verdict:
    own = _share(slowest, "wait_for_peer")
    if own > 0.5 * waiting:
        share = fmean(_share(rank, "wait_for_peer") for rank in ranks)
        sentence = (
            f"Uneven ranks hold the run back: they wait for each other in turn, {share_text(share)} of step time "
            f"({context})."
        )
        return Verdict(bottleneck="uneven ranks", share=share, rank=None, sentence=sentence)
    others = [rank for rank in ranks if rank is not slowest]
    excess = {row: _per_step(slowest, row) - median(_per_step(rank, row) for rank in others) for row in STYLE_OF}
    cause = max(excess, key=lambda row: excess[row])
    who = "the other rank waits" if len(others) == 1 else "the other ranks wait"
    sentence = (
        f"A straggler holds the run back: {who} {share_text(waiting)} of step time for rank {slowest.rank}, "
        f"which needs {seconds_text(excess[cause])} more a step for {row_label(cause)}."
    )
    return Verdict(bottleneck="straggler", share=waiting, rank=slowest.rank, sentence=sentence)


def _share(rank: RankSummary, row: str) -> float:
    steady = rank.steady_row_seconds
    return steady[row] / max(sum(steady.values()), 1e-12)


def _per_step(rank: RankSummary, row: str) -> float:
    return rank.steady_row_seconds[row] / max(rank.num_steps, 1)
