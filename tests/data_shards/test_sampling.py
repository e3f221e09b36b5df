"""Frames of a clip are random in training, centered in evaluation, and always exist."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.sampling import dense_frames, draw_below, sample_generator, segment_frames

FRAMES = st.integers(1, 2000)
SEGMENTS = st.integers(1, 40)


def test_evaluation_takes_the_middle_of_each_segment_as_tsm_does():
    assert segment_frames(32, 8).tolist() == [2, 6, 10, 14, 18, 22, 26, 30]
    for num_frames in (8, 61, 300):  # TSM's ops/dataset.py: tick = n / T; int(tick / 2.0 + tick * x)
        tick = num_frames / 8
        assert segment_frames(num_frames, 8).tolist() == [int(tick / 2.0 + tick * x) for x in range(8)]


@given(FRAMES, SEGMENTS, st.integers(0, 99))
def test_each_segment_gives_one_frame_of_its_own(num_frames, num_segments, seed):
    frames = segment_frames(num_frames, num_segments, np.random.default_rng(seed))
    assert frames.shape == (num_segments,)
    borders = np.arange(num_segments + 1) * num_frames / num_segments
    assert (frames >= np.floor(borders[:-1])).all()
    assert (frames < np.ceil(borders[1:])).all()


def test_training_reaches_every_frame_equally_often():
    generator = np.random.default_rng(0)
    taken = np.concatenate([segment_frames(29, 8, generator) for _ in range(4000)])
    counts = np.bincount(taken, minlength=29)
    assert len(counts) == 29
    assert abs(counts / (4000 * 8 / 29) - 1).max() < 0.12


@given(FRAMES, SEGMENTS, st.integers(0, 99), st.booleans())
def test_dense_frames_are_evenly_spaced_in_a_window_that_exists(num_frames, num_segments, seed, training):
    generator = np.random.default_rng(seed) if training else None
    frames = dense_frames(num_frames, num_segments, 64, generator)
    assert frames.min() >= 0
    assert frames.max() < num_frames
    if num_frames >= 64:
        assert set(np.diff(frames).tolist()) <= {64 // num_segments}


def test_dense_evaluation_is_centered_and_training_is_not():
    assert dense_frames(300, 8, 64).tolist() == list(range(118, 118 + 64, 8))
    starts = {dense_frames(300, 8, 64, np.random.default_rng(seed))[0] for seed in range(2000)}
    assert min(starts) == 0
    assert max(starts) == 300 - 64


def test_a_video_shorter_than_the_window_wraps_around():
    assert dense_frames(20, 8, 64).tolist() == [0, 8, 16, 4, 12, 0, 8, 16]


def test_random_numbers_depend_on_seed_epoch_and_sample_only():
    first = sample_generator(1, 2, 3).random(4).tolist()
    assert sample_generator(1, 2, 3).random(4).tolist() == first
    others = [sample_generator(*key).random(4).tolist() for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3))]
    assert first not in others
    assert len({tuple(values) for values in others}) == 4
    assert first == pytest.approx(GOLDEN_RANDOM, abs=1e-12)


def test_draws_cover_the_range_evenly():
    generator = sample_generator(0, 0, 0)
    counts = np.bincount([draw_below(7, generator) for _ in range(7000)], minlength=7)
    assert len(counts) == 7
    assert abs(counts / 1000 - 1).max() < 0.12


@pytest.mark.parametrize("arguments", [(0, 8), (8, 0)])
def test_empty_videos_and_clips_are_refused(arguments):
    with pytest.raises(ValueError, match="cannot be taken of a video"):
        segment_frames(*arguments)
    with pytest.raises(ValueError, match="cannot be taken of a video"):
        dense_frames(*arguments, 64)


def test_a_window_too_short_for_the_clip_is_refused():
    with pytest.raises(ValueError, match="a window of 4 frames cannot hold 8"):
        dense_frames(100, 8, 4)


@pytest.mark.parametrize("num_frames", [64, 65, 250, 300])
def test_ten_dense_clips_start_where_tsms_do(num_frames):
    clips = [dense_frames(num_frames, 8, 64, clip=number, num_clips=10) for number in range(10)]
    last = max(1, 1 + num_frames - 64) - 1  # TSM's ops/dataset.py: linspace(0, sample_pos - 1, num=10, dtype=int)
    assert [int(clip[0]) for clip in clips] == [int(Fraction(last * number, 9)) for number in range(10)]
    assert all(np.diff(clip).tolist() == [8] * 7 for clip in clips)


@given(FRAMES, SEGMENTS, st.integers(1, 12))
def test_the_clips_of_a_video_take_turns_in_each_segment(num_frames, num_segments, num_clips):
    clips = [segment_frames(num_frames, num_segments, clip=number, num_clips=num_clips) for number in range(num_clips)]
    together = np.stack(clips, axis=1).ravel()
    assert (np.diff(together) >= 0).all()
    if num_frames >= num_segments * num_clips:
        assert len(set(together.tolist())) == len(together)
    assert (segment_frames(num_frames, num_segments) == segment_frames(num_frames, num_segments, num_clips=1)).all()


@given(FRAMES, SEGMENTS, st.integers(1, 8), st.integers(0, 99), st.booleans(), st.booleans())
def test_snippets_are_frames_in_a_row_that_exist(num_frames, num_segments, length, seed, training, dense):
    generator = np.random.default_rng(seed) if training else None
    if dense:
        frames = dense_frames(num_frames, num_segments, 64, generator, frames_per_segment=length)
    else:
        frames = segment_frames(num_frames, num_segments, generator, frames_per_segment=length)
    snippets = frames.reshape(num_segments, length)
    assert snippets.min() >= 0
    assert snippets.max() < num_frames
    steps = np.diff(snippets, axis=1)
    assert set(steps.ravel().tolist()) <= {1, 0 if num_frames < length else 1}


def test_snippets_of_a_dense_window_stay_where_the_video_holds_it():
    last = dense_frames(100, 16, 64, frames_per_segment=6, clip=1, num_clips=2).reshape(16, 6)
    assert last[:, 0].tolist() == [34 + 4 * number for number in range(16)]  # frames 94 to 99 are the last snippet


def test_snippets_reach_the_last_frame():
    taken = [segment_frames(20, 4, np.random.default_rng(seed), frames_per_segment=6).max() for seed in range(300)]
    assert max(taken) == 19


GOLDEN_RANDOM = [0.9962209585169738, 0.23407290310775375, 0.8824255490313213, 0.1367799616780888]
