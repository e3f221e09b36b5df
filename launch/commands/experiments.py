"""`reelscale experiments`: lists the experiments with the first line of their documentation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from launch.experiments import EXPERIMENTS


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if arguments and arguments[0] not in ("-h", "--help"):
        raise ValueError(f"reelscale experiments takes no arguments, got {arguments[0]!r}")
    width = max(len(name) for name in EXPERIMENTS)
    for name, function in EXPERIMENTS.items():
        text = (inspect.getdoc(function) or "").splitlines()[0]
        sys.stdout.write(f"{name:<{width}}  {text}\n")
    return 0
