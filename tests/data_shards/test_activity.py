"""The loader says from any thread which sample it is at."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from data_shards.activity import DECODING, IDLE, READING, WorkerActivity
from data_shards.clips import ClipConfig
from data_shards.loader import ClipLoader, LoaderConfig
from tests.data_shards.packed import make_split

VIDEOS = {"a": b"not opened", "b": b"not opened either"}


def block(shard: Path) -> None:
    """Makes whoever opens `shard` wait until somebody opens it for writing."""
    shard.unlink()
    os.mkfifo(shard)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_that_hangs_says_on_which_sample(tmp_path, num_workers):
    manifest = make_split(tmp_path / "train", VIDEOS)
    clip = ClipConfig(num_segments=2, crop_size=16, short_side=16)
    loader = ClipLoader(
        manifest, clip=clip, loader=LoaderConfig(num_workers=num_workers), training=False, global_batch_clips=2
    )
    with loader:
        assert loader.doing() == ("its workers are idle" if num_workers else "")
        shard = manifest.shard_path(0)
        block(shard)
        failed: list[Exception] = []

        def read() -> None:
            try:
                next(loader.evaluation_batches())
            except OSError as error:
                failed.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        deadline = time.monotonic() + 30
        while "reading" not in (said := loader.doing()):
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        os.close(os.open(shard, os.O_WRONLY))
        thread.join()
    who = "worker 0: " if num_workers else ""
    assert said.startswith(f"{who}reading {shard.name}:{manifest.key(0)} (sample 0) for ")
    assert failed


def test_of_several_workers_the_one_at_one_thing_for_longest_is_told(tmp_path):
    manifest = make_split(tmp_path / "train", VIDEOS)
    activity = WorkerActivity(3)
    activity.note(2, 1, DECODING)
    activity.note(0, 0, READING)
    assert activity.describe(manifest).startswith(f"worker 2: decoding {manifest.describe(1)} (sample 1) for 0.0 s")
    activity.note(2, 0, IDLE)
    assert activity.describe(manifest).startswith("worker 0: reading ")
