"""The ledger in the terminal: tables that fit 80 columns (rows, loader workers, collectives), and a line of verdict.

    Console().print(ledger_view(read_ledger(run_dir)))

Up to three ranks have a column each; more are shown as least, median and most, with the slowest rank named.
"""

from __future__ import annotations

from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dist_train.ledger.rows import REMAINDER, WORKER_ROWS
from dist_train.ledger.summary import (
    BYTE_ROWS,
    AttemptSummary,
    LedgerSummary,
    WorkerTotals,
    check_closed,
)
from launch.report.communication import (
    collective_rows,
    gigabits,
    interface_sentence,
    lateness,
    straggler_sentence,
)
from launch.report.palette import STACK, STYLE_OF, row_label
from launch.report.units import bytes_text, count_text, plural, seconds_text, share_text
from launch.report.verdict import judge

MAX_RANK_COLUMNS = 3
MAX_COLLECTIVES = 12
TOLERANCE = 0.02
_COLORS = {
    "compute": "blue",
    "communication": "magenta",
    "I/O": "yellow",
    "bookkeeping": "green",
    "other": "bright_black",
}


def ledger_view(summary: LedgerSummary, *, attempt: AttemptSummary | None = None) -> RenderableType:
    """The ledger of one attempt (the last by default) as something that rich prints, 80 columns wide at most."""
    attempt = attempt or summary.last
    parts: list[RenderableType] = [_rows_table(attempt)]
    workers = [rank.workers for rank in attempt.ranks if rank.workers is not None and rank.workers.wall_seconds > 0]
    if workers:
        parts += [_workers_table(workers), Text(_frames_line(workers))]
    if read := _tiers_line(attempt):
        parts.append(Text(read))
    parts += _communication(attempt)
    parts.append(Text(_remainder_line(summary, attempt)))
    parts.append(Text(judge(attempt).sentence, style="bold"))
    return Group(*parts)


def _rows_table(attempt: AttemptSummary) -> Table:
    which = f", attempt {attempt.attempt}" if attempt.attempt else ""
    ranks, steps = plural(len(attempt.ranks), "rank"), plural(attempt.num_steps, "step")
    heading = f"Ledger in seconds: {ranks}, {steps}{which}"
    table = _empty_table(heading)
    table.add_column("row", no_wrap=True)
    longest = max(rank.wall_seconds for rank in attempt.ranks)
    decimals = 2 if longest < 1e3 else 1 if longest < 1e4 else 0
    few = len(attempt.ranks) <= MAX_RANK_COLUMNS
    slowest = attempt.slowest_rank
    if few:
        for rank in attempt.ranks:
            table.add_column(f"rank {rank.rank}", justify="right", no_wrap=True)
            table.add_column("share", justify="right", no_wrap=True)
    else:
        for name in ("least", "median", "most", "share", f"rank {slowest.rank}"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for row in STACK:
        num_bytes = sum(rank.num_bytes[row] for rank in attempt.ranks) if row in BYTE_ROWS else 0
        if row != REMAINDER and not num_bytes and not any(rank.seconds[row] for rank in attempt.ranks):
            continue
        values = [rank.seconds[row] for rank in attempt.ranks]
        cells = _per_rank(attempt, row, decimals) if few else _spread(attempt, values, row, decimals)
        label = Text.assemble(("■ ", _COLORS[STYLE_OF[row].family]), row_label(row))
        table.add_row(label, *cells, bytes_text(num_bytes) if num_bytes else "", end_section=row == REMAINDER)
    walls = [rank.wall_seconds for rank in attempt.ranks]
    if few:
        total = [cell for wall in walls for cell in (_seconds(wall, decimals), "")]
    else:
        total = [_seconds(value, decimals) for value in (min(walls), median(walls), max(walls))]
        total += ["", _seconds(slowest.wall_seconds, decimals)]
    table.add_row("wall time", *total, "", style="bold")
    if not few:
        table.caption = f"share: the median's; rank {slowest.rank} is the slowest"
        table.caption_justify = "left"
    return table


def _empty_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        collapse_padding=True,
    )


def _per_rank(attempt: AttemptSummary, row: str, decimals: int) -> list[str]:
    cells = []
    for rank in attempt.ranks:
        seconds = rank.seconds[row]
        cells += [_seconds(seconds, decimals), _share(seconds, rank.wall_seconds) if seconds else ""]
    return cells


def _spread(attempt: AttemptSummary, values: list[float], row: str, decimals: int) -> list[str]:
    wall = median(rank.wall_seconds for rank in attempt.ranks)
    middle, slowest = median(values), attempt.slowest_rank.seconds[row]
    cells = [_seconds(value, decimals) for value in (min(values), middle, max(values))]
    return [*cells, _share(middle, wall) if middle else "", _seconds(slowest, decimals)]


def _workers_table(workers: list[WorkerTotals]) -> Table:
    wall = sum(worker.wall_seconds for worker in workers)
    table = _empty_table("Loader workers, all ranks")
    table.add_column("row", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for row in WORKER_ROWS:
        seconds = sum(worker.seconds[row] for worker in workers)
        table.add_row(row, seconds_text(seconds), _share(seconds, wall))
    return table


def _communication(attempt: AttemptSummary) -> list[RenderableType]:
    """Buckets, how late ranks come, the interface's own count, and the straggler; nothing without collectives."""
    rows, late = collective_rows(attempt), lateness(attempt)
    if not rows:
        return []
    table = _empty_table("Collectives of training steps, mean of one")
    table.add_column("name", max_width=25, no_wrap=True, overflow="ellipsis")
    for name in ("times", "payload", "spread", "wire", "Gbit/s", "hidden"):
        table.add_column(name, justify="right", no_wrap=True)
    largest = sorted(rows, key=lambda row: -row.payload * row.count)[:MAX_COLLECTIVES]
    for row in (row for row in rows if row in largest):
        times = (seconds_text(row.spread_seconds), seconds_text(row.wire_seconds))
        busbw, hidden = gigabits(row.bus_bandwidth), share_text(row.hidden_share)
        table.add_row(row.name, f"{row.count:,}", bytes_text(row.payload), *times, busbw, hidden)
    if len(rows) > len(largest):
        table.caption, table.caption_justify = f"and {len(rows) - len(largest)} smaller ones", "left"
    parts: list[RenderableType] = [table]
    latest = sorted(late, key=lambda one: -one.late_seconds)[:MAX_RANK_COLUMNS]
    said = ", ".join(
        f"rank {one.rank} by {seconds_text(one.late_seconds)} (last {share_text(one.last_share)})" for one in latest
    )
    parts.append(Text(f"Latest to arrive, behind the first: {said}"))
    if counted := interface_sentence(attempt):
        parts.append(Text(counted))
    parts.append(Text(straggler_sentence(attempt), style="bold"))
    return parts


def _tiers_line(attempt: AttemptSummary) -> str:
    """What was read from which tier of storage, and the readers' time for it; "" where the loader does not say."""
    loaders = [rank.workers for rank in attempt.ranks if rank.workers is not None]
    said = []
    for tier in dict.fromkeys(tier for loader in loaders for tier in loader.tier_bytes):
        num_bytes = sum(loader.tier_bytes.get(tier, 0) for loader in loaders)
        seconds = sum(loader.tier_seconds.get(tier, 0.0) for loader in loaders)
        said.append(f"{bytes_text(num_bytes)} from {tier} in {seconds_text(seconds)}")
    return f"Read {', '.join(said)}" if said else ""


def _frames_line(workers: list[WorkerTotals]) -> str:
    decoded, used = sum(w.frames_decoded for w in workers), sum(w.frames_used for w in workers)
    skipped = sum(worker.skipped for worker in workers)
    line = f"{plural(decoded, 'frame')} decoded, {count_text(used)} used ({_share(used, decoded) or '0.0%'})"
    return f"{line}, {plural(skipped, 'sample')} skipped"


def _remainder_line(summary: LedgerSummary, attempt: AttemptSummary) -> str:
    check = check_closed(summary, TOLERANCE)
    worst = max(attempt.ranks, key=lambda rank: rank.remainder_share)
    num_open = sum(not rank.closed for rank in check.ranks if rank.attempt == attempt.attempt)
    said = (
        f"{num_open} of {plural(len(attempt.ranks), 'rank')} above {TOLERANCE:.0%}: the ledger does not close."
        if num_open
        else "the rows add up to the wall time on every rank."
    )
    return f"Remainder at most {share_text(worst.remainder_share)} (rank {worst.rank}): {said}"


def _seconds(seconds: float, decimals: int) -> str:
    return f"{seconds:,.{decimals}f}" if seconds else "·"


def _share(part: float, whole: float) -> str:
    return share_text(part / whole) if whole > 0 else ""
