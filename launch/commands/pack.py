"""`reelscale pack SRC DST`: videos to WebDataset shards with a manifest."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_shards.pack import PackConfig, PackResult, pack
from launch.console import ProgressLine
from launch.parsing import parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pack(PackConfig):
    """Packs class folders or a CSV of labelled videos, as they are, into shards that any WebDataset reader opens."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of class folders (SRC/CLASS/VIDEO or SRC/SPLIT/CLASS/VIDEO), a CSV, or a folder with labels.csv."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist yet."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    command = parse(Pack, arguments, program="reelscale pack")
    config = PackConfig(**{f.name: getattr(command, f.name) for f in dataclasses.fields(PackConfig)})
    with ProgressLine("packing", unit="videos") as progress:
        result = pack(config, progress=progress.update)
    for warning in result.warnings:
        logger.warning("%s", warning)
    sys.stdout.write(_summary(result))
    return 0


def _summary(result: PackResult) -> str:
    lines = [f"{result.destination}: {len(result.classes)} classes"]
    for name, split in result.splits.items():
        lines.append(
            f"  {name:<6} {split.num_samples:>9,} videos  {split.num_shards:>6,} shards  "
            f"{split.num_bytes / 1e6:>10,.1f} MB"
        )
    if result.rejected:
        lines.append(f"  left out: {len(result.rejected)} videos, listed in {result.destination / 'rejected.csv'}")
    return "\n".join(lines) + "\n"
