"""Every collective of the engine, in one place.

The contract of each: all ranks of the world call it, in the same order, with tensors of the same shape and dtype on the
world's device. A world of one process has no process group and every collective is the identity. The ledger is told
when a collective is launched, how long this rank was blocked by it and how many payload bytes it handed over (not
what the transport made of them: a ring all-reduce moves 2(W-1)/W times the payload through each interface).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_train.ledger.recorder import NullLedger, Recorder
from dist_train.ledger.rows import WIRE
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

    def wait(self, work: Any, name: str) -> None:
        """Waits for `work`, a `torch.distributed.Work`; raises where some rank does not come in bounded time."""

    def blocking(self, name: str) -> AbstractContextManager[Any]:
        """A `with` block that calls a blocking collective."""


class NoWatch:
    """Waits as long as the process group does."""

    def wait(self, work: Any, name: str) -> None:  # noqa: ARG002
        """`work.wait()`."""
        work.wait()

    def blocking(self, name: str) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Nothing."""
        return nullcontext()


class Pending:
    """A collective under way; `wait` blocks until the tensor holds the result, once."""

    __slots__ = ("_finish", "_launched", "_name", "_owner", "_work")

    def __init__(self, work: Any, owner: Collectives, name: str, finish: Callable[[], Any] | None) -> None:
        self._work, self._owner, self._name, self._finish = work, owner, name, finish
        self._launched = owner.ledger.stamp()

    def wait(self) -> None:
        """Blocks until every rank's contribution has arrived; on CUDA the current stream waits, not the host."""
        with self._owner.ledger.waiting(self._launched):
            self._owner.watch.wait(self._work, self._name)
        if self._finish is not None:
            self._finish()


class Collectives:
    """The collectives of one `World`, reported to one ledger."""

    def __init__(self, world: World, ledger: Recorder | None = None) -> None:
        self.world = world
        self.ledger: Recorder = ledger or NullLedger()
        self.watch: Watch = NoWatch()
        self._alone = world.world_size == 1

    def start_sum_(self, tensor: torch.Tensor, *, name: str = "sum") -> Pending | None:
        """Starts to sum `tensor` over the ranks, in place. None in a world of one process."""
        return self._start(tensor, dist.ReduceOp.SUM, name)

    def start_mean_(self, tensor: torch.Tensor, *, channel: Any = None, name: str = "mean") -> Pending | None:
        """Starts to average `tensor` over the ranks, in place: the sum, divided after the wait.

        `channel`, from `new_channel`, has an order of its own: what is started there need not be started at the
        same place among the other collectives on every rank. `name` says in accounts and errors what this is.
        """
        return self._start(
            tensor, dist.ReduceOp.SUM, name, finish=lambda: tensor.div_(self.world.world_size), channel=channel
        )

    def new_channel(self) -> Any:
        """A process group of all ranks for `start_mean_`; None in a world of one process. Every rank calls it."""
        return None if self._alone else dist.new_group()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks, in place, and returns it."""
        return self._finish(self.start_sum_(tensor), tensor)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum of `tensor` over the ranks, in place; returns it."""
        return self._finish(self._start(tensor, dist.ReduceOp.MAX, "maximum"), tensor)

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with the one of rank `source` and returns it."""
        if not self._alone:
            self._count(tensor)
            self._finish(Pending(dist.broadcast(tensor, source, async_op=True), self, "broadcast", None), tensor)
        return tensor

    def max_of_floats(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum of equally long lists over the ranks, in float64."""
        if self._alone or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        return [float(value) for value in self.max_(tensor.to(self.world.device)).cpu()]

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on at least one."""
        return self.max_of_floats([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.any(False)

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

    def clock_offset_seconds(self, *, rounds: int = 9) -> float:
        """This host's monotonic clock minus rank 0's, in seconds: the median over `rounds` barrier exits.

        Good to the skew of a barrier's exits (tens of microseconds on one node, of the order of the network's latency
        between nodes), and exactly zero for a rank in whose world all ranks share one node and so one clock.
        """
        if self._alone or self.world.num_nodes == 1:
            return 0.0
        differences = []
        for _ in range(rounds):
            self.barrier()
            mine = time.perf_counter()
            first = self.broadcast_(torch.tensor([mine], dtype=torch.float64, device=self.world.device))
            differences.append(mine - float(first))
        return sorted(differences)[rounds // 2]

    def _start(
        self, tensor: torch.Tensor, op: Any, name: str, finish: Callable[[], Any] | None = None, channel: Any = None
    ) -> Pending | None:
        if self._alone:
            return None
        self._count(tensor)
        return Pending(dist.all_reduce(tensor, op, group=channel, async_op=True), self, name, finish)

    def _finish(self, pending: Pending | None, tensor: torch.Tensor) -> torch.Tensor:
        if pending is not None:
            pending.wait()
        return tensor

    @contextmanager
    def _blocked(self, name: str) -> Iterator[None]:
        with self.ledger.waiting(self.ledger.stamp()), self.watch.blocking(name):
            yield

    def _count(self, tensor: torch.Tensor) -> None:
        self.ledger.add_bytes(WIRE, tensor.numel() * tensor.element_size())
