"""Where metrics go on rank 0: `metrics.jsonl`, Weights & Biases, and the console."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.jsonlines import JsonLines
from launch.config import MonitorConfig
from launch.console import ProgressLine


class MetricsFile:
    """Appends metrics to `run_dir/metrics.jsonl`."""

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / "metrics.jsonl")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line, at once in the hands of the operating system."""
        self._lines.write(metrics)
        self._lines.flush()


class ConsoleMonitor:
    """Shows the latest loss and accuracy beside the progress bar."""

    def __init__(self, progress: ProgressLine) -> None:
        self._progress = progress
        self._shown: dict[str, str] = {}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Updates what stands beside the bar."""
        if "loss" in metrics:
            self._shown["loss"] = f"{metrics['loss']:.3f}"
            self._shown["clips/s"] = f"{metrics['clips_per_second']:.0f}"
            slow = metrics.get("straggler", {})
            self._shown["slow"] = f"rank {slow['rank']} ({slow['cause']})" if slow.get("rank", -1) >= 0 else ""
        evaluation = metrics.get("evaluation")
        if evaluation:
            self._shown[f"{evaluation['split']} top-1"] = f"{100 * evaluation['top1']:.1f} %"
        self._progress.annotate("  ".join(f"{name} {value}" for name, value in self._shown.items() if value))


class WandbMonitor:
    """Weights & Biases: metrics and the ledger's rows against clips seen; one run over all attempts.

    The run's id is the run folder's, so a run that is resumed or requeued goes on in the same wandb run. Offline (the
    default) nothing leaves the machine until `wandb sync runs/NAME/wandb/offline-*`.
    """

    def __init__(self, run_dir: Path, config: MonitorConfig, *, run_id: str, name: str, settings: Any) -> None:
        import wandb  # only here: it takes a second, and many runs do without

        if config.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            raise ValueError(
                "monitor.wandb is online but there is no key: run `wandb login`, or use --monitor.wandb offline"
            )
        self._run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=run_id,
            dir=str(run_dir),
            mode="online" if config.wandb == "online" else "offline",
            config=settings,
            resume="allow" if config.wandb == "online" else None,
            settings=wandb.Settings(console="off", x_disable_stats=True, silent=True),
        )
        self._run.define_metric("clips_seen")
        self._run.define_metric("*", step_metric="clips_seen")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Flattens nested metrics to `a/b` names."""
        self._run.log(_flatten(metrics), step=int(metrics["step"]))

    def close(self, exit_code: int = 0) -> None:
        """Waits until wandb has written what it holds."""
        self._run.finish(exit_code=exit_code)


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
