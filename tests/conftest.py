"""Fixtures of the whole suite, and the guard against tests that leave something behind."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def tennis7() -> Path:
    """The real set of tennis strokes, where it lies beside the checkout."""
    folder = SHARED_DATA / "tennis7"
    if not folder.is_dir():
        pytest.skip("../shared/data/tennis7 is not beside this checkout")
    return folder


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fails a test that leaves changed environment variables, a process group, or running threads."""
    environ, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = {key for key in environ.keys() | os.environ.keys() if environ.get(key) != os.environ.get(key)}
    changed.discard("PYTEST_CURRENT_TEST")
    assert not changed, f"environment variables changed: {sorted(changed)}"
    assert not dist.is_initialized(), "a process group was left behind"
    left = [t for t in threading.enumerate() if t not in threads and t.is_alive() and not t.daemon]
    assert not left, f"threads were left running: {left}"
