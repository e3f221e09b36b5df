"""Bounded waits: a collective that does not complete ends in an error that names who did not come and what it does.

Each rank publishes a small record of what it is doing (`dist_train.activity`) to the job's store every second or so,
from a thread with a connection of its own: a rank that hangs in Python goes on publishing where it hangs, a process
that is stopped or dead falls silent. A rank that has waited too long, or whose connection breaks, reads the records of
all and raises; the first to do so writes its verdict into the store, and every rank raises the same.

Gloo and MPI: `work.wait(timeout)`, which costs what `work.wait()` does and leaves the process group as it is. NCCL's
wait does not block the host: there the thread looks at the collectives under way and ends the process, because the main
thread may hang in CUDA. Collectives that PyTorch starts by itself (DDP, FSDP2) are bounded by the process group's
time-out, which is `backstop_seconds`, a little longer; their error is explained likewise.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import torch.distributed as dist

from dist_train.activity import Observer, Record, Ticket, node_id, spell_error, spell_seconds
from dist_train.collectives import Collectives
from dist_train.diagnosis import CollectiveError, CollectiveTimeout, PeerLost, diagnose, find_faults

logger = logging.getLogger(__name__)

T = TypeVar("T")

INTERVAL_SECONDS = 1.0
RECORDS_PER_SECOND = 300.0
"""Rank 0's store takes at most so many: larger worlds publish less often (1,536 ranks: every 5 s)."""
WARNING_SECONDS = 60.0
GRACE_SECONDS = 60.0
"""Time that a rank's main thread has, after a verdict, to end the run in order; a rank that hangs is ended at once."""

_TIMED_OUT = ("timed out", "not complete")
"""What a transport says when its own time-out is over (Gloo, NCCL; MPI)."""
_TRANSPORT_ERRORS = (
    *_TIMED_OUT,
    "gloo",
    "nccl",
    "mpi_err",
    "group is broken",
    "connection closed",
    "connection reset",
    "broken pipe",
)
_VERDICT, _CLAIMS = "verdict", "claims"


def backstop_seconds(timeout_seconds: float) -> float:
    """The process group's own time-out: long enough for `timeout_seconds` of a watchdog to speak first."""
    return 1.1 * timeout_seconds + 5.0


class Watchdog:
    """The `Watch` of a world of several processes; a context manager around all that uses its collectives.

    Args:
        collectives: of this rank; the process group must exist. Inside the block the watchdog is their `watch`.
        timeout_seconds: how long a rank waits for the others.
        end_process: called from the watchdog's thread with an error that the main thread does not come to raise; has to
            end the process. None: the main thread is waited for.
        warning_seconds: rank 0 warns of a rank that has been waited for so long, once a collective.
        interval_seconds: time between two records; by default as the constants of this module say.
        store: of the job; by default the process group's.
    """

    def __init__(
        self,
        collectives: Collectives,
        *,
        timeout_seconds: float,
        end_process: Callable[[CollectiveError], None] | None = None,
        warning_seconds: float | None = None,
        interval_seconds: float | None = None,
        store: dist.Store | None = None,
    ) -> None:
        self._collectives, self._world = collectives, collectives.world
        self._seconds, self._timeout = timeout_seconds, timedelta(seconds=timeout_seconds)
        self._end_process = end_process
        self._warn_after = min(timeout_seconds / 4, WARNING_SECONDS) if warning_seconds is None else warning_seconds
        usual = max(min(INTERVAL_SECONDS, timeout_seconds / 8), self._world.world_size / RECORDS_PER_SECOND)
        self._interval = interval_seconds or usual
        self._patience = 2.5 * self._interval
        self.activity = collectives.watch.activity
        self._observer = Observer(self._world.rank, self.activity, lambda: collectives.ledger.current())
        self._node = node_id()
        # Connections of their own: the thread's may be blocked by a store that does not answer.
        own = dist.PrefixStore("watchdog", store or dist.distributed_c10d._get_default_store())
        self._store, self._reader = own.clone(), own.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._first_rank: Record | None = None  # rank 0's: the store goes where it goes
        self._under_way: deque[tuple[Any, Ticket, float]] = deque()  # NCCL: work, what, since
        self._host_waits = "nccl" not in dist.get_backend_config()
        self._warned: set[Ticket] = set()
        self._inspected = self._told = 0.0
        self._store_is_gone = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._publish()
        self._collectives.watch = self
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        explained = self._explain(str(error), None) if _is_transport_error(error) else None
        self.close(explained or error)
        if explained is not None:
            raise explained from error

    def close(self, error: BaseException | None = None) -> None:
        """Tells the others that this rank's run is over, and why; ends the thread."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(self._patience)  # first: a record that it is about to write would replace the last one
        ended = "" if error is None else spell_error(error)
        if not self._store_is_gone:
            _in_time(lambda: self._publish(ended), self._patience)

    # -- the main thread ---------------------------------------------------------------------------------------

    def launched(self, name: str, channel: Any = None) -> Ticket:
        """Counts a collective that this rank has started."""
        return self.activity.started(name, channel)

    def wait(self, work: Any, ticket: Ticket) -> None:
        """Waits for `work`; raises `CollectiveTimeout` or `PeerLost`."""
        activity = self.activity
        activity.waiting_since = time.perf_counter()
        activity.waiting = ticket
        try:
            if self._host_waits:
                work.wait(self._timeout)
            else:  # but for host tensors beside NCCL's, which the process group's time-out bounds
                work.wait()
                self._under_way.append((work, ticket, activity.waiting_since))
        except RuntimeError as error:
            self._raise_explained(error, ticket, timed_out=self._host_waits and not work.is_completed())
        activity.waiting = None

    @contextmanager
    def blocking(self, name: str) -> Iterator[None]:
        """A collective of PyTorch's that blocks: its own time-out ends it, explained as in `wait`."""
        activity = self.activity
        activity.waiting_since = time.perf_counter()
        activity.waiting = ticket = activity.started(name)
        try:
            yield
        except RuntimeError as error:
            self._raise_explained(error, ticket)
        activity.waiting = None

    def _raise_explained(self, error: RuntimeError, ticket: Ticket, *, timed_out: bool = False) -> NoReturn:
        if timed_out:
            raise self._explain(None, ticket) from error
        if _is_transport_error(error):
            raise self._explain(str(error), ticket) from error
        raise error

    def _explain(self, error: str | None, ticket: Ticket | None) -> CollectiveError:
        """What to raise: for a wait that took too long (`error` is None) or a transport that gave up with `error`."""
        timed_out = error is None or any(sign in error.lower() for sign in _TIMED_OUT)
        error = None if error is None else " ".join(error.split())[-200:]
        verdict = None
        if _in_time(lambda: self._reader.check([_VERDICT]), self._patience + 1.0) is not None:
            verdict = _in_time(lambda: self._agreed_verdict(error, ticket, timed_out), 4 * self._patience + 5.0)
        if verdict is None:  # the store does not answer: every rank finds the same by what it knows of rank 0
            records = {} if self._first_rank is None else {0: self._first_rank}
            pair = (ticket or self.activity.started("exchange"))._replace(members=(0, self._world.rank))
            verdict = self._verdict(records, {0: self._fault_of_first()}, error, pair, timed_out)
        return self._error(verdict)

    def _error(self, verdict: Mapping[str, Any]) -> CollectiveError:
        kind = CollectiveTimeout if verdict["timed_out"] else PeerLost
        return kind(verdict["message"], on_every_rank=verdict["speaker"] != self._world.rank)

    # -- verdicts ----------------------------------------------------------------------------------------------

    def _agreed_verdict(self, error: str | None, ticket: Ticket | None, timed_out: bool) -> dict[str, Any]:
        """The first rank's that asks; the others take it over."""
        store = self._reader
        if store.add(_CLAIMS, 1) > 1:
            deadline = time.monotonic() + 2 * self._patience + 2.0
            while time.monotonic() < deadline:
                if store.check([_VERDICT]):
                    return json.loads(store.get(_VERDICT))
                time.sleep(0.1)
        verdict = self._verdict(*self._observe(timed_out), error, ticket, timed_out)
        store.set(_VERDICT, json.dumps(verdict))
        return verdict

    def _observe(self, timed_out: bool) -> tuple[dict[int, Record], dict[int, str]]:
        """Everybody's record and fault, after having watched for as long as it takes to tell who is silent."""
        begin = time.monotonic()
        records = earlier = self._records(self._reader)
        while True:
            over = time.monotonic() - begin > self._patience
            faults = find_faults(records, node=self._node, earlier=earlier, patience_over=over)
            faults.pop(self._world.rank, None)
            fresh = all(rank in faults or record.beat > earlier[rank].beat for rank, record in records.items())
            if over or (fresh if timed_out else faults):
                return records, faults
            time.sleep(min(self._interval / 4, 0.1))
            records = self._records(self._reader)

    def _verdict(
        self,
        records: Mapping[int, Record],
        faults: Mapping[int, str],
        error: str | None,
        ticket: Ticket | None,
        timed_out: bool,
    ) -> dict[str, Any]:
        mine = replace(self._observer.record(), waiting=ticket)
        found = diagnose(
            {**records, mine.rank: mine},
            self._world.world_size,
            about=mine,
            faults=faults,
            happened=f"did not come within {self._seconds:g} s" if timed_out else "went away",
            advice="; if it is slow and not stuck, raise exchange.timeout_seconds",
            error=error or "",
        )
        speaker = self._world.rank if 0 in found.culprits else 0
        return {"message": found.message, "timed_out": timed_out, "speaker": speaker, "culprits": found.culprits}

    def _fault_of_first(self) -> str:
        first = self._first_rank
        faults = find_faults({0: first}, node=self._node, earlier={}, patience_over=False) if first else {}
        return faults.get(0, "its store does not answer: its process is dead or stopped, or its host cannot be reached")

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            if not self._store_is_gone:
                self._use_store()
            self._look_at_device()

    def _use_store(self) -> None:
        try:
            self._publish()
            self._look_at_verdict()
            if self._world.is_first:
                self._inspect()
            elif self._store.check([_key(0)]):
                self._first_rank = Record.from_json(self._store.get(_key(0)))
        except RuntimeError:  # whoever waits for rank 0 finds that out by itself
            self._store_is_gone = True

    def _publish(self, ended: str | None = None) -> None:
        self._store.set(_key(self._world.rank), self._observer.record(ended=ended).to_json())

    def _records(self, store: Any) -> dict[int, Record]:
        """The records in the store, by rank."""
        keys = [_key(rank) for rank in range(self._world.world_size)]
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        records = [Record.from_json(text) for text in store.multi_get(keys)]
        return {record.rank: record for record in records}

    def _inspect(self) -> None:
        """Rank 0 warns once of each collective that some rank has waited long for."""
        now = time.monotonic()
        if now - self._inspected < self._warn_after / 2:
            return
        self._inspected = now
        records = self._records(self._store)
        waits = [r for r in records.values() if r.waiting is not None and r.waiting_seconds > self._warn_after]
        longest = max(waits, key=lambda record: record.waiting_seconds, default=None)
        if longest is None or longest.waiting is None or longest.waiting in self._warned:
            return
        self._warned.add(longest.waiting)
        found = diagnose(
            records,
            self._world.world_size,
            about=longest,
            faults=find_faults(records, node=self._node, earlier={}, patience_over=False),
            happened=f"has not come for {spell_seconds(longest.waiting_seconds)}",
        )
        logger.warning("%s; the job ends when this has lasted %g s", found.message, self._seconds)

    def _look_at_verdict(self) -> None:
        """Ends a process whose main thread does not come to hear what the others have found."""
        if self._end_process is None or not self._store.check([_VERDICT]):
            return
        verdict = json.loads(self._store.get(_VERDICT))
        self._told = self._told or time.monotonic()
        if self._world.rank in verdict["culprits"] or time.monotonic() - self._told > GRACE_SECONDS:
            self._end_process(self._error(verdict))

    def _look_at_device(self) -> None:
        """NCCL: ends the process where the oldest collective under way has taken too long."""
        while self._under_way:
            work, ticket, since = self._under_way[0]
            if not work.is_completed():
                if time.perf_counter() - since > self._seconds and self._end_process is not None:
                    self._end_process(self._explain(None, ticket))
                return
            self._under_way.popleft()


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _is_transport_error(error: BaseException | None) -> bool:
    if not isinstance(error, RuntimeError) or isinstance(error, CollectiveError):
        return False
    text = str(error).lower()
    return any(sign in text for sign in _TRANSPORT_ERRORS)


def _in_time(action: Callable[[], T], seconds: float) -> T | None:
    """What `action` returns; None where it takes longer (a store that does not answer) or fails to reach the store."""
    results: list[T] = []

    def act() -> None:
        try:
            results.append(action())
        except RuntimeError as error:
            logger.debug("no answer from the store: %s", error)

    thread = threading.Thread(target=act, name="watchdog asks", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
