"""`reelscale certify RUN`: reads the journals and says for each epoch whether every sample was seen exactly once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dist_train.journal import certify
from launch.parsing import parse


@dataclass(frozen=True, kw_only=True)
class Certify:
    """Counts every sample of every whole epoch of a run, over all ranks and attempts."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; exit code 1 when a sample was dropped or repeated."""
    run_dir = parse(Certify, arguments, program="reelscale certify").run_dir
    num_samples, num_epochs = _extent(run_dir)
    if num_epochs == 0:
        raise ValueError(f"{run_dir} has not finished an epoch yet")
    certificates = certify(run_dir, num_samples=num_samples, num_epochs=num_epochs)
    for epoch in certificates:
        verdict = "exactly once" if epoch.exact else "NOT exact"
        sys.stdout.write(
            f"epoch {epoch.epoch}: {epoch.num_samples} samples, {epoch.num_seen} seen, "
            f"{epoch.num_dropped} dropped, {epoch.num_repeated} repeated: {verdict}\n"
        )
    return 0 if all(epoch.exact for epoch in certificates) else 1


def _extent(run_dir: Path) -> tuple[int, int]:
    """Samples in the training split, and epochs that the run has finished."""
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        meta = json.loads(_newest_meta(run_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{run_dir} is not the folder of a run that has saved a checkpoint: {error}") from None
    num_samples = config["num_training_samples"]
    return num_samples, min(meta["clips_seen"] // num_samples, int(config["config"]["training"]["epochs"]))


def _newest_meta(run_dir: Path) -> Path:
    name = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    return run_dir / "checkpoints" / name / "meta.json"
