"""The size of the buckets, measured: `exchange.bucket_megabytes auto`.

Few large buckets waste no latency, and many small ones start to travel earlier; which wins depends on the model and the
network. So during the first steps each candidate is used for some steps, and what counts is the time from the first
gradient of a step to the last exchanged one, which has the backward pass in it: an exchange that slows the computation
down is not cheap for being hidden. The ranks take, for each step, the slowest rank's time, and choose the candidate
with the least median: the same numbers everywhere and so the same choice. Then the size stays, also in the checkpoints;
one that is written before ends the trying.
"""

from __future__ import annotations

import logging
import statistics
from typing import Any

from dist_train.collectives import Collectives
from dist_train.ledger.clock import clock_for
from dist_train.strategies.config import USUAL_BUCKET_MEGABYTES

logger = logging.getLogger(__name__)

CANDIDATE_MEGABYTES = (1.0, 4.0, 10.0, USUAL_BUCKET_MEGABYTES, 50.0, 100.0)
SETTLING_STEPS, MEASURED_STEPS = 1, 3


class BucketTuner:
    """Tries candidates over the steps of one phase and settles on one.

    Args:
        phase: its name, for the log.
        num_bytes: of all gradients of the phase; larger candidates are the same as one of this size.
        collectives: the ranks.
    """

    def __init__(self, phase: str, num_bytes: int, collectives: Collectives) -> None:
        self._phase, self._collectives = phase, collectives
        self._clock = clock_for(collectives.world.device)
        smaller = [int(megabytes * 1e6) for megabytes in CANDIDATE_MEGABYTES if megabytes * 1e6 < num_bytes]
        self._candidates = [*smaller, max(num_bytes, 1)]
        self._stamps: list[tuple[Any, Any]] = []  # of the measured steps: MEASURED_STEPS for each candidate
        self._began: Any = None
        self._steps = 0  # with the current candidate
        self.bucket_bytes = self._candidates[0]
        self.settled = False

    def exchange_begins(self) -> None:
        """The first gradient of a step is ready; later calls in the step do nothing."""
        if self._began is None and not self.settled:
            self._began = self._clock.stamp()

    def exchange_ends(self) -> bool:
        """The step's gradients are exchanged. True when `bucket_bytes` has changed. At times a collective."""
        began, self._began = self._began, None
        if self.settled:
            return False
        now = self._clock.stamp()
        self._steps += 1
        if self._steps > SETTLING_STEPS:
            self._stamps.append((now if began is None else began, now))
        if self._steps < SETTLING_STEPS + MEASURED_STEPS:
            return False
        self._steps = 0
        tried = len(self._stamps) // MEASURED_STEPS
        if tried == len(self._candidates):
            return self.settle()
        self.bucket_bytes = self._candidates[tried]
        return True

    def settle(self) -> bool:
        """Chooses among the candidates measured so far. True when `bucket_bytes` has changed. A collective."""
        if self.settled:
            return False
        self.settled = True
        before = self.bucket_bytes
        tried = len(self._stamps) // MEASURED_STEPS
        if tried == 0:
            self.bucket_bytes = min(int(USUAL_BUCKET_MEGABYTES * 1e6), self._candidates[-1])
            return self.bucket_bytes != before
        times = self._clock.resolve([stamp for pair in self._stamps[: tried * MEASURED_STEPS] for stamp in pair])
        mine = [end - begin for begin, end in zip(times[::2], times[1::2], strict=True)]
        slowest = self._collectives.max_of_floats(mine)
        medians = [
            statistics.median(slowest[first : first + MEASURED_STEPS])
            for first in range(0, tried * MEASURED_STEPS, MEASURED_STEPS)
        ]
        self.bucket_bytes = self._candidates[medians.index(min(medians))]
        if self._collectives.world.is_first:
            tries = ", ".join(
                f"{size / 1e6:g} MB {1e3 * seconds:.1f} ms"
                for size, seconds in zip(self._candidates, medians, strict=False)
            )
            logger.info("%s: buckets of %g MB (backward and exchange: %s)", self._phase, self.bucket_bytes / 1e6, tries)
        return self.bucket_bytes != before

    def fix(self, bucket_bytes: int) -> None:
        """Takes a size chosen earlier, by the run that is resumed."""
        self.bucket_bytes, self.settled = bucket_bytes, True
