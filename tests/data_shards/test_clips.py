"""A clip depends on its sample, and in training on seed and epoch; nothing else."""

import numpy as np
import pytest
import torch

from data_shards.clips import COST_NAMES, ClipConfig, read_clip
from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader
from tests.data_shards.packed import damage, make_split
from tests.data_shards.videos import decode_everything, encode

CLIP = ClipConfig(num_segments=4, crop_size=40, short_side=48)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    videos = {f"clip_{number}": encode(20 + number, seed=number) for number in range(4)}
    return make_split(tmp_path_factory.mktemp("packed") / "train", videos)


def test_an_evaluation_clip_is_the_center_of_the_middle_frames(manifest):
    clip, _ = read_clip(manifest, 1, clip=CLIP, training=False)
    with ShardReader(manifest) as reader:
        reference = decode_everything(reader.read(1))  # 21 frames of 48 x 64
    expected = torch.from_numpy(reference[[2, 7, 13, 18], 4:44, 12:52]).permute(0, 3, 1, 2)
    assert torch.equal(clip, expected)


def test_a_clip_is_uint8_tchw_in_channels_last_memory(manifest):
    clip, _ = read_clip(manifest, 0, clip=CLIP, training=True)
    assert clip.shape == (4, 3, 40, 40)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous(memory_format=torch.channels_last)


def test_a_training_clip_depends_on_seed_epoch_and_sample_only(manifest):
    def clip(sample_id: int, seed: int, epoch: int) -> torch.Tensor:
        return read_clip(manifest, sample_id, clip=CLIP, training=True, seed=seed, epoch=epoch)[0]

    first = clip(2, 5, 7)
    clip(1, 5, 7)
    np.random.seed(0)  # noqa: NPY002 (global states must not matter)
    torch.manual_seed(0)
    assert torch.equal(clip(2, 5, 7), first)
    for other in (clip(2, 5, 8), clip(2, 6, 7), clip(2, 7, 5)):
        assert not torch.equal(other, first)


def test_a_reader_and_a_target_change_nothing(manifest):
    plain, _ = read_clip(manifest, 3, clip=CLIP, training=True, seed=1)
    out = torch.zeros((4, 40, 40, 3), dtype=torch.uint8)
    with ShardReader(manifest) as reader:
        clip, _ = read_clip(manifest, 3, clip=CLIP, training=True, seed=1, reader=reader, out=out)
    assert torch.equal(clip, plain)
    assert torch.equal(out.permute(0, 3, 1, 2), plain)


def test_costs_count_bytes_frames_and_seconds(manifest):
    _, costs = read_clip(manifest, 0, clip=CLIP, training=False)
    assert set(costs) == set(COST_NAMES)
    assert costs["read_bytes"] == manifest.samples[0]["size"]
    assert costs["decoded_bytes"] == 4 * 48 * 64 * 3
    assert costs["frames_used"] == 4
    assert 4 <= costs["frames_decoded"] <= 20
    assert all(costs[name] > 0 for name in COST_NAMES)


def test_dense_sampling_is_used_where_asked_for(manifest, monkeypatch):
    asked = []
    decode = Video.decode
    monkeypatch.setattr(
        Video, "decode", lambda self, numbers, framing: asked.append(list(numbers)) or decode(self, numbers)
    )
    dense = ClipConfig(num_segments=4, crop_size=40, short_side=48, sampling="dense", dense_window_frames=8)
    read_clip(manifest, 0, clip=dense, training=False)
    read_clip(manifest, 0, clip=CLIP, training=False)
    assert asked == [[6, 8, 10, 12], [2, 7, 12, 17]]


def test_a_sample_that_is_no_video_names_shard_and_key(tmp_path):
    manifest = make_split(tmp_path / "train", {"good": encode(4), "bad": b"this is a text file"})
    with pytest.raises(DataError, match=r"train/shard-000000\.tar:bad: the video cannot be opened") as caught:
        read_clip(manifest, 1, clip=CLIP, training=False)
    assert "\n" not in str(caught.value)


def test_a_damaged_sample_is_found_by_its_checksum(tmp_path):
    manifest = make_split(tmp_path / "train", {"good": encode(4), "bad": encode(4)})
    damage(manifest, 1)
    with pytest.raises(DataError, match=r"shard-000000\.tar:bad: .*crc32"):
        read_clip(manifest, 1, clip=CLIP, training=False)


def test_all_problems_of_a_config_are_named_at_once():
    with pytest.raises(ValueError, match=r"num_segments is 0.*crop_size is -1.*sampling is 'random'"):
        ClipConfig(num_segments=0, crop_size=-1, sampling="random")
    with pytest.raises(ValueError, match="short_side is 100, smaller than crop_size=224"):
        ClipConfig(short_side=100)
    with pytest.raises(ValueError, match="dense_window_frames is 4, it must hold num_segments=8"):
        ClipConfig(sampling="dense", dense_window_frames=4)
