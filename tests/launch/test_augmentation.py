"""Augmentation, mixing and test views as flags of `reelscale train`: the same training on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli import run_command
from tests.launch.commands import QUICK, final_state, reelscale, succeeded

AUGMENTED = [
    "--data.clip.sampling=dense",
    "--data.clip.dense-window-frames=8",
    "--data.clip.rgb-differences=2",
    "--data.clip.horizontal-flip",
    *("--data.clip.flip-label-pairs", "left", "right", "clockwise", "counterclockwise"),
    "--data.clip.multi-scale-crop",
    *("--data.clip.crop-scales", "1", "0.8"),
    "--data.clip.color.brightness=0.4",
    "--data.clip.color.hue=0.1",
    "--data.clip.rand-augment.num-ops=2",
    "--data.mix.mixup-alpha=0.4",
    "--data.mix.cutmix-alpha=1",
    "--data.clip.num-test-clips=2",
    "--data.clip.num-test-crops=3",
    "--data.clip.test-crop-size=24",
]
STEADY = ["--training.batch-norm=frozen", "--optimizer.base-learning-rate=0.02", "--training.epochs=0.8"]


def _evaluation(run_dir: Path) -> dict:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line][-1]


def test_every_flag_at_once_trains_and_each_sample_is_judged_once(tmp_path, small):
    succeeded(reelscale("train", "motion_tsm", *small, *STEADY, *AUGMENTED, *QUICK, f"--run-dir={tmp_path}/run"))
    assert final_state(tmp_path / "run")["conv1.weight"].shape[1] == 6  # two differences of three channels
    rows = json.loads((tmp_path / "run" / "predictions.json").read_text())["samples"]
    assert len(rows) == len({row["sample_id"] for row in rows}) == _evaluation(tmp_path / "run")["num_samples"]


@pytest.mark.thorough
def test_every_flag_at_once_is_the_same_on_two_processes_with_workers(tmp_path, small):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*small, *STEADY, *AUGMENTED, *QUICK]
    succeeded(reelscale("train", "motion_tsm", *flags, f"--run-dir={one}"))
    parallel = ["--nproc=2", "--data.loader.num-workers=1"]
    succeeded(reelscale("train", "motion_tsm", *flags, *parallel, f"--run-dir={two}"))
    expected = final_state(one)
    for name, value in final_state(two).items():
        if not name.startswith("momentum."):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)
    alone, together = _evaluation(one), _evaluation(two)
    assert together["num_samples"] == alone["num_samples"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-4)


def _refused(capsys, *flags: str) -> str:
    code = run_command(["train", "motion_tsm", *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert code == 2
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--data.clip.color.hue=0.7"], "color.hue is 0.7, it must be from 0 to 0.5"),
        (["--data.clip.rand-augment.magnitude=31"], "rand_augment.magnitude is 31, it must be from 0 to 30"),
        (["--data.clip.num-test-crops=2"], "invalid choice '2'"),
        (["--data.clip.num-test-clips=0"], "num_test_clips is 0, it must be at least 1"),
        (["--data.mix.mixup-alpha=-1"], "mix.mixup_alpha is -1.0: use a finite number, 0 or more"),
        (["--data.mix.mixup-alpha=1", "--training.batch-clips=9"], "a micro-batch has 9: make it even"),
        (["--data.clip.flip-label-pairs", "left", "right"], "only mirrored with horizontal_flip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_out_of_range_is_one_line(capsys, flags, words):
    assert words in _refused(capsys, *flags)


def test_a_pair_that_names_no_class_is_refused_before_anything_starts(capsys, small, tmp_path):
    flags = ["--data.clip.horizontal-flip", "--data.clip.flip-label-pairs", "left", "rihgt"]
    line = _refused(capsys, *small, *flags, f"--run-dir={tmp_path / 'run'}")
    assert "'rihgt' is not a class of the set (did you mean 'right'?)" in line
    assert not (tmp_path / "run").exists()
