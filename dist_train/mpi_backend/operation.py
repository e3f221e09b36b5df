"""One collective or message under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dist_train.mpi_backend.library import MPI
from dist_train.mpi_backend.progress import mpi_calls, progress
from dist_train.mpi_backend.staging import Staging

if TYPE_CHECKING:
    from dist_train.mpi_backend.group import MPIGroup

NUM_IN_FLIGHT = 1
"""Requests of one operation that MPI has at a time: with two, large ones took 1.2 to 1.6 times as long."""

abandoned: list[Operation] = []
"""Operations that failed while MPI may still use their memory."""


class Operation(dist.Work):
    """A collective or message that was called: posted to MPI when its memory is ready, delivered when MPI is done.

    `calls` makes one of MPI's non-blocking calls for each item asked of it, and gives its request. `Progress` calls
    `advance` from one thread at a time.
    """

    def __init__(
        self,
        group: MPIGroup,
        *,
        title: str,
        calls: Iterable[Any],
        staging: Staging,
        result: Sequence[torch.Tensor],
        seconds: float,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.title = title
        self.done = False
        """Set by `Progress`, under its lock."""
        self.source = MPI.PROC_NULL
        """Group rank of the sender, of a receive."""
        self._group = group
        self._calls: Iterator[Any] | None = iter(calls)
        self._staging = staging  # keeps the memory alive as long as MPI may use it
        self._result = list(result)
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        self._check = check  # of the status of a receive
        self._requests: list[Any] = []
        self._error: RuntimeError | None = None
        self._lock = threading.Lock()  # of the two below
        self._future: Any = None
        self._is_settled = False

    @property
    def is_ready(self) -> bool:
        """True when MPI may use its memory."""
        return self._staging.ready

    def belongs_to(self, group: MPIGroup) -> bool:
        """True for an operation of `group`."""
        return self._group is group

    def post(self) -> bool:
        """Hands MPI as much of it as may be in flight; True once MPI has had all of it, or it failed."""
        try:
            with mpi_calls:
                while self._calls is not None and len(self._requests) < NUM_IN_FLIGHT:
                    request = next(self._calls, None)
                    if request is None:
                        self._calls = None
                    else:
                        self._requests.append(request)
        except (MPI.Exception, ValueError, OverflowError) as error:
            self._calls = None
            self._fail(f"{self.title}: {_words(error)}")
        return self._calls is None

    def advance(self, now: float) -> bool:
        """Moves it on; True when it is done, well or not."""
        if self._error is None:
            try:
                with mpi_calls:
                    self._requests = [request for request in self._requests if not self._test(request)]
                if self._calls is not None:
                    self._group.post_in_order()
                if self._calls is None and not self._requests and self._error is None:
                    self._staging.deliver()
                    return True
            except MPI.Exception as error:
                self._fail(f"{self.title}: {_words(error)}")
            except RuntimeError as error:
                self._fail(str(error))
        if self._error is None and now > self._deadline:
            self._fail(
                f"{self.title} did not complete in {self._seconds:g} s on rank {self._group.rank()}: another rank is "
                "gone, is late, or called something else"
            )
        return self._error is not None

    def raise_failure(self) -> None:
        """Raises what went wrong, if something has."""
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Tells the future, if somebody has asked for one."""
        with self._lock:
            future, self._is_settled = self._future, True
        if future is not None:
            self._tell(future)

    # torch.distributed.Work

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until it is done; on CUDA the current stream, too, waits for the result.

        Raises:
            RuntimeError: it failed, or is not done after `timeout` (it goes on, and may be waited for again).
        """
        if not self.done:
            seconds = timeout.total_seconds() if timeout else None  # zero is PyTorch's "no time-out"
            if not progress.wait(self, seconds):
                raise RuntimeError(f"{self.title} is not complete on rank {self._group.rank()} after {seconds:g} s")
        self.raise_failure()
        self._staging.join()
        return True

    def is_completed(self) -> bool:
        """True when it is done, well or not. Never blocks."""
        return self.done

    def is_success(self) -> bool:
        """True when it is done well."""
        return self.done and self._error is None

    def exception(self) -> RuntimeError | None:
        """What went wrong, if something has."""
        return self._error

    def synchronize(self) -> None:
        """`wait()`."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors that hold the result, once it is done."""
        return self._result

    def source_rank(self) -> int:
        """Group rank of the sender of what a receive has received."""
        return self.source

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """A future of the result; its callbacks run in the thread that finds the operation done."""
        with self._lock:
            is_new, is_settled = self._future is None, self._is_settled
            if is_new:
                devices: list[Any] = sorted({tensor.device for tensor in self._result if tensor.is_cuda}, key=str)
                self._future = torch.futures.Future(devices=devices)
        if is_new and is_settled:
            self._tell(self._future)
        return self._future

    def _tell(self, future: Any) -> None:
        if self._error is not None:
            future.set_exception(self._error)
        else:
            self._staging.join()
            future.set_result(self._result)

    def _test(self, request: Any) -> bool:
        status = MPI.Status()
        if not request.Test(status):
            return False
        if self._check is not None:
            self._check(status)
            self.source = status.Get_source()
        return True

    def _fail(self, words: str) -> None:
        self._error = RuntimeError(words)
        self._group.fail(words)
        if any(request != MPI.REQUEST_NULL for request in self._requests):
            abandoned.append(self)


def _words(error: Exception) -> str:
    return f"MPI: {error.Get_error_string()}" if isinstance(error, MPI.Exception) else f"mpi4py: {error}"
