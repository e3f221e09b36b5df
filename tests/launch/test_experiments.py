"""The experiments that ship hold the figures of the recipes that they name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_shards.storage import StorageConfig
from dist_train.schedules import learning_rate_factor
from launch.config import check
from launch.experiments import EXPERIMENTS, make_experiment

KINETICS_CLIPS = 234_643
WORLD_SIZES = {"kinetics_study": 1536, "kinetics_lars": 1632, "kinetics_goyal": 256}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_bears_its_name_and_passes_its_own_checks(name):
    experiment = make_experiment(name)
    assert experiment.name == name
    check(experiment, world_size=WORLD_SIZES.get(name, 4))


def _rate(name: str, epoch: float) -> float:
    experiment = make_experiment(name)
    batch = experiment.training.batch_clips
    peak = experiment.optimizer.peak_learning_rate(batch)
    return peak * learning_rate_factor(
        experiment.schedule,
        clips_seen=round(epoch * KINETICS_CLIPS),
        clips_per_epoch=KINETICS_CLIPS,
        total_clips=round(experiment.training.epochs * KINETICS_CLIPS),
        start_factor=min(experiment.optimizer.base_learning_rate / peak, 1.0),
    )


@pytest.mark.parametrize(
    "name,epoch,rate",
    [
        ("kinetics_tsm", 0, 0.02),
        ("kinetics_tsm", 30, 0.002),
        ("kinetics_tsm", 45, 0.0002),
        ("kinetics_nonlocal", 0, 0.01),
        ("kinetics_nonlocal", 41, 0.001),
        ("kinetics_nonlocal", 81, 0.0001),
        ("kinetics_goyal", 0, 0.1),
        ("kinetics_goyal", 5, 3.2),
        ("kinetics_goyal", 31, 0.32),
        ("kinetics_lars", 0, 0.0),
        ("kinetics_lars", 9, 12.8),
        ("kinetics_lars", 46, 1e-4),
        ("kinetics_study", 0, 0.01),
        ("kinetics_study", 5, 1.92),
        ("kinetics_study", 38, 0.192),
    ],
)
def test_the_learning_rate_is_the_recipes(name, epoch, rate):
    assert _rate(name, epoch) == pytest.approx(rate, rel=1e-6, abs=1e-9)


def test_the_study_has_eight_clips_on_each_of_its_gpus():
    study = make_experiment("kinetics_study")
    assert study.training.batch_clips == 1536 * 8
    assert study.training.ghost_batch_clips == 8
    fewer = 96  # GPUs with 128 clips each keep the statistics of 8 clips
    check(study, world_size=fewer)
    with pytest.raises(ValueError, match="does not divide into such groups"):
        check(study, world_size=1024)


def test_a_network_may_not_be_waited_for_longer_than_a_worker():
    base = make_experiment("video_tsm")
    slow = StorageConfig(num_attempts=10, timeout_seconds=60)
    remote = replace(base, data=replace(base.data, root="s3://bucket/set", storage=slow))
    with pytest.raises(ValueError, match=r"data\.storage may try for 7\d\d s .*worker_timeout_seconds=300"):
        check(remote, world_size=1)
    check(replace(base, data=replace(base.data, storage=slow)), world_size=1)
    check(replace(base, data=replace(base.data, root="s3://bucket/set")), world_size=1)
