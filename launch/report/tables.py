"""The ledger's tables as HTML: seconds per row and rank, loader workers, bytes per clip, attempts, and runs."""

from __future__ import annotations

from html import escape
from statistics import median

from dist_train.ledger.rows import WORKER_ROWS
from dist_train.ledger.summary import BYTE_ROWS, AttemptSummary, LedgerSummary, RankSummary
from launch.report.data import RunData
from launch.report.palette import ROW_STYLES, row_label
from launch.report.timeline import MAX_PANELS
from launch.report.units import bytes_text, count_text, plural, rate_text, seconds_text, share_text

_BYTES_OF = {
    "read": "compressed video read from shards",
    "decode": "decoded frames",
    "host_to_device": "copied to the device",
    "wire": "sent by gradient exchange and other collectives",
}


_NO_SHARE = ' <span class="share"></span>'


_WORKERS_CAPTION = (
    "Seconds are summed over a rank's workers, shares are of their time. "
    "Used: frames of clips per decoded frame, above 100% where short videos repeat frames."
)


def table(head: list[str], body: list[list[str]], *, caption: str, foot: list[list[str]] | None = None) -> str:
    """An HTML table that scrolls sideways by itself. Cells are markup; the first of a row is its heading."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="scroll"><table aria-label="{escape(caption)}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{_rows(body)}</tbody>{f'<tfoot>{_rows(foot)}</tfoot>' if foot else ''}</table></div>"
        f'<p class="caption">{escape(caption)}</p>'
    )


def _rows(rows: list[list[str]]) -> str:
    return "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )


def ledger_table(attempt: AttemptSummary) -> str:
    """Seconds and share per row: a column a rank up to 8, else minimum, median, maximum and the slowest rank."""
    ranks = attempt.ranks
    styles = [
        style for style in ROW_STYLES if style.row == "remainder" or any(rank.seconds[style.row] > 0 for rank in ranks)
    ]
    labels = [f'<i class="swatch r-{style.row}"></i>{escape(style.label)}' for style in styles]
    slowest = attempt.slowest_rank
    if len(ranks) <= MAX_PANELS:
        head = ["row", *(f"rank {rank.rank}" for rank in ranks)]
        body = [
            [label, *(_seconds_and_share(rank, style.row) for rank in ranks)]
            for label, style in zip(labels, styles, strict=True)
        ]
        foot = [["wall time", *(f"<b>{_plain_seconds(rank.wall_seconds)}</b> s{_NO_SHARE}" for rank in ranks)]]
        caption = "Seconds of each rank from process start to exit, and their share of its wall time."
    else:
        head = ["row", "least", "median", "most", "median share", f"slowest: rank {slowest.rank}"]
        body = []
        for label, style in zip(labels, styles, strict=True):
            values = [rank.seconds[style.row] for rank in ranks]
            share = median(rank.seconds[style.row] / max(rank.wall_seconds, 1e-9) for rank in ranks)
            body.append(
                [
                    label,
                    *(f"{_plain_seconds(value)} s" for value in (min(values), median(values), max(values))),
                    share_text(share),
                    _seconds_and_share(slowest, style.row),
                ]
            )
        walls = [rank.wall_seconds for rank in ranks]
        cells = [f"{_plain_seconds(value)} s" for value in (min(walls), median(walls), max(walls))]
        foot = [["wall time", *cells, "", f"<b>{_plain_seconds(slowest.wall_seconds)}</b> s{_NO_SHARE}"]]
        caption = f"Seconds over {plural(len(ranks), 'rank')} from process start to exit."
    return table(head, body, foot=foot, caption=caption)


def _seconds_and_share(rank: RankSummary, row: str) -> str:
    seconds = rank.seconds[row]
    if seconds == 0:
        return f'<span class="none">·</span>{_NO_SHARE}'
    share = share_text(seconds / max(rank.wall_seconds, 1e-9))
    return f'{_plain_seconds(seconds)} s <span class="share">{share}</span>'


def _plain_seconds(seconds: float) -> str:
    """Seconds of one column: one unit and one number of decimals, so that digits line up."""
    return f"{seconds:,.2f}"


def workers_table(attempt: AttemptSummary) -> str:
    """Seconds of loader workers per rank and the frames that they decoded and used; "" without workers."""
    ranks = [rank for rank in attempt.ranks if rank.workers is not None and rank.workers.wall_seconds > 0]
    if not ranks:
        return ""
    by_wait = sorted(ranks, key=lambda rank: rank.step_row_seconds["loader_wait"])
    shown = [(f"rank {rank.rank}", rank) for rank in ranks]
    if len(ranks) > MAX_PANELS:
        picked = (("waits most", by_wait[-1]), ("median", by_wait[len(by_wait) // 2]), ("waits least", by_wait[0]))
        shown = [(f"rank {rank.rank}, {name}", rank) for name, rank in picked]
    body = []
    for name, rank in shown:
        workers = rank.workers
        assert workers is not None
        cells = [
            f'{_plain_seconds(workers.seconds[row])} s <span class="share">'
            f"{share_text(workers.seconds[row] / workers.wall_seconds)}</span>"
            for row in WORKER_ROWS
        ]
        used = workers.frames_used / workers.frames_decoded if workers.frames_decoded else 0.0
        frames = [count_text(workers.frames_decoded), count_text(workers.frames_used), share_text(used)]
        body.append([name, *cells, *frames, count_text(workers.skipped)])
    head = ["workers of", *WORKER_ROWS, "frames decoded", "frames used", "used", "samples skipped"]
    return table(head, body, caption=_WORKERS_CAPTION)


def bytes_table(attempt: AttemptSummary) -> str:
    """Bytes of training steps per clip, per step, and in total, over all ranks; "" where none moved."""
    num_steps = attempt.num_steps
    clips = attempt.ranks[0].steps.clips_per_step * num_steps
    body = []
    for index, row in enumerate(BYTE_ROWS):
        total = float(sum(rank.steps.num_bytes[:, index].sum() for rank in attempt.ranks))
        if total == 0:
            continue
        label = f'<i class="swatch r-{row}"></i>{escape(row_label(row))}<small>{_BYTES_OF[row]}</small>'
        per_clip = bytes_text(total / clips) if clips else "·"
        per_step = bytes_text(total / num_steps / len(attempt.ranks))
        body.append([label, per_clip, per_step, bytes_text(total)])
    if not body:
        return ""
    head = ["bytes", "per clip", "per step and rank", "all ranks, all steps"]
    return table(head, body, caption="Bytes moved in training steps.")


def attempts_table(ledger: LedgerSummary) -> str:
    """The starts of a run that was resumed; "" for a run of one attempt."""
    if len(ledger.attempts) < 2:
        return ""
    body = []
    for attempt in ledger.attempts:
        ends = {rank.exit for rank in attempt.ranks}
        first = [rank.steps.step[0] - rank.steps.num_steps[0] + 1 for rank in attempt.ranks if len(rank.steps)]
        last = [rank.steps.step[-1] for rank in attempt.ranks if len(rank.steps)]
        steps = f"{count_text(float(min(first)))} to {count_text(float(max(last)))}" if first else "none"
        wall = f"{_plain_seconds(attempt.wall_seconds)} s"
        body.append(
            [f"attempt {attempt.attempt}", str(attempt.world_size), steps, wall, escape(", ".join(sorted(ends)))]
        )
    return table(["start", "ranks", "steps", "wall time", "ended"], body, caption="Attempts of this run.")


def runs_table(runs: list[RunData], keys: list[str]) -> str:
    """One line a run: what it was, how well it did, how fast. `keys` are the runs' line swatches."""
    body = []
    for run, key in zip(runs, keys, strict=True):
        attempt = run.ledger.last if run.ledger else None
        evaluation = run.final_evaluation
        batch = run.setting("training", "batch_clips")
        body.append(
            [
                f"{key}{escape(run.name)}",
                escape(str(run.setting("model", "name") or "·")),
                str(attempt.world_size) if attempt else "·",
                count_text(batch) if isinstance(batch, int) else "·",
                f"{share_text(evaluation.top1)} <small>{escape(evaluation.split)}</small>" if evaluation else "·",
                share_text(evaluation.top5) if evaluation and evaluation.top5 is not None else "·",
                rate_text(attempt.clips_per_second) if attempt and attempt.num_steps else "·",
                seconds_text(run.ledger.wall_seconds) if run.ledger else "·",
            ]
        )
    head = ["run", "model", "ranks", "batch", "top-1", "top-5", "clips/s", "wall time"]
    return table(head, body, caption="The runs of this report.")
