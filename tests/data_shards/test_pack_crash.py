"""A video that takes its process down is packed around and named; the others are packed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_shards.forms.encoding import EncodingConfig
from data_shards.motion import MotionConfig, encode_h264, render_clip
from data_shards.packing.planning import PlannedSample, PlannedShard
from data_shards.packing.pool import _Worker, write_shards
from data_shards.packing.records import ShardRecord
from data_shards.packing.worker import ShardJob
from data_shards.sources import SourceSample
from data_shards.sources.base import VideoContent


@dataclass(frozen=True)
class Poison(VideoContent):
    """A video whose reading ends the process, at most `times` times in all."""

    path: Path
    times: int
    signal_number: int

    @property
    def where(self) -> str:
        return str(self.path)

    @property
    def suffix(self) -> str:
        return ".mp4"

    def read(self) -> bytes:
        deaths = self.path.with_suffix(".deaths")
        died = len(deaths.read_bytes()) if deaths.exists() else 0
        if died < self.times:
            deaths.write_bytes(b"x" * (died + 1))
            os.kill(os.getpid(), self.signal_number)
        return self.path.read_bytes()


def job_of(folder: Path, name: str, times: dict[int, int], signal_number: int = signal.SIGSEGV) -> ShardJob:
    """A shard of four videos, of which number n ends its process times[n] times."""
    video = encode_h264(render_clip(MotionConfig(size=32, num_frames=8), index=1, label="left", scene=1))
    samples = []
    for number in range(4):
        path = folder / f"{name}{number}.mp4"
        path.write_bytes(video)
        content = Poison(path=path, times=times.get(number, 0), signal_number=signal_number)
        sample = SourceSample(name=path.name, label="a", split="train", content=content, weight=len(video))
        samples.append(PlannedSample(sample=sample, key=path.stem, label=0))
    shard = PlannedShard(split="train", number=0, samples=tuple(samples))
    return ShardJob(shard=shard, tar=folder / f"{name}.tar", record=folder / f"{name}.json", encoding=EncodingConfig())


def keys(record: ShardRecord) -> list[str]:
    return [row[-1] for row in record.rows]


def test_a_video_that_ends_its_process_twice_is_left_out_with_the_signal(tmp_path: Path):
    jobs = [job_of(tmp_path, "good", {}), job_of(tmp_path, "bad", {2: 99}), job_of(tmp_path, "last", {})]
    told: list[tuple[int, int]] = []
    records = list(write_shards(iter(jobs), workers=2, tell=lambda *call: told.append(call)))
    by_name = {record.name: record for record in records}
    assert keys(by_name["good.tar"]) == ["good0", "good1", "good2", "good3"]
    assert keys(by_name["last.tar"]) == ["last0", "last1", "last2", "last3"]
    assert keys(by_name["bad.tar"]) == ["bad0", "bad1", "bad3"]
    (rejected,) = by_name["bad.tar"].rejected
    assert rejected.file == str(tmp_path / "bad2.mp4")
    assert rejected.reason == "ended the process that read it 2 times (SIGSEGV)"
    assert (tmp_path / "bad2.deaths").read_bytes() == b"xx"
    assert sum(samples for samples, _ in told) == 12, "what is done again is counted once"
    assert not list(tmp_path.glob("*.partial"))


def test_a_process_that_is_killed_once_is_replaced_and_nothing_is_left_out(tmp_path: Path):
    jobs = [job_of(tmp_path, "one", {1: 1, 3: 1}, signal.SIGKILL), job_of(tmp_path, "two", {})]
    records = list(write_shards(iter(jobs), workers=2, tell=lambda *_: None))
    assert [len(record.rows) for record in records] == [4, 4]
    assert not any(record.rejected for record in records)


def test_a_process_that_dies_within_a_message_is_a_dead_process():
    worker = object.__new__(_Worker)
    worker.connection, theirs = multiprocessing.Pipe()
    with worker.connection, theirs:
        os.write(theirs.fileno(), struct.pack("!i", 100) + b"half of it")
        theirs.close()
        assert worker.receive() is None


@pytest.mark.thorough
def test_a_video_without_end_is_left_out(tmp_path: Path):
    jobs = [job_of(tmp_path, "one", {1: 99}, signal.SIGSTOP), job_of(tmp_path, "two", {})]
    records = list(write_shards(iter(jobs), workers=2, tell=lambda *_: None, max_sample_seconds=4))
    (rejected,) = [row for record in records for row in record.rejected]
    assert rejected.file == str(tmp_path / "one1.mp4")
    assert rejected.reason == "ended the process that read it 2 times (no end after 4 s)"
    assert sorted(len(record.rows) for record in records) == [3, 4]
    (stamp,) = [stamp for record in records for stamp in record.stamps.values()]
    assert stamp is None, "another run tries it again"


def test_processes_that_keep_dying_are_an_error_that_names_the_place(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("data_shards.packing.pool._DEATHS_OF_A_SHARD", 2)
    jobs = [job_of(tmp_path, "one", dict.fromkeys(range(4), 99), signal.SIGKILL), job_of(tmp_path, "two", {})]
    with pytest.raises(RuntimeError, match=r"keep ending \(SIGKILL, .*\), the last at .*one1.mp4: too little memory"):
        list(write_shards(iter(jobs), workers=2, tell=lambda *_: None))
