"""Pictures of training against clips seen: loss, accuracy, learning rate, throughput; runs are laid over each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import numpy as np

from launch.report.data import Curve, Evaluation, RunData
from launch.report.palette import RUN_STYLES
from launch.report.svg import Chart, data_range, smooth, thin
from launch.report.units import plural, rate_text, share_text

_NUM_POINTS = 400
_SMOOTH_FROM = 60  # records: below, the line itself is readable


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its words."""

    title: str
    """Above the picture."""
    markup: str
    """The picture; empty where there is nothing to draw."""
    caption: str
    """Below the picture: what it says, or why there is none. Plain text."""


def training_figures(runs: list[RunData]) -> list[Figure]:
    """Loss, accuracy, learning rate and throughput of `runs`."""
    return [
        _loss(runs),
        _accuracy(runs),
        _curve_figure(
            runs,
            title="Learning rate",
            label="learning rate",
            pick=lambda curve: curve.learning_rate,
            number=lambda value: f"{value:.3g}",
        ),
        _curve_figure(
            runs, title="Throughput", label="clips/s", pick=lambda curve: curve.clips_per_second, number=rate_text
        ),
    ]


def run_legend(runs: list[RunData]) -> str:
    """Names of the runs, each with its line."""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 34 10" aria-hidden="true"><path class="line {_style(index)}" d="M1 5H33"/>'
        f"</svg>{escape(run.name)}</li>"
        for index, run in enumerate(runs)
    )
    return f'<ul class="legend">{items}</ul>'


def _style(index: int) -> str:
    return f"s{index % len(RUN_STYLES)}"


def _clips_axis(runs: list[RunData]) -> tuple[float, float]:
    seen = [run.curve.clips_seen for run in runs]
    seen += [np.array([float(evaluation.clips_seen) for evaluation in run.evaluations]) for run in runs]
    return 0.0, max(data_range(seen, zero=True)[1] / 1.06, 1.0)


def _loss(runs: list[RunData]) -> Figure:
    curves = [run.curve for run in runs]
    lengths = [len(curve) for curve in curves]
    if not any(np.isfinite(curve.loss).any() for curve in curves):
        return Figure(title="Loss", markup="", caption="No training loss has been logged yet.")
    losses = [thin(curve.loss, _NUM_POINTS) for curve in curves]
    smoothed = max(lengths) >= _SMOOTH_FROM
    chart = Chart(x=_clips_axis(runs), y=data_range(losses, zero=True), x_label="clips seen", y_label="training loss")
    words = []
    for index, (run, losses_of_run) in enumerate(zip(runs, losses, strict=True)):
        clips = thin(run.curve.clips_seen, _NUM_POINTS)
        if smoothed and len(losses_of_run) >= _SMOOTH_FROM:
            if len(runs) == 1:
                chart.line(clips, losses_of_run, f"{_style(index)} faint")
            losses_of_run = smooth(losses_of_run, max(3, len(losses_of_run) // 30))
        chart.line(clips, losses_of_run, _style(index), title=run.name)
        _only_dot(chart, clips, losses_of_run, index)
        finite = losses_of_run[np.isfinite(losses_of_run)]
        if finite.size:
            last = f", {finite[-1]:.3g} at last" if finite.size > 1 else ""
            words.append(f"{_prefix(runs, run)}{finite[0]:.3g} at first{last}")
    diverged = [run.name for run in runs if len(run.curve) and not np.isfinite(run.curve.loss[-1])]
    caption = f"Loss: {'; '.join(words)}." + (" The line is a moving mean of the logged values." if smoothed else "")
    if diverged:
        caption += f" Training diverged ({', '.join(diverged)}): the last loss is not a finite number."
    return Figure(title="Loss", markup=chart.render(f"Line chart of training loss. {caption}"), caption=caption)


def _accuracy(runs: list[RunData]) -> Figure:
    if not any(run.evaluations for run in runs):
        return Figure(title="Accuracy", markup="", caption="No evaluation has run yet.")
    chart = Chart(
        x=_clips_axis(runs),
        y=(0.0, 1.0),
        x_label="clips seen",
        y_label="accuracy",
        y_format=lambda share: f"{share * 100:.0f}%",
    )
    words = []
    for index, run in enumerate(runs):
        for split in dict.fromkeys(evaluation.split for evaluation in run.evaluations):
            of_split = [evaluation for evaluation in run.evaluations if evaluation.split == split]
            _accuracy_lines(chart, of_split, index, f"{_prefix(runs, run)}{split}", with_top5=len(runs) == 1)
            last = of_split[-1]
            top5 = "" if last.top5 is None else f", top-5 {share_text(last.top5)}"
            words.append(f"{_prefix(runs, run)}{split} top-1 {share_text(last.top1)}{top5}")
    marks = "Filled dots are top-1" + (", squares top-5." if len(runs) == 1 else ".")
    caption = f"{marks} Last: {'; '.join(words)}."
    return Figure(title="Accuracy", markup=chart.render(f"Line chart of accuracy. {caption}"), caption=caption)


def _accuracy_lines(chart: Chart, of_split: list[Evaluation], index: int, name: str, *, with_top5: bool) -> None:
    clips = np.array([float(evaluation.clips_seen) for evaluation in of_split])
    for kind in ("top5", "top1") if with_top5 else ("top1",):
        values = [getattr(evaluation, kind) for evaluation in of_split]
        shares = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        css = f"{_style(index)} {'second' if kind == 'top5' else ''}".strip()
        chart.line(clips, shares, css, title=f"{name} {kind}")
        marked = range(len(clips)) if len(clips) <= 40 else (len(clips) - 1,)
        for point in marked:
            label = f"{name} {kind.replace('top', 'top-')} {share_text(float(shares[point]))}"
            shape = "circle" if kind == "top1" else "square"
            chart.dot(float(clips[point]), float(shares[point]), css, title=label, shape=shape)


def _curve_figure(
    runs: list[RunData],
    *,
    title: str,
    label: str,
    pick: Callable[[Curve], np.ndarray],
    number: Callable[[float], str],
) -> Figure:
    values = [pick(run.curve) for run in runs]
    if not any(np.isfinite(array).any() for array in values):
        return Figure(title=title, markup="", caption=f"No {title.lower()} has been logged yet.")
    chart = Chart(
        x=_clips_axis(runs),
        y=data_range([thin(array, _NUM_POINTS) for array in values], zero=True),
        x_label="clips seen",
        y_label=label,
    )
    words = []
    for index, (run, array) in enumerate(zip(runs, values, strict=True)):
        clips = thin(run.curve.clips_seen, _NUM_POINTS)
        chart.line(clips, thin(array, _NUM_POINTS), _style(index), title=run.name)
        _only_dot(chart, clips, array, index)
        finite = array[np.isfinite(array)]
        if finite.size:
            words.append(
                f"{_prefix(runs, run)}median {number(float(np.median(finite)))}, largest {number(float(finite.max()))}"
            )
    num_records = max(len(array) for array in values)
    caption = f"{title}: {'; '.join(words)} ({plural(num_records, 'record')})."
    return Figure(title=title, markup=chart.render(f"Line chart. {caption}"), caption=caption)


def _only_dot(chart: Chart, clips: np.ndarray, values: np.ndarray, index: int) -> None:
    """A line through one point is invisible: mark it."""
    if np.isfinite(values).sum() == 1:
        point = int(np.flatnonzero(np.isfinite(values))[0])
        chart.dot(float(clips[point]), float(values[point]), _style(index))


def _prefix(runs: list[RunData], run: RunData) -> str:
    return f"{run.name} " if len(runs) > 1 else ""
