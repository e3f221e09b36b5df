"""Which frames of a video make a clip, and the random numbers of a sample.

All choices are pure functions of the number of frames and a generator made from (seed, epoch, sample id), so a sample's
clip is the same in whatever worker, rank or batch it is made.
"""

from functools import lru_cache

import numpy as np

from data_shards.permutation import derive_keys


def sample_generator(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: a counter-based generator, so no two samples share a stream."""
    key = np.array([_epoch_key(seed, epoch), sample_id], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def draw_below(limit: int, generator: np.random.Generator) -> int:
    """A uniform integer in `range(limit)`, from one double (NumPy's own integer streams differ between versions)."""
    return int(generator.random() * limit)


def segment_frames(
    num_frames: int,
    num_segments: int,
    generator: np.random.Generator | None = None,
    *,
    frames_per_segment: int = 1,
    clip: int = 0,
    num_clips: int = 1,
) -> np.ndarray:
    """TSN's segment sampling: a snippet of each of `num_segments` equal parts of the video; int64, ascending.

    A snippet is `frames_per_segment` frames in a row. It starts at random with a generator (training); without, clip
    number `clip` of `num_clips` starts in the middle of its own share of each part, so that the clips of a video are
    different frames (evaluation). The parts have real-valued borders, so no frame at the end is unreachable; a video
    with fewer frames than segments repeats frames, one shorter than a snippet its last.
    Source: Wang et al., "Temporal Segment Networks" (ECCV 2016), section 3.1; the middle frame as in TSM's code.
    """
    _check_counts(num_frames, num_segments * frames_per_segment)
    num_starts = max(num_frames - frames_per_segment + 1, 1)
    offsets = (clip + 0.5) / num_clips if generator is None else generator.random(num_segments)
    places = (np.arange(num_segments) + offsets) * (num_starts / num_segments)
    starts = np.minimum(places.astype(np.int64), num_starts - 1)
    return np.minimum(_snippets(starts, frames_per_segment), num_frames - 1)


def dense_frames(
    num_frames: int,
    num_segments: int,
    window_frames: int,
    generator: np.random.Generator | None = None,
    *,
    frames_per_segment: int = 1,
    clip: int = 0,
    num_clips: int = 1,
) -> np.ndarray:
    """Dense sampling: `num_segments` snippets, `window_frames // num_segments` frames apart; int64.

    The window starts at random with a generator (training). Without, `num_clips` windows start evenly from the first
    possible frame to the last, and this is number `clip` of them; a single one lies in the middle (evaluation). A video
    shorter than the window is wrapped around (frame numbers modulo `num_frames`), as the I3D protocol of TSM's code
    does, but never within a snippet; one shorter than a snippet repeats its last frame. Source: TSM's `ops/dataset.py`,
    `dense_sample`, but a single window centered.
    """
    _check_counts(num_frames, num_segments * frames_per_segment)
    if window_frames < num_segments:
        raise ValueError(f"a window of {window_frames} frames cannot hold {num_segments} different frames")
    num_starts = max(num_frames - frames_per_segment + 1, 1)
    apart = np.arange(num_segments) * (window_frames // num_segments)
    last_start = max(min(num_frames - window_frames, num_starts - 1 - int(apart[-1])), 0)
    if generator is not None:
        start = draw_below(last_start + 1, generator)
    elif num_clips == 1:
        start = last_start // 2
    else:
        start = last_start * clip // (num_clips - 1)
    return np.minimum(_snippets((start + apart) % num_starts, frames_per_segment), num_frames - 1)


def _snippets(starts: np.ndarray, frames_per_segment: int) -> np.ndarray:
    """Each start and the frames after it, one snippet after the other."""
    return (starts[:, None] + np.arange(frames_per_segment)).ravel()


@lru_cache(maxsize=16)
def _epoch_key(seed: int, epoch: int) -> int:
    return int(derive_keys(seed, epoch)[0])


def _check_counts(num_frames: int, num_segments: int) -> None:
    if num_frames < 1 or num_segments < 1:
        raise ValueError(f"{num_segments} frames cannot be taken of a video of {num_frames} frames")
