"""`reelscale report RUN [RUN ...]`: one self-contained HTML page; several runs are laid over each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.parsing import parse
from launch.reporting import report_runs


@dataclass(frozen=True, kw_only=True)
class Report:
    """Writes the report of one or more runs."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; their curves are laid over each other."""
    output: Path | None = None
    """Where to write; by default report.html in the first run's folder."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    command = parse(Report, arguments, program="reelscale report")
    if not command.run_dirs:
        raise ValueError("which run? reelscale report RUN [RUN ...]")
    path = report_runs(command.run_dirs, command.output or command.run_dirs[0] / "report.html")
    sys.stdout.write(f"report: {path}\n")
    return 0
