"""Pictures of the ledger: where the wall time went, the time per step by row, and bytes over time."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from dist_train.ledger.rows import RANK_ROWS
from dist_train.ledger.summary import BYTE_ROWS, AttemptSummary, RankSummary, StepSeries
from launch.report.curves import Figure
from launch.report.palette import FAMILIES, ROW_STYLES, STACK, STYLE_OF, row_label
from launch.report.svg import WIDTH, Chart, data_range
from launch.report.units import bytes_text, plural, seconds_text, share_text, short_count

MAX_PANELS = 8
PANEL_WIDTHS = {2: WIDTH, 3: 350.0, 4: 300.0}  # by columns of the grid, so that text keeps its size
_NUM_BARS = 72
_BYTES_TITLES = {
    "read": "Read from shards",
    "decode": "Decoded frames",
    "host_to_device": "Host to device",
    "wire": "On the wire",
}


def row_legend(rows: set[str]) -> str:
    """Names of `rows` with their colors, a group for each family."""
    groups = []
    for family in FAMILIES:
        items = "".join(
            f'<li><i class="swatch r-{style.row}"></i>{escape(style.label)}</li>'
            for style in ROW_STYLES
            if style.family == family and style.row in rows
        )
        if items:
            groups.append(f'<li class="family"><b>{family}</b><ul>{items}</ul></li>')
    return f'<ul class="legend families">{"".join(groups)}</ul>'


def rows_present(attempt: AttemptSummary) -> set[str]:
    """Rows that took any time on any rank."""
    return {row for row in STACK if any(rank.seconds[row] > 0 for rank in attempt.ranks)}


def chosen_ranks(attempt: AttemptSummary, limit: int) -> list[tuple[str, RankSummary]]:
    """All ranks with their names if they are at most `limit`, else the slowest, the median and the fastest."""
    if len(attempt.ranks) <= limit:
        return [(f"rank {rank.rank}", rank) for rank in attempt.ranks]
    by_work = sorted(attempt.ranks, key=lambda rank: rank.busy_seconds)
    picked = (("slowest", by_work[-1]), ("median", by_work[len(by_work) // 2]), ("fastest", by_work[0]))
    return [(f"rank {rank.rank}, {name}", rank) for name, rank in picked]


def num_columns(num_panels: int) -> int:
    """Columns of a grid that leave its last line as full as can be."""
    return 2 if num_panels in (1, 2, 4) else 3 if num_panels in (3, 5, 6) else 4


def stacked_bar(seconds: Mapping[str, float], *, scale: float, alt: str) -> str:
    """A horizontal bar of rows as wide as its seconds' share of `scale`."""
    parts = "".join(
        f'<span class="r-{row}" style="width:{100 * seconds[row] / scale:.3f}%" '
        f'title="{escape(row_label(row))}: {seconds_text(seconds[row])}"></span>'
        for row in STACK
        if scale > 0 and seconds.get(row, 0.0) > 0
    )
    return f'<div class="bar" role="img" aria-label="{escape(alt)}">{parts}</div>'


def wall_bars(attempt: AttemptSummary) -> str:
    """The wall time of each rank (of three, where there are many) as a stacked bar."""
    scale = max(sum(rank.seconds.values()) for rank in attempt.ranks)
    return "".join(
        bar_line(name, rank.seconds, scale=scale, total=rank.wall_seconds)
        for name, rank in chosen_ranks(attempt, MAX_PANELS)
    )


def bar_line(name: str, seconds: Mapping[str, float], *, scale: float, total: float) -> str:
    """A stacked bar with its name on the left and its total on the right."""
    largest = sorted(seconds, key=lambda row: -seconds[row])[:3]
    share = ", ".join(f"{row_label(row)} {share_text(seconds[row] / total if total else 0.0)}" for row in largest)
    alt = f"{name}: {seconds_text(total)}, most of it {share}"
    return (
        f'<div class="barline"><span class="who">{escape(name)}</span>'
        f"{stacked_bar(seconds, scale=scale, alt=alt)}"
        f'<span class="num">{seconds_text(total)}</span></div>'
    )


def step_figures(attempt: AttemptSummary) -> list[Figure]:
    """Stacked time per step against the step: one picture a rank up to 8, else slowest, median and fastest."""
    panels = [(name, rank) for name, rank in chosen_ranks(attempt, MAX_PANELS) if len(rank.steps)]
    if not panels:
        return []
    binned = [_binned(rank.steps) for _, rank in panels]
    totals = np.concatenate([seconds.sum(axis=1) for _, seconds in binned])
    # A first step that compiles or fills caches must not flatten all the others: it is cut off, and said so.
    top = float(min(totals.max(), 1.35 * np.quantile(totals, 0.95))) * 1.04 or 1.0
    width = PANEL_WIDTHS[num_columns(len(panels))]
    return [
        _step_figure(name, rank, edges, seconds, top, width)
        for (name, rank), (edges, seconds) in zip(panels, binned, strict=True)
    ]


def _binned(steps: StepSeries) -> tuple[np.ndarray, np.ndarray]:
    """Edges in steps [N + 1], and mean seconds a step per row in stacking order [N, 15]."""
    num_bins = min(len(steps), _NUM_BARS)
    starts = np.linspace(0, len(steps), num_bins + 1).astype(int)
    counts = np.add.reduceat(steps.num_steps, starts[:-1])
    seconds = np.add.reduceat(steps.seconds.astype(np.float64), starts[:-1], axis=0) / counts[:, None]
    edges = np.concatenate([[steps.step[0] - steps.num_steps[0]], steps.step[starts[1:] - 1]]).astype(np.float64)
    return edges, seconds[:, [RANK_ROWS.index(row) for row in STACK]]


def _step_figure(
    name: str, rank: RankSummary, edges: np.ndarray, seconds: np.ndarray, top: float, width: float
) -> Figure:
    unit, label = (1e3, "ms a step") if top < 1.0 else (1.0, "seconds a step")
    chart = Chart(
        x=(float(edges[0]), float(edges[-1])),
        y=(0.0, top * unit),
        x_label="step",
        y_label=label,
        width=width,
        height=0.3 * width + 90.0,
        y_format=short_count,
    )
    upper = np.cumsum(seconds, axis=1)
    for index, row in enumerate(STACK):
        mean = rank.step_row_seconds[row] / max(rank.num_steps, 1)
        lower = upper[:, index] - seconds[:, index]
        chart.boxes(
            edges, lower * unit, upper[:, index] * unit, f"r-{row}", title=f"{row_label(row)}: {seconds_text(mean)}"
        )
    totals = upper[:, -1]
    wall = rank.span_seconds.get("step", 0.0)
    shares = sorted(rank.step_row_seconds.items(), key=lambda item: -item[1])[:3]
    caption = f"Mean {seconds_text(wall / max(rank.num_steps, 1))} over {plural(rank.num_steps, 'step')}: "
    caption += ", ".join(f"{row_label(row)} {share_text(s / wall if wall else 0.0)}" for row, s in shares) + "."
    cut = np.flatnonzero(totals > top)
    if cut.size:
        at = float(edges[cut[0]] + edges[cut[0] + 1]) / 2
        chart.note(at, top * unit, "▲", anchor="middle", css="cut")
        caption += f" ▲ cut off: up to {seconds_text(float(totals.max()))}."
    return Figure(
        title=name,
        markup=chart.render(f"Stacked bars of time per step, {name}. {caption}", x_ticks=_step_ticks(edges)),
        caption=caption,
    )


def _step_ticks(edges: np.ndarray) -> list[float] | None:
    return [float(edges[-1])] if edges[-1] - edges[0] <= 1 else None


def bytes_figures(attempt: AttemptSummary) -> list[Figure]:
    """Bytes per second of all ranks against the time since the start, a picture for each kind of bytes that moved."""
    moved = [rank.steps for rank in attempt.ranks if len(rank.steps) >= 2]
    if not moved:
        return []
    first = min(float(steps.end_seconds[0] - steps.wall_seconds[0]) for steps in moved)
    last = max(float(steps.end_seconds[-1]) for steps in moved)
    num_bins = int(min(60, max(len(steps) for steps in moved) // 2 or 1))
    edges = np.linspace(first, last, num_bins + 1)
    unit, label = (60.0, "minutes since start") if last > 180 else (1.0, "seconds since start")
    figures = []
    for index, row in enumerate(BYTE_ROWS):
        rate = sum(_rate(steps, steps.num_bytes[:, index], edges) for steps in moved)
        if not isinstance(rate, np.ndarray) or not rate.any():
            continue
        scale, name = _byte_unit(float(rate.max()))
        chart = Chart(
            x=(float(edges[0]) / unit, float(edges[-1]) / unit),
            y=data_range([rate / scale], zero=True),
            x_label=label,
            y_label=f"{name}/s, all ranks",
            width=PANEL_WIDTHS[4],
            height=170.0,
        )
        chart.boxes(edges / unit, np.zeros(num_bins), rate / scale, f"r-{row}", title=STYLE_OF[row].label)
        total = sum(steps.num_bytes[:, index].sum() for steps in moved)
        caption = f"{bytes_text(total)} in training steps, {bytes_text(total / (last - first))}/s on average."
        figures.append(
            Figure(
                title=_BYTES_TITLES[row],
                markup=chart.render(f"{_BYTES_TITLES[row]}: bytes per second over time. {caption}"),
                caption=caption,
            )
        )
    return figures


def _rate(steps: StepSeries, num_bytes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Bytes per second between `edges`: what a step moved is spread evenly over its time."""
    begin = steps.end_seconds - steps.wall_seconds
    times = np.maximum.accumulate(np.stack([begin, steps.end_seconds], axis=1).ravel())
    after = np.cumsum(num_bytes)
    moved = np.stack([after - num_bytes, after], axis=1).ravel()
    return np.diff(np.interp(edges, times, moved)) / np.diff(edges)


def _byte_unit(size: float) -> tuple[float, str]:
    for scale, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return scale, name
    return 1.0, "B"
