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


def segment_frames(num_frames: int, num_segments: int, generator: np.random.Generator | None = None) -> np.ndarray:
    """TSN's segment sampling: one frame of each of `num_segments` equal parts of the video; int64, ascending.

    A random one with a generator (training), the middle one without (evaluation). The parts have real-valued borders,
    so no frame at the end is unreachable and a video with fewer frames than segments repeats frames.
    Source: Wang et al., "Temporal Segment Networks" (ECCV 2016), section 3.1; the middle frame as in TSM's code.
    """
    _check_counts(num_frames, num_segments)
    offsets = 0.5 if generator is None else generator.random(num_segments)
    places = (np.arange(num_segments) + offsets) * (num_frames / num_segments)
    return np.minimum(places.astype(np.int64), num_frames - 1)


def dense_frames(
    num_frames: int, num_segments: int, window_frames: int, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Dense sampling: `num_segments` frames, `window_frames // num_segments` apart; int64.

    The window starts at a random frame with a generator (training), else so that it lies in the middle. A video shorter
    than the window is wrapped around (frame numbers modulo `num_frames`), as the I3D protocol of TSM's code does.
    Source: TSM's `ops/dataset.py`, `dense_sample`, but centered in evaluation.
    """
    _check_counts(num_frames, num_segments)
    if window_frames < num_segments:
        raise ValueError(f"a window of {window_frames} frames cannot hold {num_segments} different frames")
    num_starts = max(num_frames - window_frames + 1, 1)
    start = (num_starts - 1) // 2 if generator is None else draw_below(num_starts, generator)
    return (start + np.arange(num_segments) * (window_frames // num_segments)) % num_frames


@lru_cache(maxsize=16)
def _epoch_key(seed: int, epoch: int) -> int:
    return int(derive_keys(seed, epoch)[0])


def _check_counts(num_frames: int, num_segments: int) -> None:
    if num_frames < 1 or num_segments < 1:
        raise ValueError(f"{num_segments} frames cannot be taken of a video of {num_frames} frames")
