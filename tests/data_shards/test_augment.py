"""Augmentations are what Pillow does to a picture, one draw for a clip, and labels follow a mirrored clip."""

import colorsys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from data_shards.augment.color import ColorJitter, color_map, jitter_colors, map_colors
from data_shards.augment.mirror import mirrored_labels
from data_shards.augment.rand_augment import OPERATIONS, RandAugment, rand_augment

CLASSES = ("push left", "push right", "wave", "turn left", "turn right")
STRENGTH = st.floats(0, 1)


def frames_of(num_frames: int = 3, height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, so that histograms and means differ between frames and channels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / 5 + c + t) * 60 + np.cos(y / (3 + c)) * 40 + 110 + 8 * t for t in range(num_frames) for c in range(3)
    ]
    clip = np.stack(waves).reshape(num_frames, 3, height, width).transpose(0, 2, 3, 1) + rng.normal(
        0, 10, (1, height, width, 3)
    )
    return np.ascontiguousarray(clip.clip(0, 255).astype(np.uint8))


def tall(frames: np.ndarray) -> Image.Image:
    return Image.fromarray(frames.reshape(-1, frames.shape[2], 3))


# Mirroring


def test_a_mirrored_label_is_its_partners_and_no_other():
    labels = mirrored_labels(CLASSES, [("push left", "push right"), ("turn right", "turn left")])
    assert labels.tolist() == [1, 0, 2, 4, 3]
    assert labels[labels].tolist() == [0, 1, 2, 3, 4]
    assert mirrored_labels(CLASSES, []).tolist() == [0, 1, 2, 3, 4]


def test_all_wrong_names_of_pairs_are_said_at_once():
    with pytest.raises(ValueError, match=r"'push lefft' is not a class of the set .did you mean 'push left'") as caught:
        mirrored_labels(CLASSES, [("push lefft", "push right"), ("wave", "wave")])
    assert "'wave' stands twice" in str(caught.value)
    with pytest.raises(ValueError, match=r"'zzz' is not a class of the set .classes are push left, push right"):
        mirrored_labels(CLASSES, [("zzz", "wave")])


# Colours


def test_strengths_of_one_and_no_turn_change_nothing():
    frames = frames_of()
    assert (map_colors(frames, *color_map(1, 1, 1, hue=0)) == frames).all()
    # A full turn comes back but for the rounding.
    assert np.abs(map_colors(frames, *color_map(1, 1, 1, hue=1.0)).astype(int) - frames).max() <= 1


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.4])
def test_each_property_is_pillows_within_rounding(factor):
    frames = frames_of()
    brighter = map_colors(frames, *color_map(factor, 1, 1, hue=0))
    assert (
        np.abs(
            brighter
            - np.asarray(ImageEnhance.Brightness(tall(frames)).enhance(factor)).reshape(frames.shape).astype(int)
        ).max()
        <= 1
    )
    more_saturated = map_colors(frames, *color_map(1, 1, factor, hue=0))
    assert (
        np.abs(
            more_saturated
            - np.asarray(ImageEnhance.Color(tall(frames)).enhance(factor)).reshape(frames.shape).astype(int)
        ).max()
        <= 2
    )
    contrasted = map_colors(frames, *color_map(1, factor, 1, hue=0))
    blend = Image.blend(Image.new("RGB", tall(frames).size, (127, 127, 127)), tall(frames), factor)
    assert np.abs(contrasted - np.asarray(blend).reshape(frames.shape).astype(int)).max() <= 1


def test_a_third_of_a_turn_makes_red_green():
    red = np.full((1, 1, 1, 3), (180, 60, 60), dtype=np.uint8)
    turned = map_colors(red, *color_map(1, 1, 1, hue=1 / 3))[0, 0, 0] / 255
    hue = colorsys.rgb_to_hsv(*turned)[0]
    assert abs(hue - 1 / 3) < 0.04 or abs(hue - 2 / 3) < 0.04


@given(STRENGTH, STRENGTH, st.floats(-0.5, 0.5), st.integers(0, 255))
def test_hue_and_saturation_leave_gray_alone(saturation, unused, hue, value):
    gray = np.full((1, 1, 1, 3), value, dtype=np.uint8)
    changed = map_colors(gray, *color_map(1, 1, 2 * saturation, hue=hue))
    assert np.abs(changed.astype(int) - value).max() <= 1


def test_one_draw_colours_all_frames_alike_and_strength_bounds_it():
    frame = frames_of(1)
    clip = np.repeat(frame, 4, axis=0)
    config = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    seen = []
    for seed in range(20):
        out = jitter_colors(clip, config, np.random.default_rng(seed))
        assert (out == out[:1]).all()
        assert (out[:1] == jitter_colors(frame, config, np.random.default_rng(seed))).all()
        seen.append(out.mean())
    assert len(set(seen)) == 20
    weak = [jitter_colors(frame, ColorJitter(brightness=0.1), np.random.default_rng(seed)).mean() for seed in range(50)]
    assert 0.89 * frame.mean() < min(weak) < 0.95 * frame.mean()
    assert 1.05 * frame.mean() < max(weak) < 1.11 * frame.mean()


# RandAugment


def test_the_operations_are_the_papers_fourteen():
    assert len(OPERATIONS) == 14
    for name, operation in OPERATIONS.items():
        out = operation(frames_of(), 0.5)
        assert out.shape == (3, 24, 32, 3), name
        assert out.dtype == np.uint8, name
        assert (out == operation(frames_of(), 0.5)).all(), name
        assert name == "identity" or (out != frames_of()).any(), name


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if name not in ("auto_contrast", "equalize", "solarize", "posterize")]
)
def test_magnitude_zero_changes_nothing(name):
    assert (OPERATIONS[name](frames_of(), 0.0) == frames_of()).all()


def test_operations_of_tone_measure_the_whole_clip():
    frames = frames_of()
    for name, reference in (("auto_contrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)):
        assert (OPERATIONS[name](frames, 0.5) == np.asarray(reference(tall(frames))).reshape(frames.shape)).all()
        frame_by_frame = np.stack([np.asarray(reference(Image.fromarray(frame))) for frame in frames])
        assert (OPERATIONS[name](frames, 0.5) != frame_by_frame).any()


def test_magnitudes_are_the_documented_ones():
    frames = frames_of()
    white = np.full((1, 662, 662, 3), 255, dtype=np.uint8)
    assert (OPERATIONS["translate_x"](white, 1.0)[0, 0, :, 0] != 255).sum() == 300
    assert (OPERATIONS["translate_x"](white, -1.0)[0, 0, :300, 0] != 255).all()
    assert (OPERATIONS["translate_y"](white[:, :, :100], 0.5)[0, :, 0, 0] != 255).sum() == 150
    assert (OPERATIONS["translate_x"](white[:, :100], 0.5)[0, 0, :, 0] != 255).sum() == 150
    assert (OPERATIONS["shear_x"](white, 1.0)[0, 661, :, 0] != 255).sum() in (198, 199)
    assert (OPERATIONS["shear_y"](white, 1.0)[0, :, 661, 0] != 255).sum() in (198, 199)
    assert (OPERATIONS["shear_y"](white, -1.0)[0, :198, 661, 0] != 255).all()
    assert set(np.unique(OPERATIONS["posterize"](frames, -1.0) % 16).tolist()) == {0}
    assert (OPERATIONS["solarize"](frames, 1.0) == 255 - frames).all()
    assert (OPERATIONS["solarize"](frames, 0.0)[frames < 255] == frames[frames < 255]).all()
    turned = np.asarray(Image.fromarray(frames[1]).rotate(15, fillcolor=(124, 116, 104)))
    assert (OPERATIONS["rotate"](frames, 0.5)[1] == turned).all()
    darker = np.asarray(ImageEnhance.Brightness(Image.fromarray(frames[2])).enhance(0.1))
    assert (OPERATIONS["brightness"](frames, -1.0)[2] == darker).all()
    sharper = np.asarray(ImageEnhance.Sharpness(Image.fromarray(frames[2])).enhance(1.9))
    assert (OPERATIONS["sharpness"](frames, 1.0)[2] == sharper).all()


def test_the_same_draw_gives_the_same_clip_and_every_operation_comes_up():
    frames = frames_of()
    config = RandAugment(num_ops=1, magnitude=15)
    results = [rand_augment(frames, config, np.random.default_rng(seed)) for seed in range(300)]
    assert (results[7] == rand_augment(frames, config, np.random.default_rng(7))).all()
    both_ways = {out.tobytes() for out in results}
    expected = {operation(frames, sign * 0.5).tobytes() for operation in OPERATIONS.values() for sign in (1, -1)}
    assert both_ways == expected


def test_operations_are_chained():
    generator = np.random.default_rng(3)
    first = rand_augment(frames_of(), RandAugment(num_ops=1), generator)
    second = rand_augment(first, RandAugment(num_ops=1), generator)
    assert (rand_augment(frames_of(), RandAugment(num_ops=2), np.random.default_rng(3)) == second).all()


def test_bad_strengths_are_named():
    assert ColorJitter(brightness=1.5, hue=0.6).problems() == [
        "color.brightness is 1.5, it must be from 0 to 1",
        "color.hue is 0.6, it must be from 0 to 0.5",
    ]
    assert RandAugment(num_ops=-1, magnitude=31).problems() == [
        "rand_augment.num_ops is -1, it must be at least 0",
        "rand_augment.magnitude is 31, it must be from 0 to 30",
    ]
