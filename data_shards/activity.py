"""What the workers of a loader are doing now, for the error that says why a rank does not come.

Each worker has three numbers in memory that it shares with the training process (stage, sample, since when) and writes
them without a lock: a reader may see a change half done, which costs a wrong word in a message at worst.
"""

from __future__ import annotations

from multiprocessing.context import ForkServerContext
from time import perf_counter
from typing import Any

from data_shards.manifest import Manifest

IDLE, READING, DECODING, AUGMENTING = range(4)
_WORDS = ("idle", "reading", "decoding", "augmenting")
_FIELDS = 3  # stage, sample, since


class WorkerActivity:
    """What each worker is at; with no workers, what the training process itself is at.

    Args:
        num_workers: of the loader.
        context: of the worker processes; None without workers.
    """

    def __init__(self, num_workers: int, context: ForkServerContext | None) -> None:
        self._num_workers = num_workers
        self._numbers: Any = [0.0] * _FIELDS if context is None else context.RawArray("d", _FIELDS * num_workers)

    def note(self, worker: int, sample_id: int, stage: int) -> None:
        """Worker `worker` begins `stage` of a sample (well below a microsecond)."""
        place = _FIELDS * worker
        self._numbers[place] = stage
        self._numbers[place + 1] = sample_id
        self._numbers[place + 2] = perf_counter()  # one clock for all processes of a machine

    def describe(self, manifest: Manifest) -> str:
        """`worker 1: decoding shard-000003.tar:v_abc (sample 371) for 12.3 s`: who is at one thing for longest."""
        numbers = list(self._numbers)
        rows = [numbers[start : start + _FIELDS] for start in range(0, len(numbers), _FIELDS)]
        busy = [(since, worker, stage, sample) for worker, (stage, sample, since) in enumerate(rows) if stage != IDLE]
        if not busy:
            return "its workers are idle" if self._num_workers else ""
        since, worker, stage, sample = min(busy)
        who = f"worker {worker}: " if self._num_workers else ""
        sample_id = int(sample)
        seconds = perf_counter() - since
        return f"{who}{_WORDS[int(stage)]} {manifest.describe(sample_id)} (sample {sample_id}) for {seconds:.1f} s"
