"""Report and ledger of a run: joins the run folder with the clips it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.clips import ClipConfig, read_clip
from data_shards.manifest import open_manifest
from data_shards.storage import below
from dist_train.ledger.summary import read_ledger
from launch.console import ProgressLine, console
from launch.report import write_report
from launch.report.terminal import ledger_view


def report_runs(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes the HTML report of one or more runs to `output` and returns it."""
    for run_dir in run_dirs:
        if not (run_dir / "config.json").exists():
            raise ValueError(f"{run_dir} is not a run folder: it has no config.json")
    with ProgressLine("report", unit="runs"):
        return write_report(list(run_dirs), output, clip_images=clip_images)


def print_ledger(run_dir: Path) -> None:
    """Prints where the run's time and bytes went."""
    console().print(ledger_view(read_ledger(run_dir)))


def clip_images(run_dir: Path, sample_id: int) -> np.ndarray:
    """The frames of an evaluation sample as the model saw them: uint8 `[T, H, W, C]`."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["config"]["data"]
    manifest = open_manifest(below(config["root"], config["evaluation_split"]), check_shards=False)
    clip, _ = read_clip(manifest, sample_id, clip=_clip_config(config["clip"]), training=False, seed=0, epoch=0)
    return clip.permute(0, 2, 3, 1).numpy()


def _clip_config(plain: dict[str, Any]) -> ClipConfig:
    """A `ClipConfig` back from JSON, as far as a single evaluation view goes: the rest is left out."""
    known = ("num_segments", "sampling", "dense_window_frames", "crop_size", "short_side", "test_crop_size")
    return ClipConfig(**{name: plain[name] for name in known if name in plain})
