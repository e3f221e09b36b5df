"""What is read ahead of a clip is exactly what the clip then asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.clips import ClipConfig, read_clip
from data_shards.errors import DataError
from data_shards.forms.frames_file import write_frames_file
from data_shards.manifest import Manifest
from data_shards.planned_reads import clip_reads
from data_shards.reading import ShardReader
from data_shards.storage import LocalStorage, ReadCosts, StorageConfig
from tests.data_shards.packed import make_split
from tests.data_shards.test_read_ahead import eventually
from tests.data_shards.videos import encode

CLIP = ClipConfig(num_segments=3, crop_size=16, short_side=24)
CLIPS = [CLIP, ClipConfig(num_segments=2, crop_size=16, short_side=24, num_test_clips=2, num_test_crops=3)]


class Recording(LocalStorage):
    """Notes what is asked for, and apart what other threads ask for."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[list[tuple[int, int]]] = []
        self.asked_by_threads: list[list[tuple[int, int]]] = []

    def for_thread(self) -> Recording:
        other = Recording(Path(self.root))
        other.asked = self.asked_by_threads
        return other

    def read(self, name: str, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes]:
        self.asked.append(list(ranges))
        return super().read(name, ranges, costs)


def frames_set(folder: Path, num_samples: int = 6) -> Manifest:
    generator = np.random.default_rng(0)
    videos = {}
    for number in range(num_samples):
        frames = generator.integers(0, 255, (20 + number, 24, 32, 3), dtype=np.uint8)
        videos[f"clip_{number}"] = write_frames_file(
            [frame.tobytes() for frame in frames], codec="raw", height=24, width=32, fps=25.0
        )
    return make_split(folder / "raw", videos, samples_per_shard=4, form="raw")


def video_set(folder: Path) -> Manifest:
    return make_split(folder / "video", {f"clip_{number}": encode(8) for number in range(2)})


@pytest.mark.parametrize("clip", CLIPS, ids=["one view", "six views"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make_set", [frames_set, video_set])
def test_the_planned_reads_are_those_that_the_clip_makes(tmp_path, make_set, training, clip):
    manifest = make_set(tmp_path)
    for sample_id in range(2):
        storage = Recording(manifest.root)
        with ShardReader(manifest, storage) as reader:
            arguments = {"clip": clip, "training": training, "seed": 7, "epoch": 3}
            read_clip(manifest, sample_id, reader=reader, **arguments)
            asked, planned = storage.asked, []
            reads = clip_reads(manifest, sample_id, **arguments)
            start, ranges = int(manifest.samples["offset"][sample_id]), next(reads)
            while True:
                planned.append([(start + offset, size) for offset, size in ranges])
                try:
                    ranges = reads.send(storage.read(manifest.shards[0].name, planned[-1], ReadCosts()))
                except StopIteration:
                    break
        assert planned == asked[: len(planned)]
        assert len(asked) == 2 * len(planned)


def test_clips_read_ahead_are_the_clips_and_are_read_once(tmp_path):
    manifest = frames_set(tmp_path)
    manifest = replace(manifest, storage=StorageConfig(read_ahead="on"))
    order, arguments = [5, 0, 3, 3, 1, 2, 4], {"clip": CLIP, "training": True, "seed": 1, "epoch": 2}
    storage = Recording(manifest.root)
    with ShardReader(manifest, storage) as reader:
        assert reader.reads_ahead
        reader.want((sample_id, clip_reads(manifest, sample_id, **arguments)) for sample_id in order)
        eventually(lambda: len(storage.asked_by_threads) == 2 * len(order))
        for sample_id in order:
            expected, costs = read_clip(manifest, sample_id, **arguments)
            found, costs_ahead = read_clip(manifest, sample_id, reader=reader, **arguments)
            assert torch.equal(found, expected)
            assert costs_ahead["read_disk_bytes"] == costs["read_disk_bytes"]
    assert storage.asked == []


def test_a_folder_is_not_read_ahead_unless_asked_for(tmp_path):
    with ShardReader(frames_set(tmp_path)) as reader:
        assert not reader.reads_ahead
        reader.want([(0, clip_reads(reader.manifest, 0, clip=CLIP, training=True))])
        assert reader.take_held(0) is None


def test_a_damaged_table_is_named_by_the_clip_and_not_by_the_thread(tmp_path):
    manifest = frames_set(tmp_path)
    row = manifest.samples[4]
    with manifest.shard_path(4).open("r+b") as tar:
        tar.seek(int(row["offset"]) + 50)
        tar.write(b"\xff\x00\xff")
    manifest = replace(manifest, storage=StorageConfig(read_ahead="on"))
    with ShardReader(manifest) as reader:
        reader.want((number, clip_reads(manifest, number, clip=CLIP, training=True)) for number in (4, 5))
        with pytest.raises(DataError, match=r"shard-000001\.tar:clip_4: the table of the frames file is damaged"):
            read_clip(manifest, 4, clip=CLIP, training=True, reader=reader)
        read_clip(manifest, 5, clip=CLIP, training=True, reader=reader)
