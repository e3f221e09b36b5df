"""`reelscale make-data motion DIR`: writes the embedded data set as real mp4 files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_shards.motion import MotionConfig, make_motion_dataset
from launch.console import ProgressLine
from launch.parsing import closest, parse

DATA_SETS = ("motion",)


@dataclass(frozen=True, kw_only=True)
class MakeMotion(MotionConfig):
    """Renders the motion set: ten classes in five pairs that differ in the direction of time alone."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to make; must be new or empty."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("which data set? reelscale make-data motion DIR")
    if arguments[0] not in DATA_SETS:
        raise ValueError(f"unknown data set {arguments[0]!r}{closest(arguments[0], DATA_SETS)}; there is: motion")
    command = parse(MakeMotion, arguments[1:], program="reelscale make-data motion")
    config = MotionConfig(**{f.name: getattr(command, f.name) for f in dataclasses.fields(MotionConfig)})
    with ProgressLine("rendering", unit="clips") as progress:
        make_motion_dataset(config, command.folder, progress=progress.update)
    sys.stdout.write(f"{config.num_clips} clips in {command.folder}; next: reelscale pack {command.folder} SHARDS\n")
    return 0
