"""`--dry-run` says what a run would do, what memory it needs and what fits."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from launch.config import Experiment, ModelConfig
from launch.experiments import make_experiment
from launch.memory_plan import available_bytes, describe_memory, memory_table, plan_memory
from launch.plan import plan
from launch.training import open_splits
from tests.launch.commands import reelscale, succeeded


def _experiment(shards: Path, name: str = "motion_tsm", **training) -> Experiment:
    experiment = make_experiment(name)
    options = {"batch_clips": 16, "epochs": 2, **training}
    return replace(
        experiment,
        data=replace(experiment.data, root=shards),
        training=replace(experiment.training, **options),
    )


def _memory(experiment: Experiment, *, world_size: int = 2, gigabytes: float = 16.0):
    return plan_memory(experiment, open_splits(experiment), world_size=world_size, available=gigabytes * 1e9)


def test_the_plan_says_the_batch_arithmetic_and_the_buckets(motion_shards):
    lines = plan(_experiment(motion_shards, micro_batches=2), world_size=2)
    assert lines["batch"] == "16 clips = 2 processes x 2 micro-batches x 4 clips"
    assert "gradients by allreduce" in lines["processes"]
    assert lines["exchange a step"] == "2.8 MB in 4 buckets (1 between CPU processes of one node)"
    assert "linear rule from" in lines["learning rate"]


def test_a_gpus_worth_of_kinetics_is_planned_without_its_memory(motion_shards):
    """TSM ResNet-50, 8 clips of 8 x 224 x 224: 24.3 M parameters, and some gigabytes that are never allocated."""
    experiment = _experiment(motion_shards, "kinetics_tsm", precision="float32")
    memory = _memory(experiment, gigabytes=8.0)
    assert memory.size.trainable == pytest.approx(24.3e6 * 4, rel=0.05)
    assert memory.activations["off"] == pytest.approx(0.87e9, rel=0.1)
    assert memory.activations["blocks"] < 0.4 * memory.activations["off"]
    assert memory.needed("allreduce", "blocks") < 8e9
    assert memory.needed("allreduce", "blocks") < memory.needed("allreduce", "off")
    largest = memory.largest_micro_batch("allreduce", "off")
    assert largest < memory.largest_micro_batch("fsdp2", "off") + 1 < memory.largest_micro_batch("fsdp2", "blocks")
    as_large = replace(memory, micro_batch=largest)
    assert (
        as_large.needed("allreduce", "off") <= 8e9 < replace(memory, micro_batch=largest + 1).needed("allreduce", "off")
    )


def test_bfloat16_takes_about_half_the_activations(motion_shards):
    full, half = (_memory(_experiment(motion_shards, precision=name)) for name in ("float32", "bfloat16"))
    assert 0.4 < half.activations["off"] / full.activations["off"] < 0.7  # the clip and its float32 copy stay


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_table_fits_a_terminal_and_marks_what_does_not_fit(motion_shards, world_size):
    memory = _memory(_experiment(motion_shards), world_size=world_size, gigabytes=0.02)
    console = Console(width=80, file=io.StringIO())
    console.print(memory_table(memory))
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    rows = [line.split() for line in lines if line.startswith(("allreduce", "ddp", "fsdp2", "zero"))]
    assert len(rows) == (12 if world_size > 1 else 2)
    assert all(("no" in row) == (float(row[-3].replace(",", "")) > 20) for row in rows)
    assert "does not fit" in describe_memory(replace(memory, available=1e6))


class _NotOnMeta(nn.Module):
    """A model with a decision that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        pixels = clips.mean((1, 3, 4))
        return self.fc(pixels if pixels.sum() > 0 else -pixels)


def model_not_on_meta() -> nn.Module:
    return _NotOnMeta()


def test_a_model_that_needs_data_is_planned_without_activations(motion_shards):
    model = ModelConfig(name="tests.launch.test_plan:model_not_on_meta")
    memory = _memory(replace(_experiment(motion_shards), model=model))
    assert memory.activations == {}
    assert "could not be measured" in describe_memory(memory)


def test_memory_is_what_was_given_or_this_machines_share():
    assert available_bytes(gigabytes=2.5, device="auto", processes_here=2) == 2.5e9
    whole, half = (available_bytes(gigabytes=0, device="cpu", processes_here=n) for n in (1, 2))
    assert whole == 2 * half > 1e8


def test_the_command_prints_it(motion_shards, tmp_path):
    flags = ["--data.root", motion_shards, "--training.batch-clips", 8, "--memory-gigabytes", 0.5, "--dry-run"]
    done = succeeded(reelscale("train", "motion_tsm", *flags, "--nproc", 2, "--run-dir", tmp_path / "run"))
    assert "memory a process" in done.stdout
    assert "0.5 GB" in done.stdout
    assert "fsdp2, blocks" in done.stdout
    assert not (tmp_path / "run").exists()
