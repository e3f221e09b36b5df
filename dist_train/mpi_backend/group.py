"""A process group of torch.distributed whose collectives are MPI's: how it comes to be, runs operations, and ends."""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_train.mpi_backend import exits
from dist_train.mpi_backend.collectives import CollectivesOfMPI
from dist_train.mpi_backend.library import MPI
from dist_train.mpi_backend.operation import Operation
from dist_train.mpi_backend.progress import mpi_calls, progress
from dist_train.mpi_backend.staging import Staging

NAME = "mpi4py"


def register() -> None:
    """Makes the backend known to torch.distributed, once."""
    if not dist.is_backend_available(NAME):
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu", "cuda"])


def _create(options: Any, pg_options: Any) -> MPIGroup:  # noqa: ARG001  PyTorch's signature
    return MPIGroup(
        options.store,
        rank=options.group_rank,
        size=options.group_size,
        name=options.group_id,
        timeout=options.timeout,
    )


class MPIGroup(CollectivesOfMPI, dist.ProcessGroup):  # type: ignore[misc]  # overloads that nobody calls
    """The ranks of one communicator. PyTorch makes it: `init_process_group("mpi4py")`, `new_group(backend="mpi4py")`.

    Raises:
        RuntimeError: the members did not all come in time, or were not started as one MPI program.
    """

    def __init__(self, store: Any, *, rank: int, size: int, name: str, timeout: timedelta) -> None:
        dist.ProcessGroup.__init__(self, rank, size)  # type: ignore[call-arg]
        self._name = name
        self._timeout = timeout
        self._members = _meet(store, rank, size, name, timeout)
        self._comm = _communicator(self._members, name)
        exits.take_part(self._comm)
        self._order = threading.RLock()  # of calls: number and place in MPI's order are given together
        self._sequence = 0
        self._collectives: deque[Operation] = deque()  # not yet posted, or not all of it
        self._messages: deque[Operation] = deque()
        self._failure: str | None = None

    # What PyTorch asks of a group

    def getBackendName(self) -> str:
        """ "mpi4py"."""
        return NAME

    def getGroupName(self) -> str:
        """PyTorch's name of the group."""
        return self._name

    def _get_backend_name(self) -> str:
        return NAME

    def _get_sequence_number_for_group(self) -> int:
        return self._sequence

    def _set_sequence_number_for_group(self) -> None:
        """Nothing to agree on: every rank counts from zero."""

    def set_timeout(self, timeout: timedelta) -> None:
        """The time-out of the operations to come."""
        self._timeout = timeout

    def shutdown(self) -> None:
        """Frees the communicator, unless something is wrong with it."""
        if self._comm is None or MPI.Is_finalized():
            return
        if self._failure is None and not any(operation.belongs_to(self) for operation in progress.outstanding()):
            with mpi_calls:
                self._comm.Free()
        self._comm = None

    def abort(self) -> None:
        """Marks the group broken: its operations raise, and the process does not wait for its peers when it exits."""
        self.fail(f"group {self._name} was aborted on rank {self.rank()}")

    # What operations ask of a group

    def fail(self, words: str) -> None:
        """Breaks the group: what is called from now on raises."""
        self._failure = self._failure or words
        exits.problems.append(words)

    def post_in_order(self) -> None:
        """Posts collectives in the order of their calls, as far as their memory is ready and they may be in flight."""
        with self._order:
            for queue in (self._collectives, self._messages):
                while queue and queue[0].is_ready and queue[0].post():
                    queue.popleft()

    def _launch(
        self,
        name: str,
        calls: Callable[[Any], Iterable[Any]],
        *,
        staging: Staging,
        options: Any = None,
        result: Sequence[torch.Tensor] = (),
        check: Callable[[Any], None] | None = None,
        is_message: bool = False,
    ) -> Operation:
        """Starts an operation; `calls` is given the communicator and makes MPI's calls, one for each item."""
        if self._failure is not None:
            raise RuntimeError(f"{name}: the group is broken since: {self._failure}")
        if self._comm is None:
            raise RuntimeError(f"{name}: group {self._name} was destroyed")
        staging.fill()
        timeout = getattr(options, "timeout", None)
        seconds = (timeout if timeout and timeout > timedelta(0) else self._timeout).total_seconds()
        with self._order:
            self._sequence += 1
            operation = Operation(
                self,
                title=f"{name}, number {self._sequence} of group {self._name} (ranks {_shown(self._members)})",
                calls=calls(self._comm),
                staging=staging,
                result=result,
                seconds=seconds,
                check=check,
            )
            # Messages do not wait for collectives: what is received may be what a peer needs to come to one.
            (self._messages if is_message else self._collectives).append(operation)
            self.post_in_order()
        operation.raise_failure()
        progress.add(operation, background=getattr(options, "asyncOp", True))
        return operation


def _meet(store: Any, rank: int, size: int, name: str, timeout: timedelta) -> list[int]:
    """The ranks of the members in MPI's world, once all of them are there."""
    world = MPI.COMM_WORLD
    store.set(f"{rank}", f"{world.Get_rank()}")
    keys = [f"{member}" for member in range(size)]
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        missing = [member for member in range(size) if not store.check([f"{member}"])]
        raise RuntimeError(
            f"group {name}: of {size} ranks, {_shown(missing)} did not come to make it in {timeout}"
        ) from None
    members = [int(value) for value in store.multi_get(keys)]
    if len(set(members)) != size:
        raise RuntimeError(
            f"the {size} processes of group {name} are not one MPI program (here MPI's world has size "
            f"{world.Get_size()}): start them with mpirun, or with srun --mpi=pmix or pmi2 as the MPI needs"
        )
    return members


def _communicator(members: list[int], name: str) -> Any:
    """Of the members alone, in their order; the other processes need not take part."""
    world = MPI.COMM_WORLD
    with mpi_calls:
        everyone = world.Get_group()
        chosen = everyone.Incl(members)
        comm = world.Create_group(chosen, tag=zlib.crc32(name.encode()) % 32768)
        chosen.Free()
        everyone.Free()
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    comm.Set_name(f"torch {name}"[: MPI.MAX_OBJECT_NAME - 1])
    return comm


def _shown(ranks: Sequence[int]) -> str:
    """`[0, 1, 2, 3]` as `0..3`, others as they are."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}..{ranks[-1]}"
    return ", ".join(str(rank) for rank in ranks)
