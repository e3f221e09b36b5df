"""The sample order: what a look-up costs at 10^9 samples, and what a block shuffle gives up and saves.

    .venv/bin/python -m benchmarks.order --markdown
    .venv/bin/python -m benchmarks.order shuffle --picture docs/block-shuffle.svg

`lookup`: microseconds and bytes of every kind of order, beside a table that holds a permutation.

`shuffle`: a set of Kinetics' size, 240,000 samples of 400 classes in 960 shards, one epoch of each block shuffle:

- distance: between the laws of the gap |id - next id|, the largest difference of the two distribution functions
  (Kolmogorov and Smirnov), against a full shuffle's, whose gaps follow 1 - (1 - x)^2 of the set. 0 is a full shuffle,
  1 the order of storage.
- together: how often two neighbours of the storage meet in one batch.
- design effect (Kish, "Survey sampling", 1965): variance of the classes' shares in a batch over that of independent
  draws. A batch of B clips says as much as B / design effect independent ones. The worst case is a set stored class by
  class; one that is stored shuffled, as `reelscale pack` does, has 1 at any block size.
- reads: runs of neighbours, each one read of the storage, for 1,000 clips when a window is read ahead.
- shards: that a window lies in, so how many are open at a time; and that one batch lies in.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.order import sample_at
from data_shards.sample_order import BalancedOrder, EpochOrder, OrderConfig, SampleOrder, make_order
from launch.report.palette import RUN_STYLES
from launch.report.svg import Chart

NUM_SAMPLES, NUM_CLASSES, SAMPLES_PER_SHARD, BATCH = 240_000, 400, 250, 256
WINDOWS = (4_096, 16_384, 65_536)
BLOCKS = (1, 4, 16, 64, 256, 1_024, 4_096)
BILLION = 10**9


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("lookup", "shuffle", "all"), default="all")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--picture", type=Path, help="write the figure of the block shuffle to this SVG file")
    options = parser.parse_args(arguments)
    if options.part != "shuffle":
        print(table(LOOKUP_COLUMNS, lookup_rows(), markdown=options.markdown), end="\n\n")
    if options.part != "lookup":
        found = shuffles()
        print(table(SHUFFLE_COLUMNS, [shuffle.row() for shuffle in found], markdown=options.markdown))
        if options.picture:
            options.picture.write_text(picture(found), encoding="utf-8")


# -- look-ups ------------------------------------------------------------------------------------------------------

LOOKUP_COLUMNS = ("order", "samples", "us a batch of 64", "us a sample of 65,536", "bytes held", "bytes of a look-up")


def lookup_rows(*, num_samples: int = BILLION, table_samples: int = 10**7, repeats: int = 30) -> list[tuple[str, ...]]:
    """One row for each kind of order."""
    kinds: dict[str, tuple[int, SampleOrder]] = {
        "full shuffle": (num_samples, _epochs(num_samples)),
        "blocks of 1,000, 16 a window": (num_samples, _epochs(num_samples, block_samples=1_000)),
        "pad": (num_samples, _epochs(num_samples, tail="pad")),
        "mixture of 3 sets": (num_samples, _mixture(num_samples)),
        f"{NUM_CLASSES} classes, balanced": (
            NUM_SAMPLES,
            BalancedOrder(np.arange(NUM_SAMPLES) % NUM_CLASSES, seed=0),
        ),
    }
    rows = []
    for name, (size, order) in kinds.items():
        start = size * 9 // 10  # as in a resume late in an epoch
        batch, bulk = np.arange(start, start + 64), np.arange(start, start + 65_536)
        rows.append(
            (
                name,
                f"{size:,}",
                f"{_microseconds(lambda order=order, batch=batch: order.at(batch), repeats):,.0f}",
                f"{_microseconds(lambda order=order, bulk=bulk: order.at(bulk), 5) / len(bulk):.3f}",
                f"{len(pickle.dumps(order)):,}",
                f"{_peak_bytes(lambda order=order, batch=batch: order.at(batch)):,}",
            )
        )
    return [*rows, _table_row(table_samples)]


def _epochs(num_samples: int, **config: object) -> EpochOrder:
    return EpochOrder(num_samples, OrderConfig(**config), seed=0, global_batch_clips=64)  # type: ignore[arg-type]


def _mixture(num_samples: int) -> SampleOrder:
    sizes = (num_samples // 10 * 7, num_samples // 10 * 2, num_samples // 10)
    labels = [np.broadcast_to(np.int32(0), size) for size in sizes]
    return make_order(labels, OrderConfig(), seed=0, global_batch_clips=64, shares=(0.5, 0.3, 0.2))


def _table_row(num_samples: int) -> tuple[str, ...]:
    """What a loader does that draws a permutation of the set at the start of an epoch."""
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    drawn = generator.permutation(num_samples)
    seconds = time.perf_counter() - started
    batch = np.arange(num_samples // 2, num_samples // 2 + 64)
    return (
        f"a table, drawn in {seconds:.2f} s an epoch",
        f"{num_samples:,}",
        f"{_microseconds(lambda: drawn[batch], 30):.1f}",
        "",
        f"{drawn.nbytes:,}",
        "",
    )


def _microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e6


def _peak_bytes(call: Callable[[], object]) -> int:
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- block shuffles ------------------------------------------------------------------------------------------------

SHUFFLE_COLUMNS = (
    "window",
    "block",
    "distance",
    "together",
    "design effect, by class",
    "design effect, as packed",
    "reads for 1,000 clips",
    "shards a window",
    "shards a batch",
)


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """What one epoch of a block shuffle is like."""

    window_samples: int
    """Samples that are mixed with each other; 0: the whole set, a full shuffle."""
    block_samples: int
    """Neighbours that stay in one window; 0: a full shuffle."""
    distance: float
    """Of its gaps from a full shuffle's, 0 to 1."""
    together: float
    """Share of the neighbours that meet in one batch."""
    design_effect: float
    """Of a batch, where the set is stored class by class."""
    design_effect_packed: float
    """Of a batch, where the set is stored shuffled."""
    reads: float
    """Runs of neighbours for 1,000 clips, a window read ahead."""
    shards_a_window: float
    """Shards that a window lies in."""
    shards_a_batch: float
    """Shards that a batch lies in."""

    def row(self) -> tuple[str, ...]:
        """For the table."""
        return (
            f"{self.window_samples:,}" if self.window_samples else "all",
            f"{self.block_samples:,}" if self.block_samples else "full shuffle",
            f"{self.distance:.4f}",
            f"{self.together:.2%}",
            f"{self.design_effect:.2f}",
            f"{self.design_effect_packed:.2f}",
            f"{self.reads:,.1f}",
            f"{self.shards_a_window:,.0f}",
            f"{self.shards_a_batch:,.0f}",
        )


def shuffles(windows: Sequence[int] = WINDOWS, blocks: Sequence[int] = BLOCKS) -> list[Shuffle]:
    """A full shuffle, then each window at each size of its blocks."""
    return [measure(0, 0), *(measure(window, block) for window in windows for block in blocks)]


def measure(
    window: int,
    block: int,
    *,
    num_samples: int = NUM_SAMPLES,
    num_classes: int = NUM_CLASSES,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    batch: int = BATCH,
) -> Shuffle:
    """One epoch of the shuffle; `window` samples in blocks of `block`, or 0, 0."""
    order = sample_at(
        np.arange(num_samples),
        seed=1,
        num_samples=num_samples,
        block_samples=block,
        window_blocks=max(window // block, 1) if block else 1,
    )
    by_class = np.arange(num_samples) * num_classes // num_samples
    packed = np.random.default_rng(0).permutation(by_class)
    batches = order[: num_samples // batch * batch].reshape(-1, batch)
    read_ahead = window or batch * 64  # a full shuffle has no window: as much as the middle one of the others
    windows = np.sort(order[: num_samples // read_ahead * read_ahead].reshape(-1, read_ahead), axis=1)
    return Shuffle(
        window_samples=window,
        block_samples=block,
        distance=gap_distance(order),
        together=float((np.diff(np.argsort(order) // batch) == 0).mean()),
        design_effect=design_effect(by_class[batches], num_classes),
        design_effect_packed=design_effect(packed[batches], num_classes),
        reads=float((1 + (np.diff(windows, axis=1) > 1).sum(axis=1)).mean()) / read_ahead * 1000,
        shards_a_window=_distinct(windows // samples_per_shard),
        shards_a_batch=_distinct(np.sort(batches // samples_per_shard, axis=1)),
    )


def gap_distance(order: np.ndarray) -> float:
    """Largest difference of the distribution function of the gaps of `order` (a permutation) to a full shuffle's.

    Two different samples of n, drawn at random, are at most d apart with probability 1 - (1 - d/n)(1 - d/(n-1)).
    """
    n = len(order)
    counts = np.bincount(np.abs(np.diff(order)), minlength=n)
    gaps = np.arange(n)
    expected = 1 - (1 - gaps / n) * (1 - gaps / (n - 1))
    return float(np.abs(counts.cumsum() / (n - 1) - expected).max())


def design_effect(labels: np.ndarray, num_classes: int) -> float:
    """Variance of the classes' shares in the rows of `labels` (batches, B), over that of draws without order."""
    num_batches, batch = labels.shape
    rows = np.arange(num_batches)[:, None] * num_classes
    shares = np.bincount((rows + labels).ravel(), minlength=num_batches * num_classes)
    shares = shares.reshape(num_batches, num_classes) / batch
    overall = np.bincount(labels.ravel(), minlength=num_classes) / labels.size
    independent = overall * (1 - overall) / batch * (1 - batch / labels.size)
    return float(((shares - overall) ** 2).mean(axis=0).sum() / independent.sum())


def _distinct(rows: np.ndarray) -> float:
    """Mean number of different values in sorted rows."""
    return float((1 + (np.diff(rows, axis=1) > 0).sum(axis=1)).mean())


# -- output --------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Rows below each other, as Markdown or aligned for a terminal."""
    cells = [tuple(columns), *rows]
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in cells]
        return "\n".join([lines[0], "|---" + "|---:" * (len(columns) - 1) + "|", *lines[1:]])
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def picture(found: Sequence[Shuffle]) -> str:
    """What a block shuffle gives up and saves, against the size of a block, one line a window: SVG."""
    full, *blocks = found
    charts = [
        _chart(
            blocks, full, "design_effect", f"design effect of a batch of {BATCH}, stored class by class", (-0.3, 6.0)
        ),
        _chart(blocks, full, "shards_a_window", "shards open at a time: those that a window lies in", (3.0, 10.5)),
        _chart(blocks, full, "reads", "reads for 1,000 clips, a window read ahead", (-3.0, 11.0), labelled=False),
    ]
    width, height = 440, 252
    placed = "".join(
        chart.replace("<svg ", f'<svg x="5" y="{place * height + 4}" width="{width - 10}" height="{height - 12}" ', 1)
        for place, chart in enumerate(charts)
    )
    lines = "".join(f".s{number}{{stroke:{light};color:{light}}}" for number, (light, _, _) in enumerate(RUN_STYLES))
    style = (
        "svg{font:10px sans-serif}text{fill:#5b636e}.label,.note{fill:#16191d}.grid{stroke:#e4e7eb}"
        ".axis{stroke:#cfd4da}.line{fill:none;stroke-width:1.6}.dot{fill:currentColor;stroke:none}"
        f".full{{stroke:#4a4f57;stroke-dasharray:4 3}}{lines}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * 3}" width="{width * 2}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#ffffff"/>{placed}</svg>\n'
    )


def _chart(
    blocks: Sequence[Shuffle], full: Shuffle, name: str, label: str, y: tuple[float, float], *, labelled: bool = True
) -> str:
    """Both axes in powers of two; without `labelled` the lines are too close to each other for their names."""
    chart = Chart(x=(0.0, 13.4), y=y, x_label="samples of a block", y_label=label, x_format=_power, y_format=_power)
    for number, window in enumerate(sorted({shuffle.window_samples for shuffle in blocks})):
        line = [shuffle for shuffle in blocks if shuffle.window_samples == window]
        xs = np.log2([shuffle.block_samples for shuffle in line])
        ys = np.log2([getattr(shuffle, name) for shuffle in line])
        chart.line(xs, ys, f"s{number}", title=f"window of {window:,} samples")
        for place, value in zip(xs.tolist(), ys.tolist(), strict=True):
            chart.dot(place, value, f"s{number}")
        if labelled:
            chart.note(float(xs[-1]) + 0.15, float(ys[-1]), f"{window:,}")
    level = float(np.log2(getattr(full, name)))
    chart.line(np.array(chart.x), np.array([level, level]), "full", title="full shuffle")
    chart.note(chart.x[1] - 0.1, level + 0.02 * (y[1] - y[0]), "full shuffle", anchor="end")
    return chart.render(f"{label}, against the samples of a block", x_ticks=range(0, 13, 2))


def _power(exponent: float) -> str:
    value = 2.0**exponent
    return f"{value:,.0f}" if value >= 1 else f"1/{1 / value:,.0f}"


if __name__ == "__main__":
    main()
