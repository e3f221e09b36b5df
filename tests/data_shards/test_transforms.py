"""Crops lie in the frame, follow TSM's augmentation, and one choice holds for a whole clip."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import DataError
from data_shards.framing import CropBox, apply_framing, crop, resize, short_side_size
from data_shards.transforms import evaluation_framings, multi_scale_crop_box, training_framing


def frames_of(height: int, width: int, *, num_frames: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


def tsm_boxes(height: int, width: int, crop_size: int) -> set[tuple[int, int, int, int]]:
    """All (top, left, height, width) of TSM's GroupMultiScaleCrop, written down from its description."""
    sides = [int(min(height, width) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sides = [crop_size if abs(side - crop_size) < 3 else side for side in sides]
    boxes = set()
    for i, crop_height in enumerate(sides):
        for j, crop_width in enumerate(sides):
            if abs(i - j) <= 1:
                x, y = (width - crop_width) // 4, (height - crop_height) // 4
                places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0)]
                places += [(1, 1), (3, 1), (1, 3), (3, 3)]
                boxes |= {(v * y, u * x, crop_height, crop_width) for u, v in places}
    return boxes


@pytest.mark.parametrize("size", [(256, 340, 224), (64, 64, 56), (259, 340, 224), (300, 260, 224)])
def test_multi_scale_crops_are_exactly_those_of_tsm(size):
    generator = np.random.default_rng(0)
    height, width, crop_size = size
    boxes = [multi_scale_crop_box(height, width, crop_size=crop_size, generator=generator) for _ in range(6000)]
    assert {(box.top, box.left, box.height, box.width) for box in boxes} == tsm_boxes(*size)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 256), st.integers(0, 999))
def test_a_crop_lies_within_any_frame(height, width, crop_size, seed):
    box = multi_scale_crop_box(height, width, crop_size=crop_size, generator=np.random.default_rng(seed))
    assert box.top >= 0
    assert box.left >= 0
    assert 1 <= box.height <= height - box.top
    assert 1 <= box.width <= width - box.left


@pytest.mark.parametrize("size", [(200, 300, 56, 56), (40, 50, 56, 56), (256, 454, 256, 340), (100, 60, 100, 30)])
def test_resizing_is_pils_bilinear_within_rounding(size):
    height, width, new_height, new_width = size
    frames = frames_of(height, width)
    resized = resize(frames, new_height, new_width)
    assert resized.shape == (2, new_height, new_width, 3)
    for frame, mine in zip(frames, resized, strict=True):
        image = PIL.Image.fromarray(frame.numpy())
        expected = np.asarray(image.resize((new_width, new_height), PIL.Image.Resampling.BILINEAR))
        assert np.abs(expected.astype(int) - mine.numpy()).max() <= 1


def test_the_short_side_is_scaled_in_proportion():
    assert short_side_size(240, 320, 120) == (120, 160)
    assert short_side_size(320, 240, 120) == (160, 120)
    same = frames_of(256, 340)
    assert resize(same, *short_side_size(256, 340, 256)).data_ptr() == same.data_ptr()


def test_evaluation_takes_the_center():
    frames = frames_of(64, 80)
    (framing,) = evaluation_framings(64, 80, crop_size=56, short_side=64, num_crops=1)
    assert torch.equal(apply_framing(frames, framing), frames[:, 4:60, 12:68])


def places(height: int, width: int, num_crops: int) -> list[tuple[int, int]]:
    framings = evaluation_framings(height, width, crop_size=56, short_side=64, num_crops=num_crops)
    assert all((framing.box.height, framing.box.width, framing.size) == (56, 56, 56) for framing in framings)
    return [(framing.box.top, framing.box.left) for framing in framings]


def test_three_crops_go_along_the_long_side():
    assert places(64, 80, 3) == [(4, 0), (4, 12), (4, 24)]
    assert places(160, 128, 3) == [(0, 4), (12, 4), (24, 4)]  # of 80 x 64
    assert places(64, 64, 3) == [(4, 0), (4, 4), (4, 8)]


def test_five_crops_are_the_corners_and_the_center():
    assert places(64, 80, 5) == [(0, 0), (0, 24), (8, 0), (8, 24), (4, 12)]


def test_other_scales_of_the_multi_scale_crop():
    generator = np.random.default_rng(0)
    boxes = [
        multi_scale_crop_box(256, 340, crop_size=224, generator=generator, scales=(1.0, 0.875, 0.75))
        for _ in range(400)
    ]
    assert {box.height for box in boxes} == {256, 224, 192}


def test_pictures_of_another_size_than_the_manifests_are_refused():
    (framing,) = evaluation_framings(64, 80, crop_size=56, short_side=64, num_crops=1)
    with pytest.raises(DataError, match="its pictures are 64x80, the manifest says 80x64"):
        apply_framing(frames_of(80, 64), framing)


def test_random_crops_at_one_scale_reach_all_corners():
    frames = frames_of(10, 12, num_frames=1)
    places = set()
    generator = np.random.default_rng(0)
    for _ in range(400):
        framing = training_framing(10, 12, crop_size=8, short_side=10, multi_scale_crop=False, generator=generator)
        out = apply_framing(frames, framing)
        matches = [
            (top, left)
            for top in range(3)
            for left in range(5)
            if torch.equal(out, crop(frames, CropBox(top=top, left=left, height=8, width=8)))
        ]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) == 15


def test_crops_of_random_frames_are_where_the_box_says():
    frames = frames_of(30, 40)
    box = CropBox(top=random.Random(0).randrange(10), left=7, height=20, width=11)
    assert torch.equal(crop(frames, box), frames[:, box.top : box.top + 20, 7:18])
