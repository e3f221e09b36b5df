"""Which sample goes into which shard: a function of the source, the settings and the seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from data_shards.forms.encoding import EncodingConfig
from data_shards.manifest import open_manifest
from data_shards.motion import MotionConfig, encode_h264, render_clip
from data_shards.pack import PackConfig, PackProgress, pack
from data_shards.packing.planning import MIN_SHARD_SAMPLES, MIN_SHARDS, arrange, digest, plan_shards
from data_shards.sources import Source, SourceSample
from data_shards.sources.base import VideoContent
from tests.data_shards.files import digest as files_of


@dataclass(frozen=True)
class Unread(VideoContent):
    """A video that planning must not need to read."""

    path: Path
    suffix: str = ".mp4"

    @property
    def where(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        raise AssertionError(f"{self.path} is read")


def source_of(sizes: list[int], split: str = "train") -> Source:
    return Source(
        samples=tuple(
            SourceSample(
                name=f"v{number:06d}.mp4", label=f"c{number % 3}", split=split, content=Unread(Path()), weight=size
            )
            for number, size in enumerate(sizes)
        )
    )


def shard_sizes(sizes: list[int], *, max_shard_bytes: int, max_shard_samples: int = 10**6) -> list[int]:
    samples = arrange(source_of(sizes), seed=0)
    plan = plan_shards(samples, EncodingConfig(), max_shard_bytes=max_shard_bytes, max_shard_samples=max_shard_samples)
    assert sum(plan.shard_sizes["train"]) == len(sizes)
    assert [planned for shard in plan.shards() for planned in shard.samples] == list(samples)
    assert plan.num_shards == len(plan.shard_sizes["train"])
    return plan.shard_sizes["train"]


def test_shards_are_filled_to_the_size_without_reading_a_video():
    sizes = shard_sizes([10**6] * 1000, max_shard_bytes=50 * 10**6)
    assert sizes == [49] * 20 + [20]


def test_a_sample_beyond_the_size_has_a_shard_of_its_own():
    assert shard_sizes([10**6] * 10, max_shard_bytes=10**5) == [1] * 10


def test_a_split_has_some_shards_even_where_one_would_do():
    assert len(shard_sizes([1000] * 10_000, max_shard_bytes=10**9)) == MIN_SHARDS
    assert shard_sizes([1000] * 100, max_shard_bytes=10**9) == [MIN_SHARD_SAMPLES] * 3 + [4]
    assert shard_sizes([1000] * 10, max_shard_bytes=10**9) == [10]


def test_the_list_of_samples_has_one_checksum():
    one, other = source_of([1000] * 50), source_of([999] * 50)
    base = digest(arrange(one, 0), one.classes)
    assert digest(arrange(other, 0), one.classes) == base, "sizes may change: the shard is written again"
    assert digest(arrange(one, 1), one.classes) != base
    assert digest(arrange(one, 0), (*one.classes, "new")) != base
    assert digest(arrange(source_of([1000] * 50, "val"), 0), one.classes) != base
    assert digest(arrange(source_of([1000] * 49), 0), one.classes) != base


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planning") / "source"
    for number in range(24):
        path = folder / f"c{number % 2}" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        clip = render_clip(MotionConfig(size=64, num_frames=16), index=number, label="left", scene=number)
        path.write_bytes(encode_h264(clip))
    return folder


@pytest.mark.parametrize(
    "encoding",
    [
        EncodingConfig(store_as="jpeg"),
        EncodingConfig(store_as="jpeg", frames=4, quality=50),
        EncodingConfig(store_as="raw", short_side=32),
        EncodingConfig(gop=4, short_side=48),
    ],
    ids=["jpeg", "4 jpegs", "raw", "mp4"],
)
def test_encoded_shards_come_near_the_size_and_resume_to_the_same_bytes(
    videos: Path, tmp_path: Path, encoding: EncodingConfig
):
    def stop(at: PackProgress) -> None:
        if at.done == 13:
            raise KeyboardInterrupt

    config = PackConfig(
        source=videos,
        destination=tmp_path / "one",
        encoding=encoding,
        workers=1,
        val_fraction=0,
        max_shard_megabytes=0.2,
    )
    pack(config)
    again = PackConfig(**{**vars(config), "destination": tmp_path / "two"})
    with pytest.raises(KeyboardInterrupt):
        pack(again, progress=stop)
    pack(again)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    manifest = open_manifest(tmp_path / "one" / "train")
    assert manifest.form == encoding.form
    assert len(manifest) == 24
    assert all(shard.num_bytes <= 0.2e6 * 1.5 + 10240 for shard in manifest.shards)
    total = sum(shard.num_bytes for shard in manifest.shards)
    assert len(manifest.shards) <= 2 * -(-total // 200_000)
    assert (manifest.samples["num_frames"] == (encoding.frames or 16)).all()
