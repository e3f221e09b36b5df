"""What the workers of a loader are doing now, for the error that says why a rank does not come.

Each worker has three numbers in memory that it shares with the training process (stage, sample, since when) and writes
them without a lock: a reader may see a change half done, which costs a wrong word in a message at worst.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, NamedTuple, Protocol

from data_shards.workers.memory import SharedMemory

IDLE, READING, DECODING, AUGMENTING, TAKING = range(5)
_WORDS = ("idle", "reading", "decoding", "augmenting", "taking its next request")
_FIELDS = 3  # stage, sample, since


class Describes(Protocol):
    """A packed split, or several."""

    def describe(self, sample_id: int) -> str:
        """Shard and key of a sample."""


class Doing(NamedTuple):
    """What one worker is at."""

    stage: int
    """`IDLE`, `READING`, ..."""
    sample_id: int
    """Which sample, where the stage is about one."""
    seconds: float
    """For how long."""

    def describe(self, sets: Describes) -> str:
        """`decoding shard-000003.tar:v_abc (sample 371) for 12.3 s`."""
        of_sample = self.stage in (READING, DECODING, AUGMENTING)
        what = f" {sets.describe(self.sample_id)} (sample {self.sample_id})" if of_sample else ""
        return f"{_WORDS[self.stage]}{what} for {self.seconds:.1f} s"


class WorkerActivity:
    """What each of `num_workers` workers is at; with no workers, what the training process itself is at."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._memory = SharedMemory(num_workers * _FIELDS * 8) if num_workers else None
        self._map()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_numbers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _map(self) -> None:
        # A memoryview: an element of it is written several times faster than one of an array.
        numbers = memoryview(bytearray(_FIELDS * 8)) if self._memory is None else memoryview(self._memory.buffer)
        self._numbers = numbers.cast("B").cast("d")

    def note(self, worker: int, sample_id: int, stage: int) -> None:
        """Worker `worker` begins `stage` of a sample (well below a microsecond)."""
        place = _FIELDS * worker
        numbers = self._numbers
        numbers[place] = stage
        numbers[place + 1] = sample_id
        numbers[place + 2] = perf_counter()  # one clock for all processes of a machine

    def of(self, worker: int) -> Doing:
        """What a worker is at now."""
        stage, sample_id, since = self._numbers[_FIELDS * worker : _FIELDS * (worker + 1)].tolist()
        return Doing(int(stage), int(sample_id), max(perf_counter() - since, 0.0))

    def describe(self, sets: Describes) -> str:
        """`worker 1: decoding shard-000003.tar:v_abc (sample 371) for 12.3 s`: who is at one thing for longest."""
        found = [(self.of(worker), worker) for worker in range(max(self._num_workers, 1))]
        busy = [(doing.seconds, worker, doing) for doing, worker in found if doing.stage != IDLE]
        if not busy:
            return "its workers are idle" if self._num_workers else ""
        _, worker, doing = max(busy)
        who = f"worker {worker}: " if self._num_workers else ""
        return f"{who}{doing.describe(sets)}"
