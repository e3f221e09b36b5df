"""`reelscale verify DST`: is a packed set whole, byte for byte."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_shards.errors import DataError
from data_shards.verify import VerifyConfig, VerifyResult, verify
from launch.console import ProgressLine
from launch.parsing import parse
from launch.report.units import bytes_text, plural, seconds_text


@dataclass(frozen=True, kw_only=True)
class Verify(VerifyConfig):
    """Checks the tars, manifests and checksums of a packed set, and that its samples decode."""

    root: Annotated[Path, tyro.conf.Positional]
    """A packed set (a folder of splits), or one split."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0 where nothing is wrong.

    Raises DataError, after a line on standard output for each problem.
    """
    command = parse(Verify, arguments, program="reelscale verify")
    config = VerifyConfig(**{f.name: getattr(command, f.name) for f in dataclasses.fields(VerifyConfig)})
    started = time.monotonic()
    with ProgressLine("verifying", unit="samples") as progress:

        def show(done: int, total: int, num_bytes: int) -> None:
            progress.annotate(f"{bytes_text(num_bytes / max(time.monotonic() - started, 1e-3))}/s")
            progress.update(done, total)

        result = verify(config, found=_print_line, progress=show)
    if result.num_problems:
        raise DataError(f"{config.root}: {plural(result.num_problems, 'problem')} found, each in a line above")
    sys.stdout.write(_summary(config, result, time.monotonic() - started))
    return 0


def _print_line(problem: str) -> None:
    sys.stdout.write(problem + "\n")
    sys.stdout.flush()


def _summary(config: VerifyConfig, result: VerifyResult, seconds: float) -> str:
    decoded = {
        "all": "and every frame decodes",
        "sample": f"and {plural(result.num_decoded, 'sample')} of them decode",
        "none": "nothing was decoded",
    }
    return (
        f"{config.root}: {', '.join(result.splits)}: {plural(result.num_samples, 'sample')} in "
        f"{plural(result.num_shards, 'shard')}, {bytes_text(result.num_bytes)}: manifests, tars and checksums agree, "
        f"{decoded[config.decode]} ({seconds_text(seconds)})\n"
    )
