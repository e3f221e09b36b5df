"""The training process's side of the workers: starts them, hands out what they make in order, replaces those that fail.

A worker that dies, or is at one thing for too long, or holds too much memory, is replaced by another; what it had taken
is made again, once, because nothing of it was handed over. A sample or a batch that ends one worker after the other is
an error in the end (`failures`), or a bad sample like others with on_bad_sample="skip".
"""

from __future__ import annotations

import pickle
import selectors
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import perf_counter

from data_shards.activity import IDLE, TAKING, Describes
from data_shards.batch import BatchArrays, BatchShape
from data_shards.storage.base import TIERS
from data_shards.worker import BatchMaker, Failure, Made
from data_shards.worker_process import run_worker, worker_context
from data_shards.workers.accounts import WorkerAccount, new_account
from data_shards.workers.board import Board
from data_shards.workers.failures import HUNG, Failures
from data_shards.workers.process import LEFT_FOR_ITS_MEMORY, Report, Worker
from data_shards.workers.requests import RequestPlan, Span
from data_shards.workers.slabs import Lease, LentSlabs

MAX_LENT = 2
"""Slabs that the user of the batches may hold: the one in use and the one before; beyond, batches are copied out."""
_CHECK_SECONDS = 0.5
_START_SECONDS = 120.0  # for the imports of a worker, at least
_END_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """What a worker may do before it is replaced, and how many there may be."""

    max_workers: int
    """Workers at most at a time."""
    max_slabs: int
    """Slabs at most."""
    timeout_seconds: float
    """Seconds that a worker may be at one thing: a stage of one clip."""
    max_bytes: int
    """Memory that a worker may hold for itself after a batch; 0: any."""


@dataclass
class _Running:
    """One worker process."""

    process: BaseProcess
    reports: Connection
    account: WorkerAccount
    leaving: bool = False


class WorkerPool:
    """Worker processes that make the batches of one stream at a time.

    Args:
        maker: makes the batches; a copy goes to each worker.
        skips: whether a sample that ends workers is skipped in the end, and not an error.
        pin: hand out batches in pinned memory.
    """

    def __init__(
        self,
        maker: BatchMaker,
        *,
        plan: RequestPlan,
        shape: BatchShape,
        limits: WorkerLimits,
        sets: Describes,
        skips: bool,
        pin: bool = False,
    ) -> None:
        self._maker, self._plan, self._limits = maker, plan, limits
        self._board = Board(limits.max_slabs, limits.max_workers)
        self._slabs = LentSlabs(shape, limits.max_slabs, give_back=self._board.free, pin=pin)
        self._context = worker_context()
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, _Running] = {}
        self._accounts: list[WorkerAccount] = []
        self._wanted = 0
        self._num_slabs = 0
        self._stream, self._span, self._num_requests, self._due = 0, Span(0, 0), 0, 0
        self._done: dict[int, tuple[int, Made | Failure]] = {}
        self._failures = Failures(sets, refuse=self._board.refuse if skips else None)
        self._next_check = 0.0
        self._closed = False

    @property
    def num_workers(self) -> int:
        """Workers that there are to be now."""
        return self._wanted

    @property
    def num_slabs(self) -> int:
        """Slabs in use now."""
        return self._num_slabs

    @property
    def shared_bytes(self) -> int:
        """Memory that the slabs take now: pages that were written to."""
        return self._slabs.used_bytes

    @property
    def accounts(self) -> list[WorkerAccount]:
        """Every worker process that there was or is, in the order of their starts."""
        return self._accounts

    @property
    def closed(self) -> bool:
        """Whether the workers have ended for good."""
        return self._closed

    def resize(self, num_workers: int, num_slabs: int) -> None:
        """Have so many workers from now on, and so many slabs or more. Never changes what comes next."""
        assert 1 <= num_workers <= self._limits.max_workers, num_workers
        assert num_slabs <= self._limits.max_slabs, num_slabs
        self._wanted = num_workers
        if num_slabs > self._num_slabs:
            self._num_slabs = num_slabs
            self._board.open_slabs(num_slabs)
        for number, running in self._running.items():
            if number >= num_workers and not running.leaving:
                running.leaving = True
                self._board.let_leave(number)
        self._start_missing()

    def start_stream(self, span: Span) -> None:
        """Make the batches of `span` from now on; those of the stream before are forgotten."""
        self._collect_reports(0.0)
        for slab, _ in self._done.values():
            self._board.free(slab)
        self._done.clear()
        self._failures.new_stream()
        self._span, self._num_requests, self._due = span, self._plan.num_requests(span), 0
        self._stream = self._board.start_stream(span, self._num_requests)
        self._start_missing()

    def next(self) -> tuple[BatchArrays, Lease | None, Made] | None:
        """The batch that is due; None after the last. Raises what went wrong with it.

        Tensors and lease keep the slab; RuntimeError where the workers fail and cannot be replaced.
        """
        if self._due == self._num_requests:
            return None
        started = perf_counter()
        self._slabs.collect()
        self._collect_reports(0.0)
        while self._due not in self._done:
            self._check_workers()
            if not self._slabs.cool_down():
                self._collect_reports(_CHECK_SECONDS)
        self._check_workers()
        slab, made = self._done.pop(self._due)
        if isinstance(made, Failure):
            self._board.free(slab)
            raise made.to_error()
        made.costs["wait_seconds"] = perf_counter() - started
        request = self._plan.request(self._span, self._due)
        self._due += 1
        crowded = len(self._slabs.lent) >= MAX_LENT
        arrays, lease = self._slabs.lend(slab, request.num_clips)
        if crowded:
            return BatchArrays(*(tensor.clone() for tensor in arrays)), None, made
        return arrays, lease, made

    def close(self) -> None:
        """End the workers, at once where they do not end by themselves. Lent batches stay valid."""
        if self._closed:
            return
        self._closed = True
        self._board.close()
        deadline = time.monotonic() + _END_SECONDS
        for running in self._running.values():
            running.process.join(max(deadline - time.monotonic(), 0.0))
            if running.process.exitcode is None:
                running.process.kill()
                running.process.join(1.0)
            running.account.ended = perf_counter()
            running.reports.close()
        self._running.clear()
        self._selector.close()
        self._done.clear()

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    def _start_missing(self) -> None:
        for number in range(self._wanted):
            if number not in self._running:
                self._start(number)

    def _start(self, number: int) -> None:
        reads, writes = self._context.Pipe(duplex=False)
        worker = Worker(
            number,
            board=self._board,
            slabs=self._slabs,
            plan=self._plan,
            maker=self._maker,
            reports=writes,
            max_bytes=self._limits.max_bytes,
        )
        self._board.let_leave(number, False)
        self._maker.activity.note(number, 0, TAKING)
        process = self._context.Process(target=run_worker, args=(worker,), name=f"data-worker-{number}", daemon=True)
        process.start()
        writes.close()
        assert process.pid is not None
        account = new_account(number, process.pid, TIERS)
        self._running[number] = _Running(process, reads, account)
        self._accounts.append(account)
        self._selector.register(reads, selectors.EVENT_READ, (number, "reports"))
        self._selector.register(process.sentinel, selectors.EVENT_READ, (number, "end"))

    def _collect_reports(self, timeout: float) -> None:
        """Take in what workers have to say, and replace those that have ended."""
        found = [key.data for key, _ in self._selector.select(timeout)]
        for number, _ in found:
            self._take_reports(self._running[number])
        for number, what in found:
            if what == "end":
                running = self._running[number]
                running.process.join()
                self._take_reports(running)
                self._has_ended(number, running)

    def _take_reports(self, running: _Running) -> None:
        while True:
            try:
                if not running.reports.poll():
                    return
                report: Report = pickle.loads(running.reports.recv_bytes())
            except (EOFError, OSError):
                return  # it has ended, perhaps in the middle of a word
            if report.claim is None:
                running.account.ready = perf_counter()
                self._failures.started(running.account.worker)
                continue
            assert report.made is not None
            if isinstance(report.made, Made):
                running.account.add(report.made.costs)
            self._board.hold(report.claim.slab)
            if report.claim.stream == self._stream:
                self._done[report.claim.number] = (report.claim.slab, report.made)
            else:
                self._board.free(report.claim.slab)

    def _check_workers(self) -> None:
        """End workers that are at one thing for too long (looked at twice a second)."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_SECONDS
        for number, running in list(self._running.items()):
            doing, limit = self._maker.activity.of(number), self._limits.timeout_seconds
            if running.account.ready is None:
                limit = max(limit, _START_SECONDS)
            if doing.stage == IDLE or doing.seconds <= limit:
                continue
            running.process.kill()
            running.process.join(_END_SECONDS)  # one that waits for a disk ends later, and does nothing until then
            self._take_reports(running)
            self._has_ended(number, running, HUNG)

    def _has_ended(self, number: int, running: _Running, how: str = "") -> None:
        """A worker has ended: say so, have its work made again, start another."""
        doing = self._maker.activity.of(number)
        self._forget(number, running)
        again = self._board.give_back(number)
        code = running.process.exitcode
        if self._closed or (running.leaving and code == 0):
            if not self._closed:
                self._start_missing()
            return
        running.account.end = how
        try:
            if code == LEFT_FOR_ITS_MEMORY and not how:
                self._failures.held_too_much(running.account, self._limits.max_bytes)
            else:
                self._failures.ended(running.account, doing, again, code)
        except RuntimeError:
            self.close()
            raise
        self._start_missing()

    def _forget(self, number: int, running: _Running) -> None:
        running.account.ended = perf_counter()
        self._selector.unregister(running.reports)
        self._selector.unregister(running.process.sentinel)
        running.reports.close()
        del self._running[number]
        self._maker.activity.note(number, 0, IDLE)
