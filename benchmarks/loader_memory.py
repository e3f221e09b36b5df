"""Does the loader's memory grow? What each of its processes holds, over 10,000 clips.

    .venv/bin/python -m benchmarks.loader_memory shards/train --picture docs/loader-memory.svg

The split is a folder that `reelscale pack` wrote. Workers are not replaced for their memory here, so a leak would show.
What counts is what a process holds for itself, and the memory of the batches that all share.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.clips import ClipConfig
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import open_manifest
from data_shards.workers.memory import private_bytes
from launch.report.svg import Chart

_MIB = 2**20
_SHARED = "batches (shared)"
_ROWS = 11  # of the table
_SETTLED = 0.2  # of the clips: caches fill, buffers find their size


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one process held."""

    name: str
    """Which process."""
    clips: np.ndarray
    """Clips that the loader had handed out."""
    mib: np.ndarray
    """MiB then."""
    bound: float | None = None
    """MiB that it cannot exceed, where there is such a bound."""

    @property
    def growth(self) -> float:
        """MiB per 1,000 clips once settled: the least-squares line."""
        late = self.clips >= _SETTLED * self.clips[-1]
        return float(np.polyfit(self.clips[late], self.mib[late], 1)[0] * 1000)


def measure(folder: Path, clip: ClipConfig, *, num_clips: int, num_workers: int, batch_clips: int) -> list[Curve]:
    """Reads `num_clips` clips in training order, and what the processes held on the way."""
    found: dict[str, list[tuple[int, float]]] = {}
    config = LoaderConfig(num_workers=num_workers, prefetch_batches=2, worker_memory_mib=0)
    stop = -(-num_clips // batch_clips) * batch_clips
    with ClipLoader(
        open_manifest(folder), clip=clip, loader=config, training=True, global_batch_clips=batch_clips
    ) as loader:
        done = 0
        for batch in loader.batches(0, stop):
            done += len(batch)
            worker = f"worker {batch.costs['worker']:.0f}"
            found.setdefault(worker, []).append((done, batch.costs["worker_bytes"] / _MIB))
            found.setdefault("training process", []).append((done, private_bytes() / _MIB))
            found.setdefault(_SHARED, []).append((done, loader.shared_bytes / _MIB))
        bound = loader.most_shared_bytes / _MIB
    return [
        Curve(
            name=name,
            clips=np.array(points)[:, 0],
            mib=np.array(points)[:, 1],
            bound=bound if name == _SHARED else None,
        )
        for name, points in sorted(found.items())
    ]


def table(curves: Sequence[Curve], num_clips: int) -> str:
    """Markdown: MiB of each process at some points, and the growth at the end."""
    lines = [
        f"| clips | {' | '.join(curve.name for curve in curves)} |",
        f"|---:|{'---:|' * len(curves)}",
    ]
    for clips in np.linspace(0, num_clips, _ROWS):
        cells = [
            f"{curve.mib[np.searchsorted(curve.clips, clips).clip(0, len(curve.mib) - 1)]:.1f}" for curve in curves
        ]
        lines.append(f"| {clips:,.0f} | {' | '.join(cells)} |")
    ends = [f"{curve.growth:+.2f}" if curve.bound is None else f"at most {curve.bound:.1f}" for curve in curves]
    lines.append(f"| MiB per 1,000 clips | {' | '.join(ends)} |")
    return "\n".join(lines)


def picture(curves: Sequence[Curve]) -> str:
    """The curves as an SVG."""
    most = max(float(curve.mib.max()) for curve in curves)
    last = max(float(curve.clips[-1]) for curve in curves)
    chart = Chart(x=(0, last), y=(0, 1.15 * most), x_label="clips", y_label="MiB held")
    for number, curve in enumerate(curves):
        chart.line(curve.clips, curve.mib, f"c{number}", title=curve.name)
        legend = (0.68 - 0.08 * number) * chart.y[1]
        chart.dot(0.05 * last, legend, f"c{number}")
        chart.note(0.07 * last, legend - 0.015 * chart.y[1], curve.name)
    colors = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
    style = (
        "svg{font:10px sans-serif}text{fill:#5b636e}.label,.note{fill:#16191d}.grid{stroke:#e4e7eb}"
        ".axis{stroke:#8b939e}.line{fill:none;stroke-width:1.5}.dot{fill:currentColor}"
        + "".join(f".c{number}{{stroke:{color};color:{color}}}" for number, color in enumerate(colors))
    )
    drawn = chart.render("Memory of the loader's processes over the clips read")
    drawn = drawn.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * chart.width:.0f}" ', 1)
    return drawn.replace(">", f'><style>{style}</style><rect width="100%" height="100%" fill="#ffffff"/>', 1) + "\n"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path)
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-clips", type=int, default=8)
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--picture", type=Path, help="write the curves there, as SVG")
    options = parser.parse_args()
    clip = ClipConfig(crop_size=options.crop_size, short_side=max(options.crop_size, 256))
    started = time.perf_counter()
    curves = measure(
        options.split,
        clip,
        num_clips=options.clips,
        num_workers=options.workers,
        batch_clips=options.batch_clips,
    )
    elapsed = time.perf_counter() - started
    print(table(curves, options.clips))
    print(
        f"\n{options.clips:,} clips of {len(open_manifest(options.split)):,} samples, {clip.num_segments} frames at "
        f"{options.crop_size}, batches of {options.batch_clips}, {options.workers} workers, {os.cpu_count()} "
        f"processors, {elapsed:.0f} s"
    )
    if options.picture is not None:
        options.picture.write_text(picture(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
