"""What to make of a worker that has ended: another takes its place, or that would come to nothing and is an error."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable, Sequence

from data_shards.activity import IDLE, TAKING, Describes, Doing
from data_shards.workers.accounts import WorkerAccount

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Workers that a batch, a sample or a start may end before that is an error."""
HUNG = "hung"


class Failures:
    """Counts what ended workers had been at.

    Args:
        sets: describes samples.
        refuse: lets no worker touch a sample any more, False where it cannot; None: such a sample is an error.
    """

    def __init__(self, sets: Describes, *, refuse: Callable[[int], bool] | None) -> None:
        self._sets, self._refuse = sets, refuse
        self._starts: Counter[int] = Counter()
        self._samples: Counter[int] = Counter()
        self._batches: Counter[int] = Counter()

    def started(self, worker: int) -> None:
        """A worker is ready."""
        del self._starts[worker]

    def new_stream(self) -> None:
        """Batches have other numbers from now on."""
        self._batches.clear()
        self._samples.clear()

    def ended(self, account: WorkerAccount, doing: Doing, again: Sequence[int], code: int | None) -> None:
        """A worker has ended that should not have: says so, and how in its account (`HUNG` where it was ended).

        Args:
            doing: what it was at.
            again: the batches that it had taken, to be made again.
            code: its exit code, None where it does not end.

        Raises RuntimeError where another worker would only end in the same way.
        """
        named = f"data worker {account.worker} (pid {account.pid})"
        at_sample = doing.stage not in (IDLE, TAKING)
        if account.end == HUNG:
            said = f"{named} has been {doing.describe(self._sets)} and was ended"
        else:
            account.end = _how(code)
            said = f"{named} {account.end}" + (f", {doing.describe(self._sets)}" if at_sample else "")
        if account.ready is None:
            self._count_start(account.worker, said, code)
        if at_sample:
            self._count_sample(doing.sample_id, said)
        if again:
            self._count_batch(min(again), said)  # it was at the first, and held the others
        logger.warning("%s; another takes its place%s", said, ", its batch is made again" if again else "")

    def held_too_much(self, account: WorkerAccount, max_bytes: int) -> None:
        """A worker has ended itself for its memory. Raises RuntimeError where every worker would, after one batch."""
        account.end = "held too much memory"
        said = f"data worker {account.worker} (pid {account.pid}) held {account.peak_bytes >> 20} MiB after"
        may = f"it may hold {max_bytes >> 20}"
        if account.num_batches <= 1:
            raise RuntimeError(f"{said} its first batch, {may}: raise worker_memory_mib")
        logger.warning("%s %d batches, %s: another takes its place", said, account.num_batches, may)

    def _count_start(self, worker: int, said: str, code: int | None) -> None:
        self._starts[worker] += 1
        if (code is not None and code >= 0) or self._starts[worker] >= MAX_DEATHS:
            raise RuntimeError(
                f'{said}; see its own message above; a script needs `if __name__ == "__main__":` to use workers'
            )

    def _count_sample(self, sample_id: int, said: str) -> None:
        self._samples[sample_id] += 1
        if self._samples[sample_id] != MAX_DEATHS:
            return
        where = f"sample {sample_id}, {self._sets.describe(sample_id)},"
        if self._refuse is None or not self._refuse(sample_id):
            raise RuntimeError(f"{where} has ended {MAX_DEATHS} data workers, one after the other; the last: {said}")
        logger.warning("%s has ended %d data workers and is skipped from now on", where, MAX_DEATHS)

    def _count_batch(self, number: int, said: str) -> None:
        self._batches[number] += 1
        if self._batches[number] >= MAX_DEATHS * (1 if self._refuse is None else 2):  # a refused sample had its share
            raise RuntimeError(
                f"{said}; {self._batches[number]} workers have ended over the same batch: if the machine ran out of "
                "memory, lower num_workers, prefetch_batches or the batch"
            )


def _how(code: int | None) -> str:
    if code is None:
        return "does not end"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
