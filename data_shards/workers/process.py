"""What a worker process does, from its start to its end."""

from __future__ import annotations

import os
import pickle
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

from data_shards.activity import IDLE, TAKING
from data_shards.worker import BatchMaker, Failure, Made
from data_shards.workers.board import Board, Claim
from data_shards.workers.requests import RequestPlan
from data_shards.workers.slabs import Slabs

LEFT_FOR_ITS_MEMORY = 3
"""Exit code of a worker that holds more memory than it may; it has handed over what it had made."""


class Report(NamedTuple):
    """What a worker tells the training process; without a claim: that it is ready."""

    claim: Claim | None
    """What it has made."""
    made: Made | Failure | None
    """How."""


class Worker:
    """One worker process: takes requests off the board, one after the other, until it is to leave.

    Where its samples are read ahead it holds one request beyond the one that it works on, so that what that one needs
    is on its way.
    """

    def __init__(
        self,
        number: int,
        *,
        board: Board,
        slabs: Slabs,
        plan: RequestPlan,
        maker: BatchMaker,
        reports: Connection,
        max_bytes: int,
    ) -> None:
        self.number = number
        self._board, self._slabs, self._plan, self._maker = board, slabs, plan, maker
        self._reports, self._max_bytes = reports, max_bytes

    def work(self) -> int:
        """All of it; returns the exit code."""
        self._maker.start(self.number)
        self._send(Report(None, None))
        claim: Claim | None = None
        while not self._board.must_leave(self.number):
            if claim is None and (claim := self._take()) is None:
                self._maker.activity.note(self.number, 0, IDLE)
                self._board.wait()
                continue
            following = self._take() if self._maker.reads_ahead else None
            held = self._make(claim)
            claim = following
            if 0 < self._max_bytes < held:
                return LEFT_FOR_ITS_MEMORY  # what it holds beyond is made again by another
        self._board.wake()  # pass the news on
        return 0

    def _take(self) -> Claim | None:
        self._maker.activity.note(self.number, 0, TAKING)
        claim = self._board.take(self.number)
        if claim is not None and self._maker.reads_ahead:
            self._maker.want(self._plan.request(claim.span, claim.number))
        return claim

    def _make(self, claim: Claim) -> float:
        """Makes a batch and hands it over; returns the bytes that this process then holds for itself."""
        board, request = self._board, self._plan.request(claim.span, claim.number)
        made: Made | Failure | None
        try:
            made = self._maker.make(
                request,
                self._slabs.arrays(claim.slab, request.num_clips),
                goes_on=lambda: board.is_current(claim.stream),
                refused=board.refused(),
            )
        except Exception as error:  # a mistake in the code, or no memory: raised where the batch is due
            made = Failure(RuntimeError, (_said(error, self.number),))
        if made is None:
            self._maker.forget()
            board.free(claim.slab)
        else:
            self._send(Report(claim, made))
        return made.costs["worker_bytes"] if isinstance(made, Made) else 0.0

    def _send(self, report: Report) -> None:
        try:
            self._reports.send_bytes(pickle.dumps(report))
        except BrokenPipeError:
            os._exit(1)  # the training process has gone


def _said(error: Exception, worker: int) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(place.filename)}:{place.lineno}"  # noqa: PTH119
    return f"data worker {worker} (pid {os.getpid()}) failed: {type(error).__name__}: {error} ({where})"
