"""Augmented clips and evaluation views through the loader: the same at any number of workers and ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_shards.augment.color import ColorJitter
from data_shards.augment.rand_augment import RandAugment
from data_shards.batch import Batch
from data_shards.clips import ClipConfig, read_clip, training_labels
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest
from tests.data_shards.packed import damage, make_split
from tests.data_shards.videos import encode

VIDEOS = {f"clip_{number:02d}": encode(9, width=40, height=32, seed=number) for number in range(11)}
EVERYTHING = ClipConfig(
    num_segments=3,
    crop_size=24,
    short_side=32,
    rgb_differences=1,
    crop_scales=(1.0, 0.8),
    horizontal_flip=True,
    flip_label_pairs=(("class0", "class1"),),
    color=ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    rand_augment=RandAugment(num_ops=2, magnitude=12),
)
VIEWS = replace(EVERYTHING, num_test_clips=2, num_test_crops=3, test_crop_size=32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("packed") / "train", VIDEOS, samples_per_shard=5)


def batches_of(manifest: Manifest, *, training: bool, workers: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
    loader = ClipLoader(
        manifest,
        clip=VIEWS,
        loader=LoaderConfig(num_workers=workers),
        training=training,
        global_batch_clips=4 if training else 24,
        rank=rank,
        world_size=ranks,
        seed=3,
    )
    with loader:
        made = loader.batches(8, 32) if training else loader.evaluation_batches()
        return [replace(batch.to("cpu"), clips=batch.clips.clone(), labels=batch.labels.clone()) for batch in made]


def contents(batches: list[Batch]) -> dict[int, tuple[int, int, torch.Tensor]]:
    """By position: sample, label, views."""
    found = {}
    for batch in batches:
        views = batch.clips.unflatten(0, (len(batch), -1))
        for place, position in enumerate(batch.positions.tolist()):
            assert position not in found
            found[position] = (int(batch.sample_ids[place]), int(batch.labels[place]), views[place])
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for position, (sample, label, views) in one.items():
        assert other[position][:2] == (sample, label)
        assert torch.equal(other[position][2], views)


@pytest.mark.parametrize("training", [True, False])
def test_workers_and_ranks_do_not_change_what_is_made_of_a_sample(manifest, training):
    alone = contents(batches_of(manifest, training=training, workers=0))
    assert len(alone) == (24 if training else 11)
    two_ranks = [
        batch for rank in range(2) for batch in batches_of(manifest, training=training, workers=0, rank=rank, ranks=2)
    ]
    assert_same(contents(two_ranks), alone)
    for workers in (1, 3):
        assert_same(contents(batches_of(manifest, training=training, workers=workers)), alone)


def test_training_clips_and_labels_are_those_of_their_sample_and_epoch(manifest):
    swapped = 0
    for position, (sample, label, views) in contents(batches_of(manifest, training=True, workers=0)).items():
        epoch = position // len(VIDEOS)
        clip, _ = read_clip(manifest, sample, clip=VIEWS, training=True, seed=3, epoch=epoch)
        assert torch.equal(views[0], clip)
        (expected,) = training_labels(manifest, np.array([sample]), np.array([epoch]), clip=VIEWS, seed=3)
        assert label == expected
        swapped += label != manifest.samples["label"][sample]
    assert 3 < swapped < 15


def test_evaluation_views_are_a_samples_in_a_row_and_each_sample_comes_once(manifest):
    batches = batches_of(manifest, training=False, workers=0)
    assert [len(batch) for batch in batches] == [4, 4, 3]  # 24 clips are four samples of six views
    assert batches[0].clips.shape == (24, 6, 3, 32, 32)
    found = contents(batches)
    assert sorted(sample for sample, _, _ in found.values()) == list(range(11))
    for sample, label, views in found.values():
        expected, _ = read_clip(manifest, sample, clip=VIEWS, training=False)
        assert torch.equal(views.flatten(0, 1), expected)
        assert label == manifest.samples["label"][sample]


def test_training_has_one_view_of_the_training_size(manifest):
    batch = batches_of(manifest, training=True, workers=0)[0]
    assert batch.clips.shape == (4, 6, 3, 24, 24)


def test_a_batch_smaller_than_a_samples_views_holds_one_sample(manifest):
    loader = ClipLoader(manifest, clip=VIEWS, loader=LoaderConfig(num_workers=0), training=False, global_batch_clips=2)
    with loader:
        assert [len(batch) for batch in loader.evaluation_batches()] == [1] * 11


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_sample_is_blank_in_all_views(tmp_path, workers):
    manifest = make_split(tmp_path / "val", dict(list(VIDEOS.items())[:3]))
    damage(manifest, 1)
    loader = ClipLoader(
        manifest,
        clip=VIEWS,
        loader=LoaderConfig(num_workers=workers, on_bad_sample="skip"),
        training=False,
        global_batch_clips=18,
    )
    with loader:
        (batch,) = loader.evaluation_batches()
        assert batch.weights.tolist() == [1, 0, 1]
        views = batch.clips.unflatten(0, (3, 6))
        assert int(views[1].max()) == 0
        assert all(int(views[place].amax((1, 2, 3, 4)).min()) > 0 for place in (0, 2))
        assert len(batch.skipped) == 1


def test_pairs_that_name_no_class_are_refused_at_once(manifest):
    clip = replace(EVERYTHING, flip_label_pairs=(("class0", "clas1"),))
    with pytest.raises(ValueError, match=r"'clas1' is not a class of the set .did you mean 'class1'"):
        ClipLoader(manifest, clip=clip, loader=LoaderConfig(num_workers=2), training=True, global_batch_clips=4)
