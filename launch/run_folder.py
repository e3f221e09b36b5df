"""The run folder: claimed once, continued only on request, and told what made it.

runs/NAME/config.json  ledger/  journal/  metrics.jsonl  checkpoints/  predictions.json  report.html  logs/  wandb/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import uuid
from pathlib import Path
from typing import Any

import torch

from launch import __version__


def check_claim(run_dir: Path, *, resume: bool) -> None:
    """Refuses a folder that holds a run, unless it is to be resumed; touches nothing.

    Raises:
        ValueError: the folder holds a run (or other files) and `resume` is not set, or there is no run to resume.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run folder {run_dir} is a file: choose another with --run-dir")
    holds_run = (run_dir / "config.json").exists()
    if holds_run and not resume:
        raise ValueError(f"run folder {run_dir} exists: continue it with --resume, or choose another with --run-dir")
    if resume and not holds_run:
        raise ValueError(f"nothing to resume in {run_dir}: it holds no run (no config.json); leave out --resume")
    if not holds_run and run_dir.exists() and any(path.name != "logs" for path in run_dir.iterdir()):
        raise ValueError(f"run folder {run_dir} holds other files: choose another with --run-dir")


def claim(run_dir: Path, *, resume: bool, description: dict[str, Any]) -> tuple[int, str]:
    """Makes or reopens the folder and writes config.json; rank 0 calls it.

    Returns:
        The number of this attempt (0 for a new run) and the run's id, which stays over attempts.
    """
    check_claim(run_dir, resume=resume)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make run folder {run_dir}: {error.strerror}; choose another with --run-dir") from None
    path = run_dir / "config.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if earlier:
        _check_same_run(run_dir, earlier, description)
    attempt = earlier.get("attempt", -1) + 1
    run_id = earlier.get("run_id") or uuid.uuid4().hex[:12]
    aside = path.with_suffix(".partial")
    aside.write_text(
        json.dumps({**description, "attempt": attempt, "run_id": run_id}, indent=1) + "\n", encoding="utf-8"
    )
    aside.replace(path)
    return attempt, run_id


def _check_same_run(run_dir: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to continue a run with what would make it another: other samples, another order, another model."""
    before, after = _identity(earlier), _identity(now)
    changed = [f"{key} was {before.get(key)}, is {value}" for key, value in after.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"{run_dir} cannot be continued as another run: {'; '.join(changed)}")


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    config = description["config"]
    loader, model = config["data"]["loader"], config["model"]
    return {
        "classes": description["classes"],
        "samples of the training split": description["num_training_samples"],
        "--training.seed": config["training"]["seed"],
        "--optimizer.name": config["optimizer"]["name"],
        "--data.clip.num-segments": config["data"]["clip"]["num_segments"],
        "--data.clip.rgb-differences": config["data"]["clip"].get("rgb_differences", 0),
        **{f"--data.loader.order.{key.replace('_', '-')}": value for key, value in loader.get("order", {}).items()},
        **{f"--model.{key.replace('_', '-')}": value for key, value in model.items() if key != "weights"},
    }


def versions() -> dict[str, str]:
    """What a result depends on."""
    import av
    import numpy

    return {
        "reelscale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "av": av.__version__,
    }


def git_revision() -> str | None:
    """The revision of the source tree this package runs from, with `+dirty` when it differs; None outside git."""
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    try:
        revision = _git(home, "rev-parse", "HEAD")
        return revision + ("+dirty" if _git(home, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(home: Path, *arguments: str) -> str:
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", "-C", str(home), *arguments], capture_output=True, text=True, check=True, timeout=10, env=environ
    )
    return done.stdout.strip()
