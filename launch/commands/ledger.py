"""`reelscale ledger RUN`: where a run's seconds and bytes went, as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.parsing import parse
from launch.reporting import print_ledger


@dataclass(frozen=True, kw_only=True)
class LedgerCommand:
    """Prints the ledger of a run, also of one that is still going on or was killed."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    print_ledger(parse(LedgerCommand, arguments, program="reelscale ledger").run_dir)
    return 0
