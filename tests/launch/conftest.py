"""A small motion set, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.commands import reelscale, succeeded


@pytest.fixture(scope="session")
def motion_clips(tmp_path_factory) -> Path:
    """120 clips at 32 pixels as `reelscale make-data` writes them."""
    folder = tmp_path_factory.mktemp("motion") / "clips"
    succeeded(reelscale("make-data", "motion", folder, "--num-clips", 120, "--size", 32))
    return folder


@pytest.fixture(scope="session")
def motion_shards(motion_clips) -> Path:
    """The same, packed."""
    folder = motion_clips.parent / "shards"
    succeeded(reelscale("pack", motion_clips, folder))
    return folder


@pytest.fixture
def small(motion_shards) -> list[str]:
    """Flags that make `motion_tsm` a run of seconds."""
    return [
        f"--data.root={motion_shards}",
        "--data.clip.crop-size=32",
        "--data.clip.short-side=32",
        "--data.clip.num-segments=4",
        "--model.width=8",
        "--training.batch-clips=12",
        "--training.epochs=2",
        "--training.log-every-steps=2",
    ]
