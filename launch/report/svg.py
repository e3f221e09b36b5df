"""Small inline SVG charts: axes with round ticks, lines, points and stacked bars.

Charts carry no colors of their own: shapes have the classes of `launch.report.palette`, text and grid those
of `report.css`, so one drawing serves light, dark and print. They are drawn about as wide as a phone and
scale up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from launch.report.units import short_count

WIDTH, HEIGHT = 430.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 14.0, 26.0, 34.0


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (steps of 1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `count` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else [0.0]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def data_range(values: Sequence[np.ndarray], *, zero: bool = False) -> tuple[float, float]:
    """Smallest and largest finite value with a little air; [0, 1] without any. `zero` starts the range at 0."""
    finite = np.concatenate([array[np.isfinite(array)] for array in values] or [np.zeros(0)])
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if zero:
        low = min(low, 0.0)
    if high <= low:
        pad = abs(high) * 0.5 or 0.5
        return (low if zero and low == 0 else low - pad), high + pad
    return (low if zero else low - 0.04 * (high - low)), high + 0.06 * (high - low)


@dataclass
class Chart:
    """One chart under construction; `render` returns its markup."""

    x: tuple[float, float]
    """Range of the x axis."""
    y: tuple[float, float]
    """Range of the y axis."""
    x_label: str
    """What x is, with its unit."""
    y_label: str
    """What y is, with its unit; written above the axis."""
    width: float = WIDTH
    """Drawing units, about pixels."""
    height: float = HEIGHT
    """Drawing units, about pixels."""
    y_format: Callable[[float], str] = short_count
    """Text of a y tick."""
    x_format: Callable[[float], str] = short_count
    """Text of an x tick."""
    parts: list[str] = field(default_factory=list)
    """Markup so far."""

    def px(self, x: float) -> float:
        """Horizontal position of a value."""
        low, high = self.x
        return _LEFT + (x - low) / ((high - low) or 1.0) * (self.width - _LEFT - _RIGHT)

    def py(self, y: float) -> float:
        """Vertical position of a value."""
        low, high = self.y
        return self.height - _BOTTOM - (y - low) / ((high - low) or 1.0) * (self.height - _TOP - _BOTTOM)

    def line(self, xs: np.ndarray, ys: np.ndarray, css: str, *, title: str = "") -> None:
        """A line through the finite points; it breaks where a value is not finite."""
        commands, pen_down = [], False
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            if not (math.isfinite(x) and math.isfinite(y)):
                pen_down = False
                continue
            commands.append(f"{'L' if pen_down else 'M'}{self.px(x):.1f} {self.py(y):.1f}")
            pen_down = True
        if commands:
            self.parts.append(f'<path class="line {css}" d="{"".join(commands)}">{_title(title)}</path>')

    def dot(self, x: float, y: float, css: str, *, title: str = "", shape: str = "circle") -> None:
        """A marker: a filled "circle", or a hollow "square" or "diamond"."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        cx, cy = self.px(x), self.py(y)
        if shape == "circle":
            mark = f'<circle class="dot {css}" cx="{cx:.1f}" cy="{cy:.1f}" r="3">'
        else:
            turn = f' transform="rotate(45 {cx:.1f} {cy:.1f})"' if shape == "diamond" else ""
            size = 7.0 if shape == "diamond" else 5.6
            corner = f'x="{cx - size / 2:.1f}" y="{cy - size / 2:.1f}" width="{size}" height="{size}"'
            mark = f'<rect class="mark {css}" {corner}{turn}>'
        self.parts.append(f"{mark}{_title(title)}</{'circle' if shape == 'circle' else 'rect'}>")

    def boxes(self, edges: np.ndarray, low: np.ndarray, high: np.ndarray, css: str, *, title: str = "") -> None:
        """Bars from `low` to `high` [N] between neighboring `edges` [N + 1], as one shape."""
        commands = []
        gap = 0.8 if len(low) <= 40 else 0.0
        top = self.y[1]
        for left, right, lower, upper in zip(edges[:-1], edges[1:], low, np.minimum(high, top), strict=True):
            if upper <= lower:
                continue
            x0, x1 = self.px(left), self.px(right) - gap
            commands.append(f"M{x0:.1f} {self.py(lower):.2f}H{x1:.1f}V{self.py(upper):.2f}H{x0:.1f}z")
        if commands:
            self.parts.append(f'<path class="{css}" d="{"".join(commands)}">{_title(title)}</path>')

    def note(self, x: float, y: float, text: str, *, anchor: str = "start", css: str = "note") -> None:
        """A word at a data point."""
        at = f'x="{self.px(x):.1f}" y="{self.py(y):.1f}"'
        self.parts.append(f'<text class="{css}" {at} text-anchor="{anchor}">{escape(text)}</text>')

    def render(self, alt: str, *, x_ticks: Sequence[float] | None = None) -> str:
        """The SVG element; `alt` says in words what it shows."""
        ys = nice_ticks(*self.y, 4)
        xs = nice_ticks(*self.x, 5) if x_ticks is None else x_ticks
        right, base = self.width - _RIGHT, self.height - _BOTTOM
        grid = []
        for y in ys:
            at = self.py(y)
            grid.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
            grid.append(f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(self.y_format(y))}</text>')
        for x in xs:
            at = self.px(x)
            grid.append(f'<path class="axis" d="M{at:.1f} {base}v4"/>')
            grid.append(f'<text x="{at:.1f}" y="{base + 15}" text-anchor="middle">{escape(self.x_format(x))}</text>')
        frame = (
            f'<path class="axis" d="M{_LEFT} {base}H{right}"/>'
            f'<text class="label" x="0" y="11">{escape(self.y_label)}</text>'
            f'<text class="label" x="{right}" y="{self.height - 4}" text-anchor="end">{escape(self.x_label)}</text>'
        )
        return (
            f'<svg class="chart" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(alt)}">{"".join(grid)}{"".join(self.parts)}{frame}</svg>'
        )


def thin(values: np.ndarray, num_points: int) -> np.ndarray:
    """Means of `values` [N, ...] over about equal runs of neighbors: at most `num_points` rows. NaN is left out."""
    if len(values) <= num_points:
        return values
    starts = np.linspace(0, len(values), num_points + 1).astype(int)[:-1]
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts, axis=0)
    counts = np.add.reduceat(finite.astype(np.float64), starts, axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centered moving mean over `window` values [N], over fewer at the ends; NaN is left out of means."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
