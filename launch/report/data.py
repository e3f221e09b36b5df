"""Loads a run folder for the report: what is there, and a plain sentence for each part that is not.

A run may have been killed, may have had no evaluation yet, or be one step long. Only a folder that does not
exist is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.ledger.summary import LedgerSummary, read_ledger

MAX_POINTS = 1000  # of a rank's series: the pictures draw fewer


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What rank 0 logged in training, N records in order; NaN where a record lacks the value."""

    step: np.ndarray
    """Step, float64 [N]."""
    clips_seen: np.ndarray
    """Clips seen, float64 [N]."""
    loss: np.ndarray
    """Loss, float64 [N]; not finite where training diverged."""
    learning_rate: np.ndarray
    """Learning rate, float64 [N]."""
    clips_per_second: np.ndarray
    """Throughput of all ranks, float64 [N]."""

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation."""

    step: int
    """After this step."""
    clips_seen: int
    """After this many clips."""
    split: str
    """Of this split."""
    top1: float
    """Share of samples whose most probable class is right."""
    top5: float | None
    """Share of samples whose class is among the five most probable."""
    num_samples: int
    """Samples counted."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One predicted sample."""

    sample_id: int
    """Its number in the split's manifest."""
    key: str
    """Its key in the shards."""
    label: int
    """Index of the true class."""
    prediction: int
    """Index of the predicted class."""
    probability: float
    """Probability that the model gives its prediction."""

    @property
    def right(self) -> bool:
        """True if the prediction is the true class."""
        return self.label == self.prediction


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of the last evaluation."""

    split: str
    """Of this split."""
    classes: tuple[str, ...]
    """Names of the classes."""
    samples: tuple[Sample, ...]
    """In the order of the file."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """All that the report knows about a run."""

    path: Path
    """The run folder."""
    name: str
    """Its name on the page, unique among the runs of the report."""
    config: Mapping[str, Any]
    """`config.json`, empty if there is none."""
    curve: Curve
    """Training records."""
    evaluations: tuple[Evaluation, ...]
    """In order."""
    predictions: Predictions | None
    """Of the last evaluation."""
    ledger: LedgerSummary | None
    """Seconds and bytes."""
    problems: tuple[str, ...]
    """A sentence for each file that is damaged."""

    def setting(self, *names: str) -> Any:
        """The value at `config.json`'s "config" / names[0] / names[1] ..., or None."""
        value: Any = self.config.get("config")
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    @property
    def final_evaluation(self) -> Evaluation | None:
        """The last evaluation, of the test split if there was one."""
        tests = [evaluation for evaluation in self.evaluations if evaluation.split == "test"]
        candidates = tests or list(self.evaluations)
        return candidates[-1] if candidates else None


def load_run(path: Path, *, name: str | None = None) -> RunData:
    """Reads the run folder `path`.

    Raises:
        ValueError: there is no such folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no run folder at {path}: give the folder that `reelscale train` made, runs/NAME")
    problems: list[str] = []
    records = _metrics(path / "metrics.jsonl", problems)
    ledger = None
    if any((path / "ledger").glob("rank_*.jsonl")):
        try:
            ledger = read_ledger(path, max_points=MAX_POINTS)
        except (ValueError, OSError) as error:
            problems.append(f"The ledger cannot be read: {error}")
    config = _object(path / "config.json", problems)
    return RunData(
        path=path,
        name=name or path.resolve().name,
        config=config,
        curve=_curve(records),
        evaluations=_evaluations(records, problems),
        predictions=_predictions(path / "predictions.json", problems),
        ledger=ledger,
        problems=tuple(problems),
    )


def load_runs(paths: list[Path]) -> list[RunData]:
    """Loads several run folders; folders of the same name are told apart by their parents' names."""
    names = [Path(path).resolve().name for path in paths]
    return [
        load_run(path, name=name if names.count(name) == 1 else f"{Path(path).resolve().parent.name}/{name}")
        for path, name in zip(paths, names, strict=True)
    ]


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{path.name} cannot be read: it holds no JSON object")
        return {}
    return found


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Records in order of steps. Of a resumed run's attempts the later one's record of a step wins."""
    kept: dict[tuple[float, str], dict[str, Any]] = {}
    num_damaged = 0
    if path.exists():
        with path.open("rb") as file:
            for raw in file:
                try:
                    record = json.loads(raw)
                    evaluation = record.get("evaluation")
                    key = (float(record["step"]), str(evaluation.get("split")) if evaluation else "")
                except (ValueError, KeyError, TypeError, AttributeError):
                    num_damaged += bool(raw.strip())
                    continue
                kept[key] = record
    if num_damaged > 1:  # one is what a kill leaves behind
        problems.append(f"{num_damaged} lines of {path.name} cannot be read and are left out.")
    return [kept[key] for key in sorted(kept)]


def _curve(records: list[dict[str, Any]]) -> Curve:
    training = [record for record in records if "loss" in record]
    columns = {
        name: np.array([_number(record.get(name)) for record in training], dtype=np.float64)
        for name in ("step", "clips_seen", "loss", "learning_rate", "clips_per_second")
    }
    return Curve(**columns)


def _evaluations(records: list[dict[str, Any]], problems: list[str]) -> tuple[Evaluation, ...]:
    found = []
    for record in records:
        evaluation = record.get("evaluation")
        if not isinstance(evaluation, dict) or "top1" not in evaluation:
            continue
        try:
            found.append(
                Evaluation(
                    step=int(record["step"]),
                    clips_seen=int(record.get("clips_seen", 0)),
                    split=str(evaluation.get("split", "val")),
                    top1=float(evaluation["top1"]),
                    top5=None if evaluation.get("top5") is None else float(evaluation["top5"]),
                    num_samples=int(evaluation.get("num_samples", 0)),
                )
            )
        except (TypeError, ValueError) as error:
            problems.append(f"An evaluation in metrics.jsonl cannot be read: {error}")
    return tuple(found)


def _predictions(path: Path, problems: list[str]) -> Predictions | None:
    content = _object(path, problems)
    if not content:
        return None
    try:
        classes = tuple(str(name) for name in content["classes"])
        samples = tuple(
            Sample(
                sample_id=int(sample["sample_id"]),
                key=str(sample.get("key", sample["sample_id"])),
                label=int(sample["label"]),
                prediction=int(sample["prediction"]),
                probability=_number(sample.get("probability")),
            )
            for sample in content["samples"]
        )
        indices = [index for sample in samples for index in (sample.label, sample.prediction)]
        if indices and not 0 <= min(indices) <= max(indices) < len(classes):
            raise ValueError(f"a class index is outside 0..{len(classes) - 1}")
    except (KeyError, TypeError, ValueError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else error
        problems.append(f"{path.name} cannot be read: {what}")
        return None
    return Predictions(split=str(content.get("split", "test")), classes=classes, samples=samples)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
