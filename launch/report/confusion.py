"""Which classes are taken for which: a matrix for up to 30 classes, the most frequent confusions for more."""

from __future__ import annotations

from html import escape

import numpy as np

from launch.report.data import Predictions
from launch.report.tables import table
from launch.report.units import plural, share_text

MAX_MATRIX_CLASSES = 30
_NUM_PAIRS = 20
_NUM_PAIRS_BESIDE = 8
_CELL = 26
_LABEL_CHARS = 24


def confusion_counts(predictions: Predictions) -> np.ndarray:
    """Samples per true class (rows) and predicted class (columns), int64 [C, C]."""
    num_classes = len(predictions.classes)
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    labels = np.array([sample.label for sample in predictions.samples], dtype=np.int64)
    guesses = np.array([sample.prediction for sample in predictions.samples], dtype=np.int64)
    np.add.at(counts, (labels, guesses), 1)
    return counts


def confusion_markup(predictions: Predictions) -> str:
    """The confusion matrix as a picture, or a table of the most frequent confusions where classes are many."""
    counts = confusion_counts(predictions)
    if len(predictions.classes) > MAX_MATRIX_CLASSES:
        return _pairs_table(predictions, counts, _NUM_PAIRS)
    num_right, num_all = int(np.trace(counts)), int(counts.sum())
    pairs = _worst_pairs(counts)
    worst = ", ".join(
        f"{predictions.classes[label]} taken for {predictions.classes[guess]} ({counts[label, guess]})"
        for label, guess in pairs[:3]
    )
    summary = f"{num_right} of {plural(num_all, 'sample')} of the {predictions.split} split right"
    caption = f"{summary}. " + (f"Most frequent: {worst}." if worst else "No class is taken for another.")
    return (
        f'<div class="beside"><figure><div class="scroll">{_matrix(predictions, counts, caption)}</div>'
        f"<figcaption>{escape(summary)}. Rows are true classes, columns predictions, numbers samples; color is the "
        "share of the row, blue where right and orange where wrong.</figcaption></figure>"
        f"<div>{_pairs_table(predictions, counts, _NUM_PAIRS_BESIDE)}</div></div>"
    )


def _matrix(predictions: Predictions, counts: np.ndarray, caption: str) -> str:
    names = [_short(name) for name in predictions.classes]
    left = 14 + 6.6 * max(len(name) for name in names)
    top = 18 + 5.4 * max(len(name) for name in names)
    side = _CELL * len(names)
    totals = counts.sum(axis=1)
    parts = []
    for row, name in enumerate(names):
        y = top + row * _CELL
        middle = y + _CELL / 2
        parts.append(f'<text x="{left - 8:.0f}" y="{middle + 4:.0f}" text-anchor="end">{escape(name)}</text>')
        x = left + row * _CELL + _CELL / 2
        parts.append(
            f'<text transform="translate({x + 3:.0f} {top - 8:.0f}) rotate(-55)" text-anchor="start">'
            f"{escape(name)}</text>"
        )
        for column in range(len(names)):
            parts.append(_cell(left + column * _CELL, y, row, column, counts, totals, names))
    width, height = left + side + 0.6 * top, top + side + 8
    return (
        f'<svg class="confusion" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="{escape(f"Confusion matrix. {caption}")}">{"".join(parts)}</svg>'
    )


def _cell(x: float, y: float, row: int, column: int, counts: np.ndarray, totals: np.ndarray, names: list[str]) -> str:
    count = int(counts[row, column])
    box = f'x="{x + 1:.0f}" y="{y + 1:.0f}" width="{_CELL - 2}" height="{_CELL - 2}" rx="2"'
    if count == 0:
        return f'<rect class="empty" {box}/>'
    share = count / totals[row]
    kind = "hit" if row == column else "miss"
    opacity = 0.15 + 0.85 * share
    words = f"{names[row]} predicted as {names[column]}: {count} of {totals[row]}"
    strong = " strong" if opacity > 0.55 else ""
    number = str(count) if count < 1000 else f"{count / 1000:.0f}k"
    return (
        f'<rect class="{kind}" {box} fill-opacity="{opacity:.2f}"><title>{escape(words)}</title></rect>'
        f'<text class="cell{strong}" x="{x + _CELL / 2:.0f}" y="{y + _CELL / 2 + 4:.0f}" text-anchor="middle">'
        f"{number}</text>"
    )


def _worst_pairs(counts: np.ndarray) -> list[tuple[int, int]]:
    off_diagonal = counts.copy()
    np.fill_diagonal(off_diagonal, 0)
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:_NUM_PAIRS]
    pairs = [divmod(int(index), len(counts)) for index in order]
    return [(label, guess) for label, guess in pairs if off_diagonal[label, guess] > 0]


def _pairs_table(predictions: Predictions, counts: np.ndarray, limit: int) -> str:
    pairs = _worst_pairs(counts)[:limit]
    if not pairs:
        return "<p>No class of the split is taken for another.</p>"
    names, totals = predictions.classes, counts.sum(axis=1)
    body = [
        [
            escape(names[label]),
            escape(names[guess]),
            f"{counts[label, guess]} of {totals[label]}",
            share_text(counts[label, guess] / totals[label]),
        ]
        for label, guess in pairs
    ]
    caption = f"Most frequent confusions among the {len(names)} classes of the {predictions.split} split."
    return table(["true class", "taken for", "samples", "share"], body, caption=caption)


def _short(name: str) -> str:
    return name if len(name) <= _LABEL_CHARS else f"{name[: _LABEL_CHARS - 1]}…"
