"""Orders of the training stream by flags: trained, resumed elsewhere, and certified from the journals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.sample_order import OrderConfig
from launch.config import Experiment
from launch.experiments import EXPERIMENTS
from launch.training import open_splits
from tests.launch.commands import QUICK, one_line_of, reelscale, succeeded


def _train(run_dir: Path, small: list[str], *flags: object) -> None:
    succeeded(reelscale("train", "motion_tsm", *small, f"--run-dir={run_dir}", *QUICK, *flags))


def test_two_sets_are_trained_on_at_their_shares_and_a_changed_journal_is_found_out(tmp_path, small, motion_shards):
    other = tmp_path / "other"
    shutil.copytree(motion_shards, other)
    flags = ["--training.epochs=1", f"--data.more-roots={other}", "--data.shares", 0.75, 0.25]
    _train(tmp_path / "run", small, *flags)
    lines = succeeded(reelscale("certify", tmp_path / "run")).stdout.splitlines()
    assert lines == [
        "180 clips in order, 0 dropped, 0 repeated, 0 of another sample: exactly as ordered",
        f"{motion_shards}: 135 clips (75.00%), each of 90 samples 1 to 2 times",
        f"{other}: 45 clips (25.00%), each of 90 samples 0 to 1 times",
    ]
    journal = tmp_path / "run" / "journal" / "rank_00000.jsonl"
    kept = journal.read_text().splitlines()
    journal.write_text("\n".join(kept[:5] + kept[6:]) + "\n")
    done = reelscale("certify", tmp_path / "run")
    assert done.returncode == 1
    assert done.stdout.startswith("180 clips in order, 12 dropped, 0 repeated, 0 of another sample: NOT exact")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flag", "steps", "first_line"),
    [
        ("--data.loader.order.tail=drop_last", 14, "168 clips in order, 0 dropped"),
        ("--data.loader.order.tail=pad", 16, "180 clips in order, 0 dropped"),
        ("--data.loader.order.balance=classes", 15, "180 clips in order, 0 dropped"),
    ],
)
def test_an_order_goes_on_at_another_number_of_processes(tmp_path, small, flag, steps, first_line):
    _train(tmp_path / "run", small, flag, "--nproc=2", "--training.epochs=1")
    _train(tmp_path / "run", small, flag, "--resume")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{steps:08d}\n"
    found = succeeded(reelscale("certify", tmp_path / "run")).stdout
    assert found.startswith(first_line)
    assert "exactly as ordered" in found


@pytest.mark.thorough
def test_a_run_whose_epochs_are_whole_batches_refuses_another_batch(tmp_path, small):
    _train(tmp_path / "run", small, "--data.loader.order.tail=pad", "--training.epochs=0.2")
    flags = [
        *small,
        f"--run-dir={tmp_path / 'run'}",
        *QUICK,
        "--data.loader.order.tail=pad",
        "--training.batch-clips=24",
    ]
    line = one_line_of(reelscale("train", "motion_tsm", *flags, "--resume"))
    assert "training.batch_clips is 24, the run began with 12" in line


@pytest.mark.parametrize(
    ("data", "order", "message"),
    [
        ({"more_roots": 1}, OrderConfig(tail="pad"), "2 sets end their epochs at different places"),
        ({"more_roots": 1, "shares": (1.0,)}, OrderConfig(), "1 shares are given for 2 sets"),
        ({"more_roots": 1, "shares": (1.0, 0.0)}, OrderConfig(), "a share is 0.0: use positive"),
    ],
)
def test_orders_that_cannot_be_are_refused_before_anything_starts(motion_shards, data, order, message):
    experiment: Experiment = EXPERIMENTS["motion_tsm"]()
    more = (str(motion_shards),) * data.pop("more_roots")
    loader = replace(experiment.data.loader, order=order)
    changed = replace(experiment.data, root=str(motion_shards), more_roots=more, loader=loader, **data)
    with pytest.raises(ValueError, match=message):
        open_splits(replace(experiment, data=changed))
