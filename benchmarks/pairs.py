"""Ratios of two things measured in turn: noise longer than a turn hits both, and the median drops the rest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median and quartiles of the ratios of pairs."""

    median: float
    lower: float
    """First quartile."""
    upper: float
    """Third quartile."""
    num_pairs: int

    @classmethod
    def of(cls, measured: Sequence[float], baseline: Sequence[float]) -> Self:
        """The ratios `measured[i] / baseline[i]`; needs two pairs or more."""
        ratios = [ours / theirs for ours, theirs in zip(measured, baseline, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median=median, lower=lower, upper=upper, num_pairs=len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f} to {self.upper:.3f}, {self.num_pairs} pairs)"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    seen: str
    goal: str = ""


def table(rows: Sequence[Row], *, markdown: bool) -> str:
    """The rows below each other, as Markdown or aligned for a terminal."""
    cells = [("what", "seen", "goal"), *((row.what, row.seen, row.goal) for row in rows)]
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        return "\n".join([lines[0], "|---|---|---|", *lines[1:]])
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
