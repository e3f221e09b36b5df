"""`reelscale demo DIR`: the whole main job on the embedded data set, on what this machine has.

Renders and packs the motion set, trains a TSN and a TSM on one process and the TSM again on two, and writes one
report with their curves laid over each other.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from data_shards.motion import MotionConfig, make_motion_dataset
from data_shards.pack import PackConfig, pack
from launch.cli import say
from launch.console import ProgressLine, console
from launch.local import run_local
from launch.parsing import parse
from launch.reporting import print_ledger, report_runs


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Makes the data, packs it, trains, evaluates, prints the ledger and writes report.html."""

    folder: Annotated[Path, tyro.conf.Positional] = Path("demo")
    """Where everything goes; a demo that is there already is made anew."""
    num_clips: int = 2000
    """Clips of the data set, over all splits."""
    epochs: float = 4.0
    """Epochs of each run."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    name: str
    experiment: str
    num_processes: int


RUNS = (
    _Run(name="tsn_1_process", experiment="motion_tsn", num_processes=1),
    _Run(name="tsm_1_process", experiment="motion_tsm", num_processes=1),
    _Run(name="tsm_2_processes", experiment="motion_tsm", num_processes=2),
)


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    command = parse(Demo, arguments, program="reelscale demo")
    started = time.monotonic()
    _clear(command.folder)
    clips, shards = command.folder / "clips", command.folder / "shards"
    with ProgressLine("rendering", unit="clips") as progress:
        make_motion_dataset(MotionConfig(num_clips=command.num_clips), clips, progress=progress.update)
    with ProgressLine("packing", unit="clips") as progress:
        pack(PackConfig(source=clips, destination=shards), progress=lambda at: progress.update(at.done, at.total))
    _say(f"{command.num_clips} clips rendered and packed in {time.monotonic() - started:.0f} s")
    results = []
    for wanted in RUNS:
        begun = time.monotonic()
        _say(f"{wanted.name}: starting")
        failure = run_local(
            ["train", wanted.experiment, *_flags(command, wanted, shards)],
            num_processes=wanted.num_processes,
            logs=_run_dir(command, wanted) / "logs",
        )
        if failure is not None:
            say(failure, show_rank=True)
            return failure.exit_code
        results.append((wanted, _test_accuracy(_run_dir(command, wanted)), time.monotonic() - begun))
        _say(f"{wanted.name}: test top-1 {100 * results[-1][1]:.1f} % in {results[-1][2]:.0f} s")
    _conclude(command, results, time.monotonic() - started)
    return 0


def _flags(command: Demo, wanted: _Run, shards: Path) -> list[str]:
    return [
        f"--data.root={shards}",
        f"--run-dir={_run_dir(command, wanted)}",
        f"--training.epochs={command.epochs}",
        "--report=off",
    ]


def _run_dir(command: Demo, wanted: _Run) -> Path:
    return command.folder / "runs" / wanted.name


def _conclude(command: Demo, results: list[tuple[_Run, float, float]], seconds: float) -> None:
    run_dirs = [_run_dir(command, wanted) for wanted, _, _ in reversed(results)]
    report = report_runs(run_dirs, command.folder / "report.html")
    print_ledger(run_dirs[0])
    table = Table(
        box=None, pad_edge=False, title="motion set: ten classes in five pairs that no single frame tells apart"
    )
    for column in ("run", "processes", "test top-1", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for wanted, accuracy, spent in results:
        table.add_row(wanted.experiment, str(wanted.num_processes), f"{100 * accuracy:.1f} %", f"{spent:.0f}")
    console().print(table)
    _say(f"all in {seconds / 60:.1f} minutes; open {report}")


def _test_accuracy(run_dir: Path) -> float:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([line["evaluation"]["top1"] for line in lines if "evaluation" in line][-1])


def _clear(folder: Path) -> None:
    """Removes what an earlier demo made; refuses a folder that holds anything else."""
    made = {"clips", "shards", "runs", "report.html"}
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - made)
        if others:
            raise ValueError(f"{folder} holds {others[0]!r}, which no demo made: choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
