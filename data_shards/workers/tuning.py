"""How many workers and slabs a loader has with `auto`: decided from where the time of the last seconds went.

    who waits                                    what is done
    the training, workers are busy               more workers, in proportion to the share of time waited
    the training, workers wait for slabs too     more slabs: the batches take unevenly long
    workers, for more than one worker's time     fewer workers
    nobody, or more did not help                 nothing

A change that did not raise the rate is taken back, and not tried again for a while. What the batches hold depends on
none of this.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

logger = logging.getLogger(__name__)

MAX_PREFETCH = 8
"""Batches that a worker makes ahead at most."""
_START_WORKERS, _START_PREFETCH = 2, 2
_WINDOW_SECONDS, _WINDOW_BATCHES = 4.0, 16
_SETTLING_SECONDS = 1.0  # after a change, not looked at
_WAITS, _WAITS_NOT = 0.05, 0.01  # shares of the training's time
_UNEVEN = 0.25  # share of the workers' time that they wait for slabs while the training waits for batches
_SPARE = 1.25  # workers kept for those that are busy
_GAIN = 1.03  # of the rate, for which another worker is kept
_PATIENCE_WINDOWS = 30  # before more workers are tried again


class Size(NamedTuple):
    """What a loader has."""

    num_workers: int
    """Worker processes."""
    prefetch: int
    """Batches that each makes ahead."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where the time went for a while."""

    seconds: float
    """Time of the training process."""
    waited_seconds: float
    """Of these, spent waiting for batches."""
    worker_seconds: float
    """Time of all workers."""
    idle_seconds: float
    """Of these, spent waiting for a slab or a request."""
    num_batches: int
    """Batches used."""

    @property
    def rate(self) -> float:
        """Batches a second."""
        return self.num_batches / self.seconds

    @property
    def wait_share(self) -> float:
        """Share of the training's time that it waited."""
        return self.waited_seconds / self.seconds

    @property
    def idle_share(self) -> float:
        """Share of the workers' time that they waited."""
        return self.idle_seconds / self.worker_seconds if self.worker_seconds else 0.0


def better_size(window: Window, size: Size, most: Size) -> Size:
    """What a loader of `size` should have, judged by `window`; at most `most`."""
    if window.wait_share > _WAITS:
        if window.idle_share > _UNEVEN and size.prefetch < most.prefetch:
            return Size(size.num_workers, min(size.prefetch * 2, most.prefetch))
        needed = math.ceil(size.num_workers / max(1 - window.wait_share, 0.5))  # at most doubled at once
        return Size(min(max(needed, size.num_workers + 1), most.num_workers), size.prefetch)
    if window.wait_share < _WAITS_NOT:
        busy = size.num_workers * (1 - window.idle_share)
        return Size(max(min(size.num_workers, math.ceil(busy * _SPARE)), 1), size.prefetch)
    return size


class Tuner:
    """Watches a loader's batches and says when it should change.

    Args:
        fixed: what must not change: None where it may.
        most: what the machine has room for.
    """

    def __init__(self, *, num_workers: int | None, prefetch: int | None, most: Size) -> None:
        self._most = Size(most.num_workers if num_workers is None else num_workers, most.prefetch)
        self._fixed_workers, self._fixed_prefetch = num_workers, prefetch
        self.size = Size(
            min(_START_WORKERS, most.num_workers) if num_workers is None else num_workers,
            min(_START_PREFETCH, most.prefetch) if prefetch is None else prefetch,
        )
        self._before: tuple[Size, float] | None = None
        self._patience = 0
        self.restart()

    def restart(self, *, settling: bool = True) -> None:
        """What came before says nothing about what comes: a stream begins, or the loader has changed."""
        now = perf_counter()
        self._settled = now + (_SETTLING_SECONDS if settling else 0.0)
        self._begun = self._last = now
        self._waited = self._worker = self._idle = self._longest = 0.0
        self._num_batches = 0

    def observe(self, costs: Mapping[str, float]) -> Size | None:
        """Count a batch that was just handed out; a new size where the loader should have one."""
        now = perf_counter()
        if now < self._settled:
            self._begun = self._last = now
            return None
        self._longest = max(self._longest, now - self._last - costs["wait_seconds"])
        self._last = now
        self._waited += costs["wait_seconds"]
        self._worker += costs["wall_seconds"]
        self._idle += costs["idle_seconds"]
        self._num_batches += 1
        seconds = now - self._begun
        if seconds < _WINDOW_SECONDS or self._num_batches < _WINDOW_BATCHES:
            return None
        window = Window(
            seconds=seconds,
            waited_seconds=self._waited,
            worker_seconds=self._worker,
            idle_seconds=self._idle,
            num_batches=self._num_batches,
        )
        paused = self._longest > seconds / 2  # an evaluation, a checkpoint: not what steps are like
        self.restart(settling=False)
        return None if paused else self.judge(window)

    def judge(self, window: Window) -> Size | None:
        """A new size after `window`, or None; logs what is changed and why."""
        size, before = self.size, self._before
        self._before = None
        if before is not None and before[0].num_workers < size.num_workers and window.rate < before[1] * _GAIN:
            self._patience = _PATIENCE_WINDOWS
            return self._change(before[0], window, f"{size.num_workers} gave no more")
        found = better_size(window, size, self._most)
        num_workers = found.num_workers if self._fixed_workers is None else self._fixed_workers
        if self._patience and num_workers > size.num_workers:
            self._patience -= 1
            num_workers = size.num_workers
        found = Size(num_workers, found.prefetch if self._fixed_prefetch is None else self._fixed_prefetch)
        if found == size:
            return None
        self._before = (size, window.rate)
        return self._change(found, window, "")

    def _change(self, found: Size, window: Window, why: str) -> Size:
        size = self.size
        logger.info(
            "loader: %d -> %d workers, %d -> %d batches ahead each: waited %.0f%% of the last %.1f s, workers idle "
            "%.0f%%%s",
            size.num_workers,
            found.num_workers,
            size.prefetch,
            found.prefetch,
            100 * window.wait_share,
            window.seconds,
            100 * window.idle_share,
            f"; {why}" if why else "",
        )
        self.size = found
        self.restart()
        return found
