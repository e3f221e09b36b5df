"""Progress: who asks MPI whether the outstanding operations are complete, and how often.

MPI moves data only inside its own calls. One thread at a time polls: a thread that waits for an operation does it for
all, so that a synchronous collective needs no other thread; when none waits, a background thread does, so that
collectives advance while the program computes. With nothing outstanding that thread sleeps without a time limit.

Between polls the poller sleeps for a fixed share of the time in which nothing has moved, up to a millisecond: a wait
grows by no more than that share, and a long wait costs a core next to nothing. A poll that took long has moved data,
so the pauses start again from zero.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dist_train.mpi_backend.library import is_threaded

if TYPE_CHECKING:
    from dist_train.mpi_backend.operation import Operation

BUSY_SECONDS = 20e-6
"""As long as something moved this recently, a waiting thread polls without a pause. Then it sleeps: a thread that only
yields is not woken before others have used up their time, milliseconds on a busy machine; a sleeper is."""
PAUSE_SHARE = 1 / 16
LONGEST_PAUSE_SECONDS = 1e-3
MOVED_SECONDS = 50e-6
"""A poll that took this long has moved data."""


class Progress:
    """The outstanding operations of this process, of all groups."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        # All below is guarded by the condition's lock.
        self._outstanding: list[Operation] = []
        self._polled = False
        self._num_waiting = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, operation: Operation, *, background: bool) -> None:
        """Takes an operation in charge. `background`: it must advance without anybody waiting for it."""
        with self._condition:
            self._outstanding.append(operation)
            if not background or self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mpi4py progress", daemon=True)
                self._thread.start()
            elif not self._polled:
                self._condition.notify_all()

    def wait(self, operation: Operation, seconds: float | None) -> bool:
        """Blocks until `operation` is done; False when it is not after `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        with self._condition:
            self._num_waiting += 1
            try:
                while not operation.done:
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return False
                    if self._polled:  # by another thread, which says when something is done or it stops
                        self._condition.wait(left)
                    else:
                        self._poll_until(operation, deadline)
            finally:
                self._num_waiting -= 1
                if self._outstanding:
                    self._condition.notify_all()  # another thread's turn to poll
        return True

    def outstanding(self) -> list[Operation]:
        """The operations that are not done."""
        with self._condition:
            return list(self._outstanding)

    def poll(self) -> list[Operation]:
        """Asks MPI once about the outstanding operations and returns those that are not done."""
        with self._condition:
            if not self._polled:
                self._poll()
            return list(self._outstanding)

    def stop(self) -> None:
        """Ends the background thread."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _poll_until(self, operation: Operation, deadline: float | None) -> None:
        """Polls, in a waiting thread, until `operation` is done or it is `deadline`. Called and left with the lock."""
        moved = time.monotonic()
        while not operation.done:
            if self._poll():
                moved = time.monotonic()
            if operation.done or self._polled:  # a callback gave another thread the time to take over
                return
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return
            self._polled = True
            self._condition.release()
            try:
                idle = now - moved
                if idle > BUSY_SECONDS:
                    time.sleep(_pause(idle))
            finally:
                self._condition.acquire()
                self._polled = False

    def _run(self) -> None:
        """The background thread."""
        moved = time.monotonic()
        with self._condition:
            while not self._closed:
                if self._polled or self._num_waiting or not self._outstanding:
                    self._condition.wait()
                    moved = time.monotonic()
                    continue
                if self._poll():
                    moved = time.monotonic()
                if self._num_waiting:
                    self._condition.notify_all()  # a thread has come to wait meanwhile, and polls from here
                self._condition.wait(_pause(time.monotonic() - moved))

    def _poll(self) -> bool:
        """Asks MPI once about each outstanding operation; True when something moved. Called and left with the lock."""
        candidates = tuple(self._outstanding)
        self._polled = True
        self._condition.release()
        finished: list[Operation] = []
        try:
            begin = time.monotonic()
            finished = [operation for operation in candidates if operation.advance(begin)]
            moved = bool(finished) or time.monotonic() - begin > MOVED_SECONDS * len(candidates)
        finally:
            self._condition.acquire()
            self._polled = False
        if finished:
            self._outstanding = [operation for operation in self._outstanding if operation not in finished]
            for operation in finished:
                operation.done = True
            self._condition.notify_all()
            self._condition.release()
            try:  # callbacks of futures are the caller's code, and may wait for other operations
                for operation in finished:
                    operation.settle()
            finally:
                self._condition.acquire()
        return moved


def _pause(idle: float) -> float:
    return min(idle * PAUSE_SHARE, LONGEST_PAUSE_SECONDS)


def _mpi_lock() -> AbstractContextManager[object]:
    return nullcontext() if is_threaded() else threading.RLock()


progress = Progress()
mpi_calls = _mpi_lock()
"""Entered around every call of MPI: a lock where MPI takes one call at a time."""
