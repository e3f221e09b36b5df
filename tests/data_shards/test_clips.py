"""A clip depends on its sample, and in training on seed and epoch; nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_shards.augment.color import ColorJitter, jitter_colors
from data_shards.augment.rand_augment import RandAugment, rand_augment
from data_shards.clips import COST_NAMES, ClipConfig, read_clip, training_labels
from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.framing import apply_framing
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader
from data_shards.sampling import sample_generator
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
    assert costs["decoded_bytes"] == 4 * 40 * 40 * 3  # cut out while decoding
    assert costs["frames_used"] == 4
    assert 4 <= costs["frames_decoded"] <= 20
    elsewhere = {f"read_{tier}_{unit}" for tier in ("cache", "remote") for unit in ("seconds", "bytes")}
    assert all((costs[name] > 0) == (name not in elsewhere) for name in COST_NAMES)


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


def test_a_mirrored_clip_is_the_other_way_round_and_has_the_other_label(manifest):
    plain = replace(CLIP, multi_scale_crop=False, crop_size=48)
    flipping = replace(plain, horizontal_flip=True, flip_label_pairs=(("class0", "class2"),))
    ids, epochs = np.repeat(np.arange(4), 12), np.tile(np.arange(12), 4)
    labels = training_labels(manifest, ids, epochs, clip=flipping, seed=3)
    mirrored = 0
    for sample_id, epoch, label in zip(ids.tolist(), epochs.tolist(), labels.tolist(), strict=True):
        generator = sample_generator(3, epoch, sample_id)
        flips = generator.random() < 0.5
        (view,) = replace(plain, horizontal_flip=False).views(manifest.samples[sample_id], 20 + sample_id, generator)
        with ShardReader(manifest) as reader:
            frames = torch.from_numpy(decode_everything(reader.read(sample_id))[view.frame_numbers])
        expected = apply_framing(frames, view.framing)
        clip, _ = read_clip(manifest, sample_id, clip=flipping, training=True, seed=3, epoch=epoch)
        assert torch.equal(clip.permute(0, 2, 3, 1), expected.flip(2) if flips else expected)
        own = int(manifest.samples["label"][sample_id])
        assert label == ({0: 2, 1: 1, 2: 0}[own] if flips else own)
        mirrored += flips
    assert 12 < mirrored < 36


def test_labels_stay_where_no_pairs_are_given(manifest):
    flipping = replace(CLIP, horizontal_flip=True)
    ids = np.arange(4)
    assert training_labels(manifest, ids, ids * 0, clip=flipping, seed=0).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "change", [{"color": ColorJitter(brightness=0.5, hue=0.2)}, {"rand_augment": RandAugment(num_ops=2, magnitude=20)}]
)
def test_colours_change_in_training_only_and_belong_to_seed_epoch_and_sample(manifest, change):
    clip = replace(CLIP, **change)
    for sample_id in range(4):
        plain, _ = read_clip(manifest, sample_id, clip=CLIP, training=True, seed=1, epoch=2)
        changed, _ = read_clip(manifest, sample_id, clip=clip, training=True, seed=1, epoch=2)
        again, _ = read_clip(manifest, sample_id, clip=clip, training=True, seed=1, epoch=2)
        assert torch.equal(changed, again)
        generator = sample_generator(1, 2, sample_id)
        clip.views(manifest.samples[sample_id], 20 + sample_id, generator)
        frames = plain.permute(0, 2, 3, 1).numpy()
        if clip.color.active:
            expected = jitter_colors(frames, clip.color, generator)
        else:
            expected = rand_augment(frames, clip.rand_augment, generator)
        assert (changed.permute(0, 2, 3, 1).numpy() == expected).all()
        evaluated, _ = read_clip(manifest, sample_id, clip=clip, training=False)
        assert torch.equal(evaluated, read_clip(manifest, sample_id, clip=CLIP, training=False)[0])


def test_a_clip_for_differences_has_frames_in_a_row(manifest):
    motion = replace(CLIP, rgb_differences=2, num_segments=3)
    clip, _ = read_clip(manifest, 0, clip=motion, training=False)
    with ShardReader(manifest) as reader:
        reference = decode_everything(reader.read(0))  # 20 frames, so 18 starts
    expected = reference[[3, 4, 5, 9, 10, 11, 15, 16, 17], 4:44, 12:52]
    assert torch.equal(clip.permute(0, 2, 3, 1), torch.from_numpy(expected))
    assert motion.sample_shape(training=True) == (1, 9, 40, 40, 3)
    assert motion.in_channels == 6
    assert CLIP.in_channels == 3


def test_the_scales_of_the_crop_are_the_configured_ones(manifest):
    clip = replace(CLIP, crop_scales=(0.5,))
    (view,) = clip.views(manifest.samples[0], 20, sample_generator(0, 0, 0))
    assert (view.framing.box.height, view.framing.box.width, view.framing.size) == (24, 24, 40)


# Test protocols


def test_views_are_each_clips_crops_one_clip_after_the_other(manifest):
    views = replace(CLIP, num_test_clips=2, num_test_crops=3)
    assert views.sample_shape(training=False) == (6, 4, 40, 40, 3)
    assert views.sample_shape(training=True) == (1, 4, 40, 40, 3)
    clip, costs = read_clip(manifest, 1, clip=views, training=False)
    with ShardReader(manifest) as reader:
        reference = decode_everything(reader.read(1))  # 21 frames of 48 x 64
    expected = [
        reference[numbers, 4:44, left : left + 40]
        for numbers in ([1, 6, 11, 17], [3, 9, 14, 19])
        for left in (0, 12, 24)
    ]
    assert torch.equal(clip.permute(0, 2, 3, 1), torch.from_numpy(np.concatenate(expected)))
    assert costs["frames_used"] == 8  # each once, for all of its crops


def test_ten_crops_are_corners_center_and_their_mirror_images(manifest):
    views = replace(CLIP, num_test_crops=10, test_crop_size=48)
    clip, _ = read_clip(manifest, 2, clip=views, training=False)
    clips = clip.unflatten(0, (10, 4))
    assert clips.shape == (10, 4, 3, 48, 48)
    assert torch.equal(clips[5:], clips[:5].flip(4))
    with ShardReader(manifest) as reader:
        reference = torch.from_numpy(decode_everything(reader.read(2))[[2, 8, 13, 19]]).permute(0, 3, 1, 2)
    for number, left in enumerate((0, 16, 0, 16, 8)):
        assert torch.equal(clips[number], reference[..., left : left + 48])


def test_clips_that_share_frames_are_right_too(manifest):
    views = replace(CLIP, num_test_clips=3, sampling="dense", dense_window_frames=16)
    clip, costs = read_clip(manifest, 0, clip=views, training=False)
    with ShardReader(manifest) as reader:
        reference = decode_everything(reader.read(0))  # starts 0, 2 and 4
    numbers = [0, 4, 8, 12, 2, 6, 10, 14, 4, 8, 12, 16]
    assert torch.equal(clip.permute(0, 2, 3, 1), torch.from_numpy(reference[numbers, 4:44, 12:52]))
    assert costs["frames_used"] == 9


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
    with pytest.raises(
        ValueError, match=r"color.hue is 1.*num_test_clips is 0.*test_crop_size=300.*num_test_crops is 2"
    ):
        ClipConfig(color=ColorJitter(hue=1), num_test_clips=0, test_crop_size=300, num_test_crops=2)
    with pytest.raises(
        ValueError, match=r"crop_scales is \(1.2,\).*only mirrored with horizontal_flip.*num_test_crops is 10"
    ):
        ClipConfig(crop_scales=(1.2,), flip_label_pairs=(("a", "b"),), num_test_crops=10)
