"""Which sample comes at each position of a stream: plain epochs, class-balanced sampling, and mixtures of sets.

Every `SampleOrder` is a pure function of the position. It holds no state, so the stream is the same at any number of
ranks and workers and from any point of resume; `docs/order.md` has the figures.

    order = make_order([labels], OrderConfig(), seed=0, global_batch_clips=64)
    sets, samples, epochs, weights = order.at(np.arange(128, 192))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from data_shards.interleaving import Interleaving
from data_shards.order import sample_at
from data_shards.permutation import derive_keys, permute

PADDING = -1
"""Sample number of a position where nothing is: the clip is zeros and has weight 0."""

# Words that keep the keys of different uses of one seed apart (see `data_shards.order`).
_SETS, _CLASSES, _MEMBERS = 5, 6, 7


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """In which order a training stream visits the samples."""

    block_samples: int = 0
    """Shuffle blocks of so many neighbouring samples, for storage that reads in runs; 0: shuffle all of the set."""
    window_blocks: int = 16
    """Blocks that are mixed with each other when block_samples is set."""
    tail: Literal["wrap", "drop_last", "pad"] = "wrap"
    """What becomes of an epoch's last, partial batch: it goes on with the next epoch (`wrap`), is left out
    (`drop_last`), or is filled up with clips of weight 0, in evaluation to as many batches on every rank (`pad`)."""
    balance: Literal["none", "classes"] = "none"
    """`classes`: every class equally often, each class's samples in epochs of their own."""

    def __post_init__(self) -> None:
        problems = []
        if self.block_samples < 0:
            problems.append(f"block_samples is {self.block_samples}, it must be at least 0")
        if self.window_blocks < 1:
            problems.append(f"window_blocks is {self.window_blocks}, it must be at least 1")
        if self.tail not in ("wrap", "drop_last", "pad"):
            problems.append(f'tail is {self.tail!r}, it must be "wrap", "drop_last" or "pad"')
        if self.balance not in ("none", "classes"):
            problems.append(f'balance is {self.balance!r}, it must be "none" or "classes"')
        if self.balance == "classes" and self.tail != "wrap":
            problems.append(f'tail is "{self.tail}", but classes end their epochs at different places: use tail "wrap"')
        if self.balance == "classes" and self.block_samples:
            problems.append(
                f"block_samples is {self.block_samples}, but neighbours of one class are not neighbours in the shards: "
                'use 0, or balance "none"'
            )
        if problems:
            raise ValueError("order: " + "; ".join(problems))


class Visits(NamedTuple):
    """What comes at some positions; arrays of one length."""

    sets: np.ndarray
    """int64: number of the set."""
    samples: np.ndarray
    """int64: row of that set's manifest, or `PADDING`."""
    epochs: np.ndarray
    """int64: how often this sample has come before; (the set's seed, epoch, sample) decides a clip's random choices."""
    weights: np.ndarray
    """float32: 1, or 0 for a clip that only fills up a batch and must not count."""


class SampleOrder(Protocol):
    """A stream of samples."""

    @property
    def epoch_positions(self) -> int:
        """Positions that count as one epoch, for schedules and reports."""

    @property
    def set_seeds(self) -> tuple[int, ...]:
        """For each set the seed of its order and of its clips' random choices; the first set has the run's own."""

    def at(self, positions: np.ndarray) -> Visits:
        """What comes at `positions` (int64 (n,), each >= 0). O(n), whatever the positions are."""


class EpochOrder:
    """One set, epoch after epoch, each a shuffle of its own (`data_shards.order.sample_at`).

    With `drop_last` and `pad` an epoch is a whole number of global batches, so its extent goes with the size of the
    global batch: a stream goes on exactly at any number of ranks and workers, but not at another global batch.
    """

    def __init__(self, num_samples: int, config: OrderConfig, *, seed: int, global_batch_clips: int) -> None:
        self.set_seeds = (seed,)
        self._num_samples, self._config = num_samples, config
        self.epoch_positions = epoch_positions(num_samples, config.tail, global_batch_clips)

    def at(self, positions: np.ndarray) -> Visits:
        """See `SampleOrder.at`. With `pad` an epoch ends with its first samples again, at weight 0.

        Real clips, for empty ones would go into a batch norm's statistics.
        """
        epochs, places = np.divmod(positions, self.epoch_positions)
        samples = sample_at(
            epochs * self._num_samples + places % self._num_samples,
            seed=self.set_seeds[0],
            num_samples=self._num_samples,
            block_samples=self._config.block_samples,
            window_blocks=self._config.window_blocks,
        )
        weights = (places < self._num_samples).astype(np.float32)
        return Visits(np.zeros_like(samples), samples, epochs, weights)


class BalancedOrder:
    """One set, each class equally often: every class once a round, and within a class every sample once an epoch.

    Rounds shuffle the classes, epochs of a class shuffle its samples. Classes without samples are left out. Memory: a
    table of the samples by class, 4 bytes a sample.
    """

    def __init__(self, labels: np.ndarray, *, seed: int) -> None:
        if len(labels) == 0:
            raise ValueError("a set of 0 samples has no order: it needs at least one sample")
        self.set_seeds = (seed,)
        self.epoch_positions = len(labels)
        narrow = np.uint32 if len(labels) < 2**32 else np.uint64
        self._members = np.argsort(labels, kind="stable").astype(narrow)
        counts = np.bincount(labels)
        self._sizes = counts[counts > 0]
        self._firsts = np.cumsum(self._sizes) - self._sizes

    def at(self, positions: np.ndarray) -> Visits:
        """See `SampleOrder.at`; the epochs are those of the sample's class."""
        (seed,), num_classes = self.set_seeds, len(self._sizes)
        rounds, slots = np.divmod(positions, num_classes)
        classes = permute(slots, num_classes, keys=derive_keys(seed, _CLASSES, rounds))
        sizes = self._sizes[classes]
        epochs, places = np.divmod(rounds, sizes)
        places = permute(places, sizes, keys=derive_keys(seed, _MEMBERS, classes, epochs))
        samples = self._members[self._firsts[classes] + places].astype(np.int64)
        return Visits(np.zeros_like(samples), samples, epochs, np.ones(len(samples), np.float32))


class MixedOrder:
    """Several sets at fixed shares of the clips, each in its own order as if it were alone with its own seed.

    The shares hold in any stretch of positions (`data_shards.interleaving`). An epoch is as many positions as all sets
    have samples; each set's own epochs end where its share lets them.
    """

    def __init__(self, orders: Sequence[SampleOrder], shares: Sequence[float], *, seed: int) -> None:
        assert len(orders) == len(shares), (len(orders), len(shares))
        self.set_seeds = tuple(order.set_seeds[0] for order in orders)
        self.epoch_positions = sum(order.epoch_positions for order in orders)
        self._orders = tuple(orders)
        self._interleaving = Interleaving(shares, seed=seed)

    def at(self, positions: np.ndarray) -> Visits:
        """See `SampleOrder.at`; the epochs are those of the sample's set (or class)."""
        sets, places = self._interleaving.split(positions)
        samples, epochs = np.empty_like(sets), np.empty_like(sets)
        for number, order in enumerate(self._orders):
            chosen = sets == number
            if chosen.any():
                _, samples[chosen], epochs[chosen], _ = order.at(places[chosen])
        return Visits(sets, samples, epochs, np.ones(len(sets), np.float32))


class ManifestOrder:
    """Evaluation: every sample once, set after set, in the order of their manifests.

    `stop`: positions from here on are `PADDING` (a rank's part ends there; see `data_shards.order`).
    """

    def __init__(self, sizes: Sequence[int], *, stop: int | None = None) -> None:
        self.set_seeds = (0,) * len(sizes)
        self.epoch_positions = sum(sizes)
        self._firsts = np.cumsum([0, *sizes])[:-1]
        self._stop = self.epoch_positions if stop is None else stop

    def at(self, positions: np.ndarray) -> Visits:
        """See `SampleOrder.at`."""
        sets = np.searchsorted(self._firsts, positions, side="right") - 1
        real = positions < self._stop
        samples = np.where(real, positions - self._firsts[sets], PADDING)
        return Visits(sets, samples, np.zeros_like(sets), real.astype(np.float32))


def make_order(
    labels: Sequence[np.ndarray],
    config: OrderConfig,
    *,
    seed: int,
    global_batch_clips: int,
    shares: Sequence[float] = (),
) -> SampleOrder:
    """The training order of one set or of several; `labels`: of each set's samples, int (N,).

    `shares`: of the clips, one for each set; in proportion to their sizes where none are given, and then the sets'
    epochs end together. Raises ValueError for what does not fit together.
    """
    if config.tail != "wrap" and len(labels) > 1:
        raise ValueError(
            f'order: tail is "{config.tail}", but {len(labels)} sets end their epochs at different places: use "wrap"'
        )
    if shares and len(shares) != len(labels):
        raise ValueError(f"order: {len(shares)} shares are given for {len(labels)} sets: give one for each, or none")
    orders: list[SampleOrder] = []
    for number, of_set in enumerate(labels):
        set_seed = seed if number == 0 else int(derive_keys(seed, _SETS, number)[0])
        if config.balance == "classes":
            orders.append(BalancedOrder(of_set, seed=set_seed))
        else:
            orders.append(EpochOrder(len(of_set), config, seed=set_seed, global_batch_clips=global_batch_clips))
    if len(orders) == 1:
        return orders[0]
    return MixedOrder(orders, shares or [len(of_set) for of_set in labels], seed=seed)


def epoch_positions(num_samples: int, tail: Literal["wrap", "drop_last", "pad"], global_batch_clips: int) -> int:
    """Positions of an epoch of one set. Raises ValueError where `drop_last` would leave none."""
    if num_samples < 1:
        raise ValueError(f"a set of {num_samples} samples has no order: it needs at least one sample")
    if tail == "wrap":
        return num_samples
    if tail == "pad":
        return -(-num_samples // global_batch_clips) * global_batch_clips
    whole = num_samples // global_batch_clips * global_batch_clips
    if whole == 0:
        raise ValueError(
            f"{num_samples} samples are less than one global batch of {global_batch_clips} clips, so drop_last leaves "
            'nothing: use a smaller batch, or tail "wrap"'
        )
    return whole


def check_start(start: int, config: OrderConfig, global_batch_clips: int) -> None:
    """Raises ValueError where a stream with whole batches in each epoch cannot begin at position `start`."""
    if config.tail != "wrap" and start % global_batch_clips:
        raise ValueError(
            f'position {start} is not the start of a global batch of {global_batch_clips} clips: with tail "'
            f'{config.tail}" the epochs go with the size of the batch, so a run goes on with the batch it began with'
        )
