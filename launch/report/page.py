"""Puts the report's page together: one self-contained HTML file that asks the network for nothing.

The page carries a content security policy that forbids every request, its style inline, its pictures as
inline SVG or JPEG data. It has no script.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from dist_train.ledger.summary import AttemptSummary, check_closed
from launch.report.communication import communication_markup
from launch.report.confusion import confusion_markup
from launch.report.contact_sheet import MAX_CLIPS, MAX_JPEG_BYTES, ClipImages, contact_sheet
from launch.report.curves import Figure, run_legend, training_figures
from launch.report.data import RunData, load_runs
from launch.report.document import html_document
from launch.report.facts import run_facts
from launch.report.palette import RUN_STYLES, STACK
from launch.report.tables import attempts_table, bytes_table, ledger_table, runs_table, workers_table
from launch.report.timeline import (
    bar_line,
    bytes_figures,
    num_columns,
    row_legend,
    rows_present,
    step_figures,
    wall_bars,
)
from launch.report.units import count_text, plural, rate_text, seconds_text, share_text
from launch.report.verdict import judge

TOLERANCE = 0.02


def write_report(run_dirs: list[Path], output: Path, *, clip_images: ClipImages | None = None) -> Path:
    """Writes the report of one run, or of several laid over each other, as one self-contained HTML file.

    Args: run_dirs: run folders. What a run lacks becomes a sentence on the page. output: the file; its folder
        is made. It is written aside and then renamed. clip_images: (run folder, sample id) -> uint8 frames
        [T, H, W, C] in RGB, for the contact sheet; None: no clips.

    Returns:
        `output`.

    Raises:
        ValueError: no run folder was given, or one does not exist.
        OSError: the file cannot be written.
    """
    if not run_dirs:
        raise ValueError("no run folder was given: a report needs at least one, runs/NAME")
    page = render_page(load_runs([Path(path) for path in run_dirs]), clip_images=clip_images)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        aside.write_text(page, encoding="utf-8", errors="replace")
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    return output


def render_page(runs: list[RunData], *, clip_images: ClipImages | None) -> str:
    """The page of `runs` as HTML."""
    if len(runs) == 1:
        title = str(runs[0].config.get("experiment") or runs[0].name)
        body = _run_header(runs[0], title) + _training(runs)
        body += _run_sections(runs[0], clip_images, limit=MAX_CLIPS, max_bytes=MAX_JPEG_BYTES)
    else:
        title = f"{len(runs)} runs compared"
        body = _comparison(runs, title)
        for run in runs:
            facts = run_facts(run)
            sections = _run_sections(
                run, clip_images, limit=max(6, MAX_CLIPS // len(runs)), max_bytes=MAX_JPEG_BYTES // len(runs)
            )
            body += (
                f'<div class="run"><p class="kicker">run</p><h2 class="run-name">{escape(run.name)}</h2>'
                f"{_verdict(run)}{_tiles(run)}{_facts(facts)}{_problems(run)}{sections}</div>"
            )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Written by reelscale on {written} from the run folder's ledger, metrics and predictions."
    return html_document(title, body, footer=footer)


def _run_header(run: RunData, title: str) -> str:
    return (
        f'<header><p class="kicker">reelscale run report</p><h1>{escape(title)}</h1>'
        f"{_verdict(run)}</header>{_tiles(run)}{_facts(run_facts(run))}{_problems(run)}"
    )


def _comparison(runs: list[RunData], title: str) -> str:
    keys = [
        f'<svg class="key" viewBox="0 0 34 10" aria-hidden="true"><path class="line s{index % len(RUN_STYLES)}" '
        'd="M1 5H33"/></svg>'
        for index in range(len(runs))
    ]
    names = ", ".join(run.name for run in runs)
    return (
        f'<header><p class="kicker">reelscale run report</p><h1>{escape(title)}</h1>'
        f'<p class="lede">{escape(names)}</p></header>{runs_table(runs, keys)}'
        f"{_training(runs)}{_mean_steps(runs)}"
    )


def _mean_steps(runs: list[RunData]) -> str:
    """The mean step of each run's slowest rank as stacked bars of one scale."""
    means = []
    for run in runs:
        if run.ledger is not None and run.ledger.last.num_steps:
            rank = run.ledger.last.slowest_rank
            means.append((run.name, {row: rank.step_row_seconds[row] / rank.num_steps for row in STACK}))
    if len(means) < 2:
        return ""
    scale = max(sum(mean.values()) for _, mean in means)
    bars = "".join(bar_line(name, mean, scale=scale, total=sum(mean.values())) for name, mean in means)
    rows = {row for _, mean in means for row in STACK if mean[row] > 0}
    return _section("A mean step of each run", f'{row_legend(rows)}<div class="bars">{bars}</div>')


def _verdict(run: RunData) -> str:
    if run.ledger is None:
        return '<p class="lede">No ledger was found, so nothing is known about where the time went.</p>'
    attempt = run.ledger.last
    verdict = judge(attempt)
    head, colon, tail = verdict.sentence.partition(": ")
    lede = f'<p class="lede"><b>{escape(head)}{colon}</b>{escape(tail)}</p>'
    notes = ["Shares are of the time of training steps after the first."] if attempt.num_steps else []
    exits = {rank.exit for rank in run.ledger.attempts[-1].ranks}
    if "killed" in exits:
        notes.append("The run left no last line in its ledger: it was killed, or is still running.")
    if "error" in exits:
        notes.append("The run ended with an error.")
    if "preempted" in exits:
        notes.append("The run was stopped before its last clip and can be resumed.")
    if attempt.missing_ranks:
        missing = ", ".join(str(rank) for rank in attempt.missing_ranks[:12])
        notes.append(f"No ledger of rank {missing} was found.")
    overhead = 1.0 - max(rank.span_seconds.get("step", 0.0) for rank in attempt.ranks) / attempt.wall_seconds
    if attempt.num_steps and overhead > 0.4:
        notes.append(
            f"Outside training steps (start-up, evaluation, checkpoints) passed {share_text(overhead)} of wall time."
        )
    return lede + "".join(f'<p class="note-line">{escape(note)}</p>' for note in notes)


def _tiles(run: RunData) -> str:
    tiles = []
    evaluation = run.final_evaluation
    if evaluation is not None:
        under = f"{plural(evaluation.num_samples, 'sample')}, after {count_text(evaluation.clips_seen)} clips"
        tiles.append((f"{evaluation.split} top-1", share_text(evaluation.top1), under))
        if evaluation.top5 is not None:
            under = f"of {len(run.predictions.classes)} classes" if run.predictions else "in the five most probable"
            tiles.append((f"{evaluation.split} top-5", share_text(evaluation.top5), under))
    else:
        tiles.append(("top-1", "–", "no evaluation has run yet"))
    if run.ledger is not None:
        attempt = run.ledger.last
        if attempt.num_steps:
            under = f"{plural(attempt.num_steps, 'step')} on {plural(attempt.world_size, 'rank')}"
            tiles.append(("clips/s", rate_text(attempt.clips_per_second), under))
        under = "start to exit"
        if len(run.ledger.attempts) > 1:
            under = f"{len(run.ledger.attempts)} attempts, without pauses"
        tiles.append(("wall time", seconds_text(run.ledger.wall_seconds), under))
        worst = max(attempt.ranks, key=lambda rank: rank.remainder_share)
        closed = check_closed(run.ledger, TOLERANCE).closed
        under = "rows add up on every rank" if closed else "the ledger does not close"
        tiles.append(("remainder", share_text(worst.remainder_share), under))
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(under)}</small></div>'
        for name, value, under in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _facts(facts: list[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _problems(run: RunData) -> str:
    return "".join(f'<p class="problem">{escape(problem)}</p>' for problem in run.problems)


def _training(runs: list[RunData]) -> str:
    legend = run_legend(runs) if len(runs) > 1 else ""
    return _section("Training", legend + _grid(training_figures(runs)))


def _run_sections(run: RunData, clip_images: ClipImages | None, *, limit: int, max_bytes: int) -> str:
    sections = []
    if run.ledger is not None:
        sections += [_time(run, run.ledger.last), _input(run.ledger.last)]
        sections += [_communication(run.ledger.last), _bytes(run.ledger.last)]
    if run.predictions is None:
        sections.append(_section("Predictions", "<p>There are no predictions: no final evaluation was written.</p>"))
    else:
        sheet = contact_sheet(run, run.predictions, clip_images, limit=limit, max_bytes=max_bytes)
        if run.predictions.samples:
            sections.append(_section("Confusion", confusion_markup(run.predictions)))
        sections.append(_section("Clips", sheet))
    return "".join(sections)


def _time(run: RunData, attempt: AttemptSummary) -> str:
    assert run.ledger is not None
    parts = [row_legend(rows_present(attempt)), f'<div class="bars">{wall_bars(attempt)}</div>']
    figures = step_figures(attempt)
    if figures:
        parts.append("<h3>Time per step</h3>" + _grid(figures, columns=num_columns(len(figures))))
    else:
        parts.append("<p>No training step was recorded.</p>")
    parts.append("<h3>Ledger</h3>" + ledger_table(attempt))
    parts.append(f'<p class="small">{escape(check_closed(run.ledger, TOLERANCE).describe().capitalize())}.</p>')
    attempts = attempts_table(run.ledger)
    if attempts:
        which = f"Pictures and tables show attempt {attempt.attempt}, the last that made a step."
        parts.append(f"<h3>Attempts</h3>{attempts}<p class='small'>{which}</p>")
    return _section("Where the time went", "".join(parts))


def _input(attempt: AttemptSummary) -> str:
    workers = workers_table(attempt)
    none = "<p>The ranks read, decode and augment by themselves: there are no loader workers.</p>"
    return _section("Loader workers", workers or none)


def _communication(attempt: AttemptSummary) -> str:
    body = communication_markup(attempt)
    return _section("Communication", body) if body else ""


def _bytes(attempt: AttemptSummary) -> str:
    moved = bytes_table(attempt)
    if not moved:
        return _section("Bytes", "<p>No bytes were recorded in training steps.</p>")
    return _section("Bytes", moved + _grid(bytes_figures(attempt), columns=4))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n"


def _grid(figures: Iterable[Figure], *, columns: int = 2) -> str:
    items = "".join(
        f"<figure><h4>{escape(figure.title)}</h4>{figure.markup}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    )
    return f'<div class="grid grid-{columns}">{items}</div>' if items else ""
