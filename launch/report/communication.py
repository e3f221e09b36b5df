"""Communication in the report: each bucket's bytes, arrivals, wire time and bandwidth, and who came late."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from dist_train.ledger.communication import CollectiveTotals
from dist_train.ledger.standings import straggler_of
from dist_train.ledger.summary import AttemptSummary
from launch.report.curves import Figure
from launch.report.svg import Chart, data_range
from launch.report.tables import table
from launch.report.timeline import PANEL_WIDTHS
from launch.report.units import bytes_text, plural, rate_text, seconds_text, share_text

MAX_ROWS = 24
_CAPTION = (
    "Means over ranks and steps. Payload and bandwidths by nccl-tests' definitions. Arrival spread: from the first "
    "rank's start to the last's. Wire: from then to the result, behind the buckets before it. Hidden: share of a "
    "collective's time under way in which the rank was not blocked."
)


@dataclass(frozen=True, kw_only=True)
class CollectiveRow:
    """The collectives of one name, over all ranks."""

    name: str
    """What it is."""
    op: str
    """all_reduce, ..."""
    num_ranks: int
    """Ranks that take part in one."""
    count: int
    """How often a rank started it."""
    payload: float
    """Bytes of one."""
    spread_seconds: float
    """From the first rank's arrival to the last's, of one."""
    wire_seconds: float
    """From the last arrival to the result, of one."""
    bus_bandwidth: float
    """Bytes a second."""
    algorithm_bandwidth: float
    """Bytes a second."""
    hidden_share: float
    """Share of its time under way in which the rank was not blocked."""


@dataclass(frozen=True, kw_only=True)
class Lateness:
    """How one rank arrives at the collectives of training steps."""

    rank: int
    """Its number."""
    host: str
    """Its host."""
    late_seconds: float
    """Behind the first rank, on average."""
    early_seconds: float
    """Ahead of the last rank, on average."""
    last_share: float
    """Share of the collectives at which it was the last."""


def collective_rows(attempt: AttemptSummary) -> list[CollectiveRow]:
    """The collectives of training steps that were timed, in the order of their first start."""
    by_name: dict[str, list[CollectiveTotals]] = {}
    for rank in attempt.ranks:
        for one in rank.communication.collectives:
            if one.in_step and one.wire_seconds > 0 and one.num_bytes:
                by_name.setdefault(one.name, []).append(one)
    return [_row(name, parts) for name, parts in by_name.items()]


def _row(name: str, parts: list[CollectiveTotals]) -> CollectiveRow:
    count = sum(part.count for part in parts)
    wire = sum(part.wire_seconds for part in parts)
    under_way = wire + sum(part.early_seconds for part in parts)
    return CollectiveRow(
        name=name,
        op=parts[0].op,
        num_ranks=parts[0].num_ranks,
        count=round(count / len(parts)),
        payload=sum(part.num_bytes for part in parts) / count,
        spread_seconds=sum(part.late_seconds + part.early_seconds for part in parts) / count,
        wire_seconds=wire / count,
        bus_bandwidth=sum(part.bus_bandwidth * part.wire_seconds for part in parts) / wire,
        algorithm_bandwidth=sum(part.num_bytes for part in parts) / wire,
        hidden_share=min(sum(part.hidden_seconds for part in parts) / under_way, 1.0) if under_way > 0 else 1.0,
    )


def lateness(attempt: AttemptSummary) -> list[Lateness]:
    """Of each rank, in rank order; empty where nothing was timed."""
    found = []
    for rank in attempt.ranks:
        of_steps = [one for one in rank.communication.collectives if one.in_step and one.wire_seconds > 0]
        count = sum(one.count for one in of_steps)
        if count:
            found.append(
                Lateness(
                    rank=rank.rank,
                    host=str(rank.identity.get("host", "?")),
                    late_seconds=sum(one.late_seconds for one in of_steps) / count,
                    early_seconds=sum(one.early_seconds for one in of_steps) / count,
                    last_share=sum(one.num_last for one in of_steps) / count,
                )
            )
    return found


def straggler_sentence(attempt: AttemptSummary) -> str:
    """Who holds the others up and why, or that nobody does; "" for a world of one rank."""
    if len(attempt.ranks) < 2:
        return ""
    found = straggler_of(attempt)
    if found is None:
        return "No rank holds the others up."
    return f"{found.sentence[0].upper()}{found.sentence[1:]}."


def interface_sentence(attempt: AttemptSummary) -> str:
    """The ledger's bytes beside the network interface's own count, for the first host that counted; "" without one."""
    for rank in attempt.ranks:
        for interface in rank.communication.interfaces:
            host = rank.identity.get("host", "?")
            members = [one for one in attempt.ranks if one.identity.get("host", "?") == host]
            sent = bytes_text(sum(one.communication.sent_bytes for one in members))
            return (
                f"By the ledger {plural(len(members), 'rank')} of {host} sent {sent}; its interface {interface.name} "
                f"counted {bytes_text(interface.tx_bytes)}, with headers and whatever else the host sent."
            )
    return ""


def communication_markup(attempt: AttemptSummary) -> str:
    """The section's body; "" for a run without collectives."""
    rows, late = collective_rows(attempt), lateness(attempt)
    if not rows:
        return ""
    parts = [f"<p>{escape(straggler_sentence(attempt))}</p>", _collectives_table(rows)]
    figures = [_time_figure(rows), _bandwidth_figure(rows), _lateness_figure(late)]
    grid = "".join(
        f"<figure><h4>{escape(figure.title)}</h4>{figure.markup}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )
    if counted := interface_sentence(attempt):
        parts.append(f'<p class="small">{escape(counted)}</p>')
    parts.append(f'<h3>Buckets and ranks</h3><div class="grid grid-3">{grid}</div>')
    return "".join(parts)


def _collectives_table(rows: list[CollectiveRow]) -> str:
    shown = _largest(rows)
    body = [
        [
            f"{escape(row.name)}<small>{escape(row.op.replace('_', '-'))}</small>",
            f"{row.count:,}",
            bytes_text(row.payload),
            seconds_text(row.spread_seconds),
            seconds_text(row.wire_seconds),
            gigabits(row.algorithm_bandwidth),
            gigabits(row.bus_bandwidth),
            share_text(row.hidden_share),
        ]
        for row in shown
    ]
    left = f" The {len(rows) - len(shown)} smallest are left out." if len(rows) > len(shown) else ""
    head = ["collective", "times", "payload", "arrival spread", "wire", "algbw Gbit/s", "busbw Gbit/s", "hidden"]
    return table(head, body, caption=_CAPTION + left)


def gigabits(bandwidth: float) -> str:
    """Bytes a second as a number of Gbit/s."""
    gigabit = 8e-9 * bandwidth
    return rate_text(gigabit) if gigabit >= 0.01 else "<0.01"


def _largest(rows: list[CollectiveRow]) -> list[CollectiveRow]:
    """The largest ones by payload, in the order in which they start."""
    chosen = sorted(rows, key=lambda row: -row.payload)[:MAX_ROWS]
    return [row for row in rows if row in chosen]


def _time_figure(rows: list[CollectiveRow]) -> Figure:
    shown = _largest(rows)
    spread = np.array([row.spread_seconds for row in shown]) * 1e3
    wire = np.array([row.wire_seconds for row in shown]) * 1e3
    hidden = np.array([row.hidden_share for row in shown])
    edges = np.arange(len(shown) + 1, dtype=np.float64)
    chart = Chart(
        x=(0.0, float(len(shown))),
        y=data_range([spread + wire], zero=True),
        x_label="collective, in order of start",
        y_label="milliseconds",
        width=PANEL_WIDTHS[3],
    )
    chart.boxes(edges, np.zeros(len(shown)), spread, "r-wait_for_peer", title="arrival spread")
    chart.boxes(edges, spread, spread + wire, "r-wire", title="wire")
    mean = float(hidden.mean())
    caption = (
        f"From the first rank's start: below, until the last rank's; above, on the wire. On average {share_text(mean)} "
        "of it is hidden behind computing."
    )
    alt = ", ".join(f"{row.name} {seconds_text(row.spread_seconds + row.wire_seconds)}" for row in shown[:6])
    return Figure(title="Time of a collective", markup=chart.render(f"{caption} {alt}", x_ticks=[]), caption=caption)


def _bandwidth_figure(rows: list[CollectiveRow]) -> Figure:
    shown = _largest(rows)
    values = np.array([8e-9 * row.bus_bandwidth for row in shown])
    edges = np.arange(len(shown) + 1, dtype=np.float64)
    chart = Chart(
        x=(0.0, float(len(shown))),
        y=data_range([values], zero=True),
        x_label="collective, in order of start",
        y_label="bus bandwidth, Gbit/s",
        width=PANEL_WIDTHS[3],
        y_format=lambda value: f"{value:g}",
    )
    chart.boxes(edges, np.zeros(len(shown)), values, "r-wire", title="bus bandwidth")
    best = max(shown, key=lambda row: row.bus_bandwidth)
    caption = f"At best {gigabits(best.bus_bandwidth)} Gbit/s: {best.name}, {bytes_text(best.payload)} a piece."
    return Figure(
        title="Bus bandwidth",
        markup=chart.render(f"Bus bandwidth of each collective. {caption}", x_ticks=[]),
        caption=caption,
    )


def _lateness_figure(late: list[Lateness]) -> Figure:
    values = np.array([one.late_seconds for one in late]) * 1e3
    edges = np.arange(len(late) + 1, dtype=np.float64) - 0.5
    chart = Chart(
        x=(-0.5, len(late) - 0.5),
        y=data_range([values], zero=True),
        x_label="rank",
        y_label="milliseconds behind the first",
        width=PANEL_WIDTHS[3],
    )
    chart.boxes(edges, np.zeros(len(late)), values, "r-wait_for_peer", title="behind the first rank")
    latest = max(late, key=lambda one: one.late_seconds)
    caption = (
        f"Mean over the collectives of training steps. Rank {latest.rank} ({latest.host}) comes latest: "
        f"{seconds_text(latest.late_seconds)} behind, the last at {share_text(latest.last_share)} of them."
    )
    ticks = [float(one.rank) for one in late] if len(late) <= 8 else None
    return Figure(
        title="Lateness of each rank",
        markup=chart.render(f"Lateness of each rank. {caption}", x_ticks=ticks),
        caption=caption,
    )
