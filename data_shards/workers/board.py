"""The board that the training process and its workers share: which batch is whose, and in which slab it is made.

Workers take the next request by themselves, in order, as soon as a slab is free. The board is guarded by a POSIX record
lock, which the kernel releases when its holder dies; each change is written so that a holder who dies in the middle
leaves something that `give_back` can tell. A slab is written by nobody but its worker while it is TAKEN and by nobody
at all while it is HELD.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np

from data_shards.workers.memory import SharedMemory
from data_shards.workers.requests import Span

UNUSED, FREE, TAKEN, HELD, AGAIN = range(5)
"""States of a slab: not in use yet, free, being written by a worker, with the training process, to be made again."""
MAX_REFUSED = 64
"""Samples that may be refused for having ended workers, before that is an error."""

_STREAM, _START, _STOP, _NUM_REQUESTS, _NEXT, _CLOSING, _NUM_REFUSED, _HEADER_WORDS = range(8)
_STATE, _OF_STREAM, _NUMBER, _WORKER, _SLAB_WORDS = range(5)
_LOCK_SECONDS = 30.0


class Claim(NamedTuple):
    """What a worker has taken: request `number` of stream `stream`, to be made in slab `slab`."""

    stream: int
    span: Span
    number: int
    slab: int


class Board:
    """See the module. `num_slabs` and `num_workers` are the most that there will ever be."""

    def __init__(self, num_slabs: int, num_workers: int) -> None:
        self._num_slabs, self._num_workers = num_slabs, num_workers
        words = _HEADER_WORDS + num_slabs * _SLAB_WORDS + num_workers + MAX_REFUSED
        self._memory = SharedMemory(words * 8)
        self._wake_reads, self._wake_writes = os.pipe()
        os.set_blocking(self._wake_writes, False)
        self._map()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if not isinstance(value, np.ndarray)}
        state["_wake_reads"], state["_wake_writes"] = DupFd(self._wake_reads), DupFd(self._wake_writes)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wake_reads, self._wake_writes = state["_wake_reads"].detach(), state["_wake_writes"].detach()
        self._map()

    def __del__(self) -> None:
        for name in ("_wake_reads", "_wake_writes"):
            if isinstance(descriptor := self.__dict__.get(name), int):
                os.close(descriptor)

    def _map(self) -> None:
        words = np.frombuffer(self._memory.buffer, dtype=np.int64)
        ends = np.cumsum([_HEADER_WORDS, self._num_slabs * _SLAB_WORDS, self._num_workers, MAX_REFUSED])
        self._header, slabs, self._leaving, self._refused = np.split(words[: ends[-1]], ends[:-1])
        self._slabs = slabs.reshape(self._num_slabs, _SLAB_WORDS)

    # What workers do

    def take(self, worker: int) -> Claim | None:
        """The next request that is to be made, and a slab for it; None where there is none, or no slab is free."""
        header, slabs = self._header, self._slabs
        with self._locked(patient=True):
            if self.must_leave(worker):
                return None
            stream, span = int(header[_STREAM]), Span(int(header[_START]), int(header[_STOP]))
            again = np.flatnonzero(slabs[:, _STATE] == AGAIN)
            if again.size:
                slab = int(again[np.argmin(slabs[again, _NUMBER])])
                slabs[slab, _WORKER] = worker
                slabs[slab, _STATE] = TAKEN
                return Claim(stream, span, int(slabs[slab, _NUMBER]), slab)
            number = int(header[_NEXT])
            free = np.flatnonzero(slabs[:, _STATE] == FREE)
            if number >= header[_NUM_REQUESTS] or not free.size:
                return None
            slab = int(free[0])
            slabs[slab] = (FREE, stream, number, worker)
            slabs[slab, _STATE] = TAKEN
            header[_NEXT] = number + 1
            if free.size > 1 and number + 1 < header[_NUM_REQUESTS]:
                self.wake()  # pass it on: one waker may stand for several free slabs
            return Claim(stream, span, number, slab)

    def is_current(self, stream: int) -> bool:
        """Whether batches of this stream are still wanted."""
        return bool(self._header[_STREAM] == stream) and not self._header[_CLOSING]

    def must_leave(self, worker: int) -> bool:
        """Whether this worker is to end."""
        return bool(self._header[_CLOSING] or self._leaving[worker])

    def wait(self) -> None:
        """Until somebody calls `wake`."""
        os.read(self._wake_reads, 4096)

    def refused(self) -> frozenset[int]:
        """Samples that are not to be touched."""
        return frozenset(self._refused[: self._header[_NUM_REFUSED]].tolist())

    # What both do

    def wake(self) -> None:
        """Let a worker that waits look again."""
        with suppress(BlockingIOError):  # full of wakers that nobody has taken yet
            os.write(self._wake_writes, b"w")

    def free(self, slab: int) -> None:
        """Give a slab back; called by whoever has it, on any thread."""
        self._slabs[slab, _STATE] = FREE
        self.wake()

    # What the training process does

    def start_stream(self, span: Span, num_requests: int) -> int:
        """Ask for the batches of another stream from now on; returns its number."""
        with self._locked():
            self._header[_STREAM] += 1
            self._header[[_START, _STOP, _NUM_REQUESTS, _NEXT]] = (*span, num_requests, 0)
            self._slabs[self._slabs[:, _STATE] == AGAIN, _STATE] = FREE
        self.wake()
        return int(self._header[_STREAM])

    def hold(self, slab: int) -> None:
        """A worker has handed its slab over."""
        self._slabs[slab, _STATE] = HELD

    def open_slabs(self, num_slabs: int) -> None:
        """Use the first `num_slabs` from now on; those in use stay in use."""
        unused = np.flatnonzero(self._slabs[:num_slabs, _STATE] == UNUSED)
        self._slabs[unused, _STATE] = FREE
        self.wake()

    def give_back(self, worker: int) -> list[int]:
        """What a dead worker had taken is to be made again: the request numbers of it."""
        numbers = []
        with self._locked():
            for slab in np.flatnonzero((self._slabs[:, _STATE] == TAKEN) & (self._slabs[:, _WORKER] == worker)):
                _, stream, number, _ = self._slabs[slab].tolist()
                wanted = stream == self._header[_STREAM] and number < self._header[_NEXT]  # else not taken to the end
                self._slabs[slab, _STATE] = AGAIN if wanted else FREE
                if wanted:
                    numbers.append(number)
        self.wake()  # the dead one may have taken a waker with it
        return numbers

    def refuse(self, sample_id: int) -> bool:
        """Let no worker touch a sample any more; False where the list is full."""
        count = int(self._header[_NUM_REFUSED])
        if count == MAX_REFUSED:
            return False
        self._refused[count] = sample_id
        self._header[_NUM_REFUSED] = count + 1
        return True

    def let_leave(self, worker: int, leaves: bool = True) -> None:
        """A worker ends after its batch (or, False: one with this number starts anew)."""
        self._leaving[worker] = leaves
        self.wake()

    def close(self) -> None:
        """All workers end, those in the middle of a batch after its current clip."""
        self._header[_CLOSING] = 1
        self.wake()

    @contextmanager
    def _locked(self, *, patient: bool = False) -> Iterator[None]:
        descriptor = self._memory.descriptor
        if patient:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        else:
            _lock_in_time(descriptor)
        try:
            yield
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)


def _lock_in_time(descriptor: int) -> None:
    """Its holders need microseconds; one that is stopped (SIGSTOP) must not stop the training process."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"a data worker has held the loader's lock for {_LOCK_SECONDS:.0f} s: it is stopped; "
                    "continue it (kill -CONT) or start again"
                ) from None
            time.sleep(1e-4)
        else:
            return
