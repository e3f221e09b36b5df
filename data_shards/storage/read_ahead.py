"""Reads in threads what is wanted next, before it is asked for.

    ahead = ReadAhead(storage, max_bytes=64 << 20, num_threads=8)
    ahead.want(5, "shard-000000.tar", reads)     # returns at once; a thread goes through `reads`
    held = ahead.take(5)                         # when sample 5's turn has come; None: nobody has begun, read it
    held.parts([(512, 1000)], costs)             # waits for the thread; None: not what was wanted, read it

What is wanted is a generator and not a list of ranges: a sample stored as frames begins with a table, and which bytes
are wanted next follows from it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from time import perf_counter

from data_shards.errors import DataError
from data_shards.storage.base import ReadCosts, Storage

Reads = Generator[Sequence[tuple[int, int]], list[bytes], None]
"""The reads of one sample, one after the other: yields (offset, size) ranges of its file, is sent their bytes."""


class Held:
    """The bytes of one wanted sample, read or being read."""

    def __init__(self, name: str, reads: Reads) -> None:
        self.begun = False
        self._name, self._reads = name, reads
        self._costs = ReadCosts()
        self._pieces: list[tuple[int, bytes]] = []
        self._error: Exception | None = None
        self._done = threading.Event()

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return sum(len(piece) for _, piece in self._pieces.copy())

    def parts(self, ranges: Sequence[tuple[int, int]], costs: ReadCosts) -> list[bytes] | None:
        """The bytes of each (offset, size), once the thread is done; None where any was not among the wanted.

        `costs` gets the seconds that this waited; the first call also gives it the bytes that the thread has read.

        Raises what reading them raised: OSError after the storage's own retries.
        """
        started = perf_counter()
        self._done.wait()
        costs.add_read_ahead(self._costs, waited_seconds=perf_counter() - started)
        self._costs = ReadCosts()
        if self._error is not None:
            raise self._error
        found = [self._part(offset, size) for offset, size in ranges]
        return [part for part in found if part is not None] if None not in found else None

    def fill(self, storage: Storage) -> None:
        """Go through the reads: the thread's work."""
        try:
            ranges = next(self._reads)
            while True:
                found = storage.read(self._name, ranges, self._costs)
                self._pieces += [(offset, piece) for (offset, _), piece in zip(ranges, found, strict=True)]
                ranges = self._reads.send(found)
        except (StopIteration, DataError):  # a damaged table: whoever decodes the sample finds and names it
            pass
        except Exception as error:
            self._error = error  # raised where the sample is asked for
        finally:
            self._done.set()

    def _part(self, offset: int, size: int) -> bytes | None:
        for start, piece in self._pieces:
            if start <= offset and offset + size <= start + len(piece):
                return piece if size == len(piece) else piece[offset - start : offset - start + size]
        return None


class ReadAhead:
    """Goes through wanted reads in the order in which they were wanted, `num_threads` of them at a time.

    A next one is begun while less than `max_bytes` are held, so memory is bounded by that and a sample a thread. Whose
    turn comes before a thread has begun is left to the caller, so nothing ever waits for a full memory. All methods
    belong to one thread, and the threads end with the process.
    """

    def __init__(self, storage: Storage, *, max_bytes: int, num_threads: int) -> None:
        self._storage, self._max_bytes, self._num_threads = storage, max_bytes, num_threads
        self._changed = threading.Condition()
        self._queue: deque[Held] = deque()
        self._wanted: dict[Hashable, deque[Held]] = {}
        self._held: set[Held] = set()
        self._stopped: threading.Event | None = None

    def want(self, key: Hashable, name: str, reads: Reads) -> None:
        """Have `reads` of file `name` gone through after all that was wanted before; `take(key)` gets the bytes."""
        held = Held(name, reads)
        with self._changed:
            self._queue.append(held)
            self._wanted.setdefault(key, deque()).append(held)
            self._changed.notify()
        if self._stopped is None:
            self._start()

    def take(self, key: Hashable) -> Held | None:
        """What was first wanted under `key`, now the caller's; None where no thread has begun it, or nobody wanted it.

        A key that was wanted twice is taken twice, in order.
        """
        with self._changed:
            wanted = self._wanted.get(key)
            if not wanted:
                return None
            held = wanted.popleft()
            if not wanted:
                del self._wanted[key]
            self._held.discard(held)
            self._changed.notify()
            if held.begun:
                return held
            self._queue.remove(held)
            return None

    def forget(self) -> None:
        """Drop all that was wanted: the order has changed. What a thread is at, it ends, for nobody."""
        with self._changed:
            self._queue.clear()
            self._wanted.clear()
            self._held.clear()

    def close(self) -> None:
        """Forget all and let the threads end, each after the read that it is at; the object can be used again."""
        self.forget()
        with self._changed:
            if self._stopped is not None:
                self._stopped.set()
            self._stopped = None
            self._changed.notify_all()

    def _start(self) -> None:
        self._stopped = threading.Event()
        for number in range(self._num_threads):
            threading.Thread(target=self._work, args=(self._stopped,), name=f"read-ahead-{number}", daemon=True).start()

    def _work(self, stopped: threading.Event) -> None:
        storage = self._storage.for_thread()
        while True:
            with self._changed:
                while not stopped.is_set() and not (self._queue and self._has_room()):
                    self._changed.wait()
                if stopped.is_set():
                    break
                held = self._queue.popleft()
                held.begun = True
                self._held.add(held)
            held.fill(storage)
            with self._changed:
                self._changed.notify()
        if storage is not self._storage:
            storage.close()

    def _has_room(self) -> bool:
        return sum(held.num_bytes for held in self._held) < self._max_bytes
