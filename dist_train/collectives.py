"""Every collective of the engine, in one place.

The contract of each: all ranks of the world call it, in the same order, with tensors of the same shape and dtype on the
world's device. A world of one process has no process group and every collective is the identity. The ledger is told
when a collective is launched, when it is done, how long this rank was blocked by it, its payload and what its algorithm
sends from this rank (`ledger.bandwidth`). What is not made here (a wrapper's own collectives) is told by `account`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_train.activity import Activity
from dist_train.ledger.bandwidth import sent_bytes
from dist_train.ledger.flights import Flight
from dist_train.ledger.recorder import NullLedger, Recorder
from dist_train.world import World

T = TypeVar("T")


class SharedError(ValueError):
    """An error of some rank that every rank raises alike, so that one of them can speak for all."""

    on_every_rank = True
    exit_code = 2


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of its error (an exception itself may not travel)."""

    text: str
    users_fault: bool

    @classmethod
    def of(cls, error: Exception, world: World) -> _Told:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return cls(text if world.is_first else f"rank {world.rank}: {text}", isinstance(error, ValueError))

    def as_error(self) -> SharedError:
        error = SharedError(self.text)
        error.exit_code = 2 if self.users_fault else 1
        return error


class Watch(Protocol):
    """Guards waits for other ranks; see `NoWatch` and `dist_train.watchdog`."""

    activity: Activity
    """What this rank is doing, for the errors of the others."""

    def launched(self, name: str, channel: Any = None) -> Any:
        """Counts a collective that this rank starts on `channel`; the ticket is what `wait` takes."""

    def wait(self, work: Any, ticket: Any) -> None:
        """Waits for `work`, a `torch.distributed.Work`; raises where some rank does not come in bounded time."""

    def blocking(self, name: str) -> AbstractContextManager[Any]:
        """A `with` block that calls a blocking collective."""


class NoWatch:
    """Waits as long as the process group does."""

    def __init__(self) -> None:
        self.activity = Activity()

    def launched(self, name: str, channel: Any = None) -> None:
        """Nothing is counted."""

    def wait(self, work: Any, ticket: Any) -> None:  # noqa: ARG002
        """`work.wait()`."""
        work.wait()

    def blocking(self, name: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Nothing."""
        return nullcontext()


class Pending:
    """A collective under way; `wait` blocks until the tensor holds the result, once."""

    __slots__ = ("_finish", "_flight", "_owner", "_ticket", "_work")

    def __init__(
        self,
        work: Any,
        owner: Collectives,
        name: str,
        finish: Callable[[], Any] | None,
        channel: Any = None,
        flight: Flight | None = None,
    ) -> None:
        self._work, self._owner, self._finish, self._flight = work, owner, finish, flight
        self._ticket = owner.watch.launched(name, channel)

    def wait(self) -> None:
        """Blocks until every rank's contribution has arrived; on CUDA the current stream waits, not the host."""
        with self._owner.ledger.waiting(self._flight):
            self._owner.watch.wait(self._work, self._ticket)
        if self._flight is not None and self._flight.finished is None:
            self._flight.finished = getattr(self._work, "finished_at", None)
        if self._finish is not None:
            self._finish()


@dataclass(frozen=True, kw_only=True)
class _Channel:
    """What the accounts need to know of a process group."""

    number: int
    """Counts the channels in the order of their making, the same on every rank; 0 is the world's."""
    size: int
    """Ranks in it."""
    group: Any
    """The process group; None: the default one."""


class Collectives:
    """The collectives of one `World`, reported to one ledger."""

    def __init__(self, world: World, ledger: Recorder | None = None) -> None:
        self.world = world
        self.ledger: Recorder = ledger or NullLedger()
        self.watch: Watch = NoWatch()
        self._alone = world.world_size == 1
        self._channels: dict[Any, _Channel] = {None: _Channel(number=0, size=world.world_size, group=None)}
        self._streams: dict[int, torch.cuda.Stream] = {}  # of each channel: where its completions are noted
        self._backends: dict[tuple[int, str], str] = {}

    def start_sum_(
        self,
        tensor: torch.Tensor,
        *,
        channel: Any = None,
        name: str = "sum",
        finish: Callable[[], Any] | None = None,
    ) -> Pending | None:
        """Starts to sum `tensor` over the ranks (of `channel`), in place. None in a world of one process.

        `channel`, from `new_channel`, has an order of its own: what is started there need not be started at the
        same place among the other collectives on every rank. `name` says in accounts and errors what this is, and
        `finish` is called once the sum is there.
        """
        return self._start(tensor, dist.ReduceOp.SUM, name, finish, channel)

    def start_mean_(self, tensor: torch.Tensor, *, channel: Any = None, name: str = "mean") -> Pending | None:
        """Starts to average `tensor` over the ranks, in place: the sum, divided after the wait. See `start_sum_`."""
        count = self._known(channel).size
        return self._start(tensor, dist.ReduceOp.SUM, name, lambda: tensor.div_(count), channel)

    def start_reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, *, channel: Any = None, name: str = "reduce-scatter"
    ) -> Pending | None:
        """Starts to sum `tensor`, flat, over the ranks and to leave in `output` this rank's equal part of the sum."""
        if self._alone:
            output.copy_(tensor)
            return None
        flight = self._launch("reduce_scatter", tensor.nbytes, tensor.device, name, channel)
        work = dist.reduce_scatter_single(output, tensor, group=channel, async_op=True)
        return self._pending(work, flight, tensor.device, name, channel)

    def start_all_gather(
        self, output: torch.Tensor, tensor: torch.Tensor, *, channel: Any = None, name: str = "all-gather"
    ) -> Pending | None:
        """Starts to lay the ranks' `tensor`s, equally long, one after the other into `output`, flat."""
        if self._alone:
            output.copy_(tensor)
            return None
        flight = self._launch("all_gather", output.nbytes, output.device, name, channel)
        work = dist.all_gather_single(output, tensor, group=channel, async_op=True)
        return self._pending(work, flight, tensor.device, name, channel)

    def started(
        self,
        work: Any,
        *,
        num_bytes: int,
        name: str,
        finish: Callable[[], Any] | None = None,
        channel: Any = None,
        sent: float | None = None,
        on_host: bool = True,
    ) -> Pending:
        """Takes an operation of several collectives that is under way into the accounts.

        Args:
            work: has `wait` and `is_completed` like `torch.distributed.Work`; with an attribute `finished_at` (seconds
                of `time.perf_counter`, None until then) where it knows when it was done: else the wait's end counts.
            num_bytes: payload that this rank hands over in all its stages.
            sent: what the stages send from this rank (`sent_bytes`); None: as an all-reduce of `num_bytes` does.
            on_host: of host memory.
        """
        device = None if on_host else self.world.device
        return Pending(
            work, self, name, finish, channel, self._launch("exchange", num_bytes, device, name, channel, sent=sent)
        )

    def account(
        self, name: str, *, op: str, num_bytes: int, device: torch.device, channel: Any = None
    ) -> Flight | None:
        """Tells the ledger of a collective that a wrapper starts now; `note_completion` tells when it is done.

        Set `settled` of what is returned once this rank has waited for it.
        """
        if self._alone:
            return None
        self.watch.launched(name, channel)
        return self._launch(op, num_bytes, device, name, channel)

    def count(self, name: str, *, op: str, num_bytes: int, device: torch.device, channel: Any = None) -> None:
        """Tells the ledger of a collective of a wrapper of which only the bytes are known. Broadcasts are rank 0's."""
        if self._alone:
            return
        known = self._known(channel)
        backend = self._backend(known, device)
        sent = sent_bytes(op, num_bytes, known.size, backend=backend, steps_from_root=self.world.rank)
        self.ledger.add_untimed(name, op=op, num_bytes=num_bytes, sent_bytes=sent, num_ranks=known.size)

    def note_completion(self, work: Any, flight: Flight | None, device: torch.device, channel: Any = None) -> None:
        """Has the moment noted at which `work` is done, without waiting for it.

        Host tensors: by a callback on the communication thread. CUDA tensors under NCCL: by an event on a stream of its
        own that waits for the collective as the compute stream would.
        """
        if flight is None:
            return
        known = self._known(channel)
        if device.type == "cuda" and self._backend(known, device) == "nccl":
            if known.number not in self._streams:
                self._streams[known.number] = torch.cuda.Stream(device)
            with torch.cuda.stream(self._streams[known.number]):
                work.wait()
                flight.finished = self.ledger.stamp()
            return
        with suppress(RuntimeError, NotImplementedError, AttributeError):  # without a future the end of the wait counts
            work.get_future().add_done_callback(flight.finish)

    def new_channel(self, ranks: Sequence[int] | None = None) -> Any:
        """A process group of all ranks, or of `ranks`, this one among them; None in a world of one process.

        Every rank calls it for a group of all; for a smaller one its members do. Ranks that make several make them in
        the same order (node first, then across nodes), so that a group has the same number on all its members.
        """
        if self._alone:
            return None
        group = dist.new_group() if ranks is None else dist.new_group(list(ranks), use_local_synchronization=True)
        self._known(group)
        return group

    def sum_(self, tensor: torch.Tensor, *, name: str = "sum") -> torch.Tensor:
        """Sums `tensor` over the ranks, in place, and returns it."""
        return self._finish(self.start_sum_(tensor, name=name), tensor)

    def max_(self, tensor: torch.Tensor, *, channel: Any = None, name: str = "maximum") -> torch.Tensor:
        """Element-wise maximum of `tensor` over the ranks (of `channel`), in place; returns it."""
        return self._finish(self._start(tensor, dist.ReduceOp.MAX, name, channel=channel), tensor)

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with the one of rank `source` and returns it."""
        if self._alone:
            return tensor
        from_root = (self.world.rank - source) % self.world.world_size
        flight = self._launch("broadcast", tensor.nbytes, tensor.device, "broadcast", None, from_root=from_root)
        work = dist.broadcast(tensor, source, async_op=True)
        return self._finish(self._pending(work, flight, tensor.device, "broadcast", None), tensor)

    def max_of_floats(self, values: Sequence[float], *, channel: Any = None, name: str = "maximum") -> list[float]:
        """Element-wise maximum of equally long lists over the ranks (of `channel`), in float64."""
        if self._alone or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        return self.max_(tensor.to(self.world.device), channel=channel, name=name).tolist()

    def first_and_last(self, moments: Sequence[float], channel: int) -> tuple[list[float], list[float]]:
        """Minimum and maximum over the ranks of channel number `channel`, in one all-reduce: min x = -max(-x)."""
        group = next(group for group, known in self._channels.items() if known.number == channel)
        both = self.max_of_floats([*(-moment for moment in moments), *moments], channel=group, name="ledger: arrivals")
        return [-value for value in both[: len(moments)]], both[len(moments) :]

    def all_of_floats(self, values: Sequence[float], *, name: str = "all-gather") -> list[list[float]]:
        """Every rank's list, equally long, on every rank, in rank order, in float64."""
        if self._alone:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.world.device)
        everyone = mine.new_empty(self.world.world_size * len(values))
        self._finish(self.start_all_gather(everyone, mine, name=name), everyone)
        return everyone.view(-1, len(values)).tolist()

    def any(self, flag: bool, *, name: str = "any") -> bool:
        """True on every rank when `flag` is true on at least one."""
        return self.max_of_floats([float(flag)], name=name)[0] > 0

    def barrier(self, *, name: str = "barrier") -> None:
        """Returns when every rank has called it."""
        self.any(False, name=name)

    def gather_objects(self, item: Any) -> list[Any]:
        """Everyone's `item` in rank order on rank 0, an empty list elsewhere. For small things: it pickles."""
        if self._alone:
            return [item]
        items: list[Any] | None = [None] * self.world.world_size if self.world.is_first else None
        with self._blocked("gather objects"):
            dist.gather_object(item, items, dst=0)
        return items or []

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's `item` on every rank. For small things: it pickles."""
        if self._alone:
            return item
        items = [item]
        with self._blocked("broadcast object"):
            dist.broadcast_object_list(items, src=0)
        return items[0]

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; where it raises on some rank, every rank raises a `SharedError` of that reason.

        So a node that cannot see a file ends the whole job with its reason, said once, and nobody waits for it.
        A world of one process has nobody to tell: the error is raised as it is.
        """
        if self._alone:
            return action()
        result: T | None = None
        problem: Exception | None = None
        try:
            result = action()
        except Exception as error:
            problem = error
        told = self.broadcast_object(self.gather_objects(None if problem is None else _Told.of(problem, self.world)))
        for failure in told:
            if failure is not None:
                raise failure.as_error() from problem
        return result  # type: ignore[return-value]  # no rank raised, so this one has a result

    def _start(
        self, tensor: torch.Tensor, op: Any, name: str, finish: Callable[[], Any] | None = None, channel: Any = None
    ) -> Pending | None:
        if self._alone:
            return None
        flight = self._launch("all_reduce", tensor.nbytes, tensor.device, name, channel)
        work = dist.all_reduce(tensor, op, group=channel, async_op=True)
        return self._pending(work, flight, tensor.device, name, channel, finish)

    def _pending(
        self,
        work: Any,
        flight: Flight | None,
        device: torch.device,
        name: str,
        channel: Any,
        finish: Callable[[], Any] | None = None,
    ) -> Pending:
        self.note_completion(work, flight, device, channel)
        return Pending(work, self, name, finish, channel, flight)

    def _launch(
        self,
        op: str,
        num_bytes: int,
        device: torch.device | None,
        name: str,
        channel: Any,
        *,
        from_root: int = 0,
        sent: float | None = None,
    ) -> Flight | None:
        """Notes the arrival at a collective; before it is started, so that it cannot be done before."""
        known = self._known(channel)
        if sent is None:
            backend = "" if device is None else self._backend(known, device)
            plain = "all_reduce" if op == "exchange" else op
            sent = sent_bytes(plain, num_bytes, known.size, backend=backend, steps_from_root=from_root)
        return self.ledger.launch(
            name,
            op=op,
            num_bytes=num_bytes,
            sent_bytes=sent,
            num_ranks=known.size,
            channel=known.number,
            on_host=device is None or device.type == "cpu",
        )

    def _known(self, channel: Any) -> _Channel:
        known = self._channels.get(channel)
        if known is None:
            known = self._channels[channel] = _Channel(number=len(self._channels), size=channel.size(), group=channel)
        return known

    def _backend(self, channel: _Channel, device: torch.device) -> str:
        """The transport of `device`'s tensors on a channel: "gloo", "nccl", "mpi4py"."""
        key = (channel.number, device.type)
        if key not in self._backends:
            config = dist.get_backend_config(channel.group)  # "gloo", or "cpu:gloo,cuda:nccl"
            parts = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
            self._backends[key] = parts.get(device.type, config)
        return self._backends[key]

    def _finish(self, pending: Pending | None, tensor: torch.Tensor) -> torch.Tensor:
        if pending is not None:
            pending.wait()
        return tensor

    @contextmanager
    def _blocked(self, name: str) -> Iterator[None]:
        flight = self.ledger.launch(
            name, op="gather", num_bytes=0, sent_bytes=0.0, num_ranks=self.world.world_size, on_host=True
        )
        with self.ledger.waiting(flight), self.watch.blocking(name):
            yield
