"""A lane: work of several collectives in a row that runs beside the backward pass.

A reduction of several stages (within the node, across nodes, back) cannot be handed to the transport as one operation,
and waiting between its stages would stop autograd. So it is written as a plain blocking function and given to a
lane. For host tensors the lane is a thread: Gloo and MPI wait with Python's lock released. For CUDA tensors it is a
stream: the function only enqueues, and its waits are waits of that stream. Both keep the order of submission, which is
the same on every rank, so the lane's collectives match if its process groups are used by nothing else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch

Job = Callable[[], None]


class HostWork:
    """A job in a thread; the interface of `torch.distributed.Work`, as far as waiting goes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.finished_at: float | None = None
        """When it ended, in seconds of `time.perf_counter`."""
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self, failed_before: BaseException | None) -> BaseException | None:
        """Runs the job, unless an earlier one failed: its collectives would meet others'. Returns what went wrong."""
        self._error = failed_before
        if failed_before is None:
            try:
                with torch.no_grad():
                    self.job()
            except BaseException as error:
                self._error = error
        self.finished_at = time.perf_counter()
        self._done.set()
        return self._error

    def is_completed(self) -> bool:
        """True once the job has ended, well or badly."""
        return self._done.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the job has ended; raises what it raised, RuntimeError after `timeout`."""
        if not self._done.wait(None if timeout is None else timeout.total_seconds()):
            raise RuntimeError(f"a reduction of several stages did not end in {timeout}")
        if self._error is not None:
            raise self._error
        return True


class CudaWork:
    """A job enqueued on a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = stream.record_event()

    def is_completed(self) -> bool:
        """True once the device has done it."""
        return self._event.query()

    def wait(self, timeout: timedelta | None = None) -> bool:  # noqa: ARG002  # the host does not wait
        """Makes the current stream wait; not the host."""
        torch.cuda.current_stream().wait_event(self._event)
        return True


class Lane:
    """Runs jobs in the order of `start`, one at a time, on `device`'s kind of tensors."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._works: queue.SimpleQueue[HostWork | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, job: Job) -> HostWork | CudaWork:
        """Starts `job` after all that were started before; it may use what the caller has computed so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream), torch.no_grad():
                job()
            return CudaWork(self._stream)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reductions", daemon=True)
            self._thread.start()
        work = HostWork(job)
        self._works.put(work)
        return work

    def close(self) -> None:
        """Ends the thread once the jobs that were started have ended; one that waits for a lost peer is left alone."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join(timeout=1.0)
            self._thread = None

    def _run(self) -> None:
        failed = None
        while (work := self._works.get()) is not None:
            failed = work.run(failed)
