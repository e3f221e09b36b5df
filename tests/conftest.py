"""Fixtures of the whole suite, and the guard against tests that leave something behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.launch.commands import reelscale, succeeded

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def tennis7() -> Path:
    """The real set of tennis strokes, where it lies beside the checkout."""
    folder = SHARED_DATA / "tennis7"
    if not folder.is_dir():
        pytest.skip("../shared/data/tennis7 is not beside this checkout")
    return folder


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
        "--data.loader.num-workers=0",
    ]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fails a test that leaves changed environment variables, a process group, or running threads."""
    environ, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = {key for key in environ.keys() | os.environ.keys() if environ.get(key) != os.environ.get(key)}
    changed -= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # the latter is set by PyTorch's compiler on import
    assert not changed, f"environment variables changed: {sorted(changed)}"
    assert not dist.is_initialized(), "a process group was left behind"
    left = [t for t in threading.enumerate() if t not in threads and t.is_alive() and not t.daemon]
    assert not left, f"threads were left running: {left}"
