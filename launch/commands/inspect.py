"""`reelscale inspect DST`: what a packed set holds, in the terminal and as a page with a contact sheet."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data_shards.durable import write_atomically
from data_shards.inspection import Histogram, SetFacts, SplitFacts, inspect_set, sample_frames
from launch.console import ProgressLine, console
from launch.parsing import parse
from launch.report.set_page import render_set_page
from launch.report.units import bytes_text, count_text, seconds_text

_BAR = 32  # columns
_CLASSES_SHOWN = 24
_SIZES_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Shows classes, sizes and durations of a packed set, and writes a page with a contact sheet."""

    root: Annotated[Path, tyro.conf.Positional]
    """A packed set (a folder of splits), or one split."""
    output: Path | None = None
    """The page to write; inspect.html in the set's folder unless given."""
    clips: int = 48
    """Samples on the contact sheet; 0 writes no page."""

    def __post_init__(self) -> None:
        if self.clips < 0:
            raise ValueError(f"clips is {self.clips}, give 0 or more")


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    command = parse(Inspect, arguments, program="reelscale inspect")
    facts = inspect_set(command.root)
    console().print(set_view(facts))
    if command.clips:
        output = command.output or command.root / "inspect.html"
        done = 0
        with ProgressLine("contact sheet", unit="samples") as progress:

            def frames_of(split: SplitFacts, sample_id: int) -> np.ndarray:
                nonlocal done
                done += 1
                progress.update(done, max(command.clips, done))
                return sample_frames(split.manifest, sample_id)

            page = render_set_page(facts, sample_frames=frames_of, limit=command.clips)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page.encode("utf-8", errors="replace"))
        sys.stdout.write(f"contact sheet: {output}\n")
    return 0


def set_view(facts: SetFacts) -> RenderableType:
    """The facts as something that rich prints, 80 columns wide at most."""
    parts: list[RenderableType] = [Text(f"{facts.root}: {len(facts.classes):,} classes", style="bold")]
    parts += [_splits(facts), *_classes(facts)]
    for spread in facts.histograms:
        parts += _histogram(spread)
    sizes = ", ".join(f"{size} ({count_text(count)})" for size, count in facts.sizes[:_SIZES_SHOWN])
    more = f" and {len(facts.sizes) - _SIZES_SHOWN:,} more" if len(facts.sizes) > _SIZES_SHOWN else ""
    parts.append(Text(f"pictures: {sizes}{more}"))
    parts += [Text(f"note: {note}", style="yellow") for note in facts.notes]
    return Group(*parts)


def _splits(facts: SetFacts) -> Table:
    table = _table()
    for name in ("split", "form"):
        table.add_column(name, no_wrap=True)
    for name in ("samples", "classes", "shards", "bytes", "duration"):
        table.add_column(name, justify="right", no_wrap=True)
    for split in facts.splits:
        table.add_row(
            split.manifest.split,
            split.manifest.form,
            count_text(len(split.manifest)),
            count_text(int((split.class_counts > 0).sum())),
            count_text(len(split.manifest.shards)),
            bytes_text(split.num_bytes),
            seconds_text(split.seconds) if split.seconds else "",
        )
    return table


def _classes(facts: SetFacts) -> list[RenderableType]:
    """All classes, or the largest and the smallest of many."""
    counts = np.stack([split.class_counts for split in facts.splits], axis=1)
    totals = counts.sum(axis=1)
    order = list(range(len(facts.classes)))
    title = "Samples of each class"
    if len(order) > _CLASSES_SHOWN:
        by_size = np.argsort(-totals, kind="stable").tolist()
        order = by_size[: _CLASSES_SHOWN // 2] + by_size[-_CLASSES_SHOWN // 2 :]
        title = f"Samples of the {_CLASSES_SHOWN // 2} largest and smallest of {len(totals):,} classes"
    table = _table()
    table.add_column("class", no_wrap=True, max_width=24)
    for split in facts.splits:
        table.add_column(split.manifest.split, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for place, label in enumerate(order):
        bar = "█" * max(round(_BAR * totals[label] / max(totals.max(), 1) * 0.6), int(totals[label] > 0))
        ends = len(order) < len(totals) and place == _CLASSES_SHOWN // 2 - 1
        table.add_row(facts.classes[label], *map(count_text, counts[label]), bar, end_section=ends)
    return [Text(title, style="bold"), table]


def _histogram(spread: Histogram) -> list[RenderableType]:
    if len(spread.counts) == 1:
        return [Text(f"{spread.name}: {spread.median:.6g} {spread.unit} for every sample")]
    title = f"{spread.name} in {spread.unit}: {spread.least:.4g} to {spread.most:.4g}, median {spread.median:.4g}"
    table = _table(show_header=False)
    for _ in range(2):
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for label, count in _bins(spread):
        bar = "█" * max(round(_BAR * count / max(int(spread.counts.max()), 1)), int(count > 0))
        table.add_row(label, count_text(count), bar)
    return [Text(title, style="bold"), table]


def _bins(spread: Histogram) -> Iterator[tuple[str, int]]:
    """Each bin's words and count; the first and last say that they take in what lies beyond."""
    last = len(spread.counts) - 1
    for number, count in enumerate(spread.counts.tolist()):
        low, high = spread.edges[number], spread.edges[number + 1]
        words = f"{low:.5g} to {high:.5g}"
        if number == last and spread.most > high:
            words = f"{low:.5g} and more"
        elif number == 0 and spread.least < low:
            words = f"below {high:.5g}"
        yield words, count


def _table(*, show_header: bool = True) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, show_header=show_header, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True
    )
