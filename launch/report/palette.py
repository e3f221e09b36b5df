"""Colors and names of the ledger's rows, the same in every picture and table of the report.

A row's hue is its family (compute blue, communication magenta, I/O orange, bookkeeping green, start-up and
remainder gray), its lightness tells it from its relatives. The colors were found by maximizing the smallest
OKLab distance between rows, neighbors in a stack above all, under normal vision and simulated protanopia,
deuteranopia and tritanopia (Machado, Oliveira, Fernandes 2009, severity 1), once for a white and once for a
near-black page.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.ledger.rows import RANK_ROWS

FAMILIES = ("compute", "communication", "I/O", "bookkeeping", "other")


@dataclass(frozen=True, kw_only=True)
class RowStyle:
    """How a ledger row looks."""

    row: str
    """Its name in the ledger."""
    family: str
    """One of `FAMILIES`."""
    light: str
    """Its color on a white page."""
    dark: str
    """Its color on a dark page."""

    @property
    def label(self) -> str:
        """Its name for people."""
        return row_label(self.row)


def row_label(row: str) -> str:
    """A ledger row's name for people: `host_to_device` is "host to device"."""
    return row.replace("_", " ")


# From the bottom of a stack to its top.
ROW_STYLES = tuple(
    RowStyle(row=row, family=family, light=light, dark=dark)
    for row, family, light, dark in (
        ("forward", "compute", "#71b5f2", "#84cbfd"),
        ("backward", "compute", "#267bb9", "#3b88d4"),
        ("optimizer", "compute", "#033894", "#2d4692"),
        ("wait_for_peer", "communication", "#c194b6", "#f5a6d2"),
        ("wire", "communication", "#b52a73", "#b250a0"),
        ("read", "I/O", "#eaa78e", "#ebcfb9"),
        ("decode", "I/O", "#6c2303", "#c18660"),
        ("augment", "I/O", "#98724d", "#6a4d17"),
        ("loader_wait", "I/O", "#f8910f", "#ff9c41"),
        ("host_to_device", "I/O", "#726500", "#917b02"),
        ("checkpoint", "bookkeeping", "#004636", "#00ac9e"),
        ("evaluation", "bookkeeping", "#709883", "#397456"),
        ("logging", "bookkeeping", "#326150", "#75c1a1"),
        ("startup", "other", "#b5bfc9", "#505561"),
        ("remainder", "other", "#242933", "#f2f2f2"),
    )
)
STYLE_OF = {style.row: style for style in ROW_STYLES}
STACK = tuple(style.row for style in ROW_STYLES)
assert set(STACK) == set(RANK_ROWS), "every ledger row needs a style"

# Runs laid over each other; they also differ in dash pattern. (light, dark, stroke-dasharray)
RUN_STYLES = (
    ("#0b62b0", "#6cb6ff", ""),
    ("#c4500a", "#ff9d57", "7 3"),
    ("#00735c", "#3fcfae", "2 3"),
    ("#a02a7a", "#f08fd0", "9 3 2 3"),
    ("#6b5900", "#d9c24a", "4 2"),
    ("#4a4f57", "#b8bfc8", "12 4"),
)


def color_css() -> str:
    """CSS custom properties and fill classes (`.r-forward`, `.s0`) of all rows and runs, for both color schemes."""
    light = [f"--r-{style.row}:{style.light}" for style in ROW_STYLES]
    dark = [f"--r-{style.row}:{style.dark}" for style in ROW_STYLES]
    light += [f"--s{index}:{style[0]}" for index, style in enumerate(RUN_STYLES)]
    dark += [f"--s{index}:{style[1]}" for index, style in enumerate(RUN_STYLES)]
    fills = [f".r-{row}{{fill:var(--r-{row});background:var(--r-{row})}}" for row in STACK]
    strokes = [
        f".s{index}{{stroke:var(--s{index});color:var(--s{index})"
        + (f";stroke-dasharray:{dashes}" if dashes else "")
        + "}"
        for index, (_, _, dashes) in enumerate(RUN_STYLES)
    ]
    return (
        f":root{{{';'.join(light)}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}\n" + "\n".join(fills + strokes)
    )
