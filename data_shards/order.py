"""The sample order: position in the endless stream of epochs -> sample id, and which positions a rank takes.

Position `p` belongs to epoch `p // num_samples`; within an epoch the order is a bijection, so every epoch visits each
sample exactly once whatever the batch size, the number of ranks or the point of resume. Nothing is kept between calls:
the loader's whole state is one integer, and the position alone says what comes next.

    >>> sample_at(np.arange(6), seed=0, num_samples=3)      # two epochs of three samples, each in its own order

Global batch `k` of a run is positions `[k * B, (k + 1) * B)`. It runs across the border of two epochs where `B` does
not divide `num_samples`: nothing is dropped and nothing is repeated to fill a batch.
"""

import numpy as np

from data_shards.permutation import derive_keys, permute

# Words that keep the keys of different uses of one seed apart.
_SAMPLES, _ROTATION, _BLOCKS, _WINDOWS = 1, 2, 3, 4


def sample_at(
    positions: np.ndarray | int,
    *,
    seed: int,
    num_samples: int,
    block_samples: int = 0,
    window_blocks: int = 16,
) -> np.ndarray:
    """Sample ids at `positions` (an int, or an array of ints >= 0) of the endless shuffled stream: int64, same shape.

    `block_samples=0`: a full keyed permutation of each epoch. Otherwise a block shuffle, for storage that likes
    neighbors: the samples form a ring that each epoch starts at another place; the ring is cut in blocks of
    `block_samples`, the blocks are permuted, and the samples are permuted within windows of `window_blocks` blocks in a
    row. Reads of one window then touch `window_blocks` runs of neighbors. A last block that is short stays in the last
    window; the rotation makes it another one in each epoch.

    O(1) memory at any `num_samples`. Raises ValueError for a negative position or an empty set.
    """
    flat = np.atleast_1d(np.asarray(positions, dtype=np.int64)).ravel()
    _check_stream(flat, num_samples, block_samples, window_blocks)
    epochs, indices = np.divmod(flat, num_samples)
    if flat.size and epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
        epochs = epochs[:1]
    if block_samples == 0:
        samples = permute(indices, num_samples, keys=derive_keys(seed, _SAMPLES, epochs))
    else:
        samples = _block_shuffle(indices, epochs, seed, num_samples, block_samples, window_blocks)
    return samples.reshape(np.shape(positions))


def rank_positions(start: int, global_batch: int, rank: int, world_size: int, micro_batches: int = 1) -> np.ndarray:
    """Positions that `rank` takes of the global batch `[start, start + global_batch)`: int64 (micro_batches, clips).

    Ranks take contiguous slices of equal size, each cut in `micro_batches` contiguous parts. Raises ValueError where
    the batch does not divide evenly or the rank does not exist.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist in a world of {world_size}: ranks count from 0")
    if micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches}: it must be at least 1")
    parts = world_size * micro_batches
    if global_batch < 1 or global_batch % parts:
        nearest = max(round(global_batch / parts), 1) * parts
        raise ValueError(
            f"a global batch of {global_batch} clips does not divide by {world_size} ranks x {micro_batches} "
            f"micro-batches: use a multiple of {parts}, for example {nearest}"
        )
    if start < 0:
        raise ValueError(f"start position {start} is negative: positions count from 0")
    clips = global_batch // parts
    first = start + rank * micro_batches * clips
    return np.arange(first, first + micro_batches * clips, dtype=np.int64).reshape(micro_batches, clips)


def evaluation_positions(num_samples: int, rank: int, world_size: int) -> range:
    """Sample ids that `rank` evaluates, in order: contiguous, each sample on exactly one rank at any world size.

    Ranks differ by at most one sample, and are empty where there are fewer samples than ranks: no sample is counted
    twice to make them even. Raises ValueError where the rank does not exist.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist in a world of {world_size}: ranks count from 0")
    return range(num_samples * rank // world_size, num_samples * (rank + 1) // world_size)


def evaluation_requests(
    num_samples: int, rank: int, world_size: int, batch_clips: int, *, pad: bool
) -> list[tuple[int, int]]:
    """(first position, clips) of each batch that `rank` evaluates.

    Without `pad` the last batch is smaller where the rank's part does not divide, and a rank may get none. With it
    every rank gets the same number of batches, all of `batch_clips`; what lies beyond the end of the rank's part only
    fills up (`ManifestOrder(stop=...)` of `data_shards.sample_order`). Raises as `evaluation_positions` does.
    """
    part = evaluation_positions(num_samples, rank, world_size)
    if not pad:
        return [(start, min(batch_clips, part.stop - start)) for start in range(part.start, part.stop, batch_clips)]
    longest = -(-num_samples // world_size)
    return [(part.start + place, batch_clips) for place in range(0, longest, batch_clips)]


def _block_shuffle(
    indices: np.ndarray, epochs: np.ndarray, seed: int, num_samples: int, block: int, window_blocks: int
) -> np.ndarray:
    """`indices` within their epochs -> sample ids, by windows, blocks and the rotated ring (see `sample_at`)."""
    window = min(window_blocks * block, num_samples)
    window_numbers, within = np.divmod(indices, window)
    window_keys = derive_keys(seed, _WINDOWS, epochs, window_numbers)
    places = np.empty_like(indices)
    last_start = num_samples // window * window
    for selected, size in ((indices < last_start, window), (indices >= last_start, num_samples - last_start)):
        if selected.any():
            places[selected] = permute(within[selected], size, keys=window_keys[selected])
    places += window_numbers * window

    num_full_blocks = num_samples // block
    block_numbers, offsets = np.divmod(places, block)
    full = block_numbers < num_full_blocks
    if full.any():
        block_keys = np.broadcast_to(derive_keys(seed, _BLOCKS, epochs), indices.shape)
        block_numbers[full] = permute(block_numbers[full], num_full_blocks, keys=block_keys[full])
    rotations = (derive_keys(seed, _ROTATION, epochs) % np.uint64(num_samples)).astype(np.int64)
    return (block_numbers * block + offsets + rotations) % num_samples


def _check_stream(positions: np.ndarray, num_samples: int, block_samples: int, window_blocks: int) -> None:
    if num_samples < 1:
        raise ValueError(f"a set of {num_samples} samples has no order: it needs at least one sample")
    if positions.size and positions.min() < 0:
        raise ValueError(f"position {positions.min()} is negative: positions count from 0, the first clip of a run")
    if block_samples < 0:
        raise ValueError(f"block_samples is {block_samples}: use 0 (full shuffle) or the samples of one block")
    if window_blocks < 1:
        raise ValueError(f"window_blocks is {window_blocks}: a window holds at least one block")
