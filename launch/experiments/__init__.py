"""Experiments: each is a function that returns one complete, frozen configuration.

reelscale train motion_tsm --training.epochs 5
reelscale train my_package.my_module:my_experiment
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from launch.config import Experiment
from launch.experiments.kinetics import (
    kinetics_goyal,
    kinetics_lars,
    kinetics_nonlocal,
    kinetics_study,
    kinetics_tsm,
    kinetics_tsn,
)
from launch.experiments.motion import motion_tsm, motion_tsn
from launch.experiments.video import video_tsm, video_tsn
from launch.parsing import closest

EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "motion_tsm": motion_tsm,
    "motion_tsn": motion_tsn,
    "video_tsm": video_tsm,
    "video_tsn": video_tsn,
    "kinetics_tsm": kinetics_tsm,
    "kinetics_tsn": kinetics_tsn,
    "kinetics_nonlocal": kinetics_nonlocal,
    "kinetics_goyal": kinetics_goyal,
    "kinetics_lars": kinetics_lars,
    "kinetics_study": kinetics_study,
}


def make_experiment(name: str) -> Experiment:
    """The experiment called `name`, or the user's own `package.module:function`.

    Raises:
        ValueError: unknown, not importable, or not returning an `Experiment`.
    """
    if ":" not in name:
        if name not in EXPERIMENTS:
            raise ValueError(
                f"unknown experiment {name!r}{closest(name, EXPERIMENTS)}; there are {', '.join(EXPERIMENTS)}, "
                "and your own as 'package.module:function'"
            )
        return EXPERIMENTS[name]()
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"experiment {name!r} cannot be imported: {error}") from None
    experiment = found()
    if not isinstance(experiment, Experiment):
        raise ValueError(f"experiment {name!r} returned a {type(experiment).__name__}, not a launch.config.Experiment")
    return experiment
