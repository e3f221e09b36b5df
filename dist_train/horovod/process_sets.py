"""Process sets: subsets of the ranks that run collectives of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dist_train.horovod.bootstrap import listed_ranks
from dist_train.horovod.context import required
from dist_train.horovod.engine.entries import Entry
from dist_train.horovod.engine.messages import Request


class ProcessSet:
    """Some of the ranks. Usable in collectives once `init` or `add_process_set` has got it."""

    process_set_id: int | None = None
    """None until then, and again once it has been removed."""
    ranks: list[int] | None = None
    """In ascending order; of the global set, None until `init`."""

    def __init__(self, ranks_or_comm: Any) -> None:
        """Of a list of ranks, or the ranks of an mpi4py communicator.

        Raises:
            ValueError: neither of these.
        """
        try:
            self.ranks = sorted(listed_ranks(ranks_or_comm))
        except ValueError:
            raise ValueError(
                "ProcessSet should be initialized with a list of process ranks or an mpi4py Comm object, "
                f"not {ranks_or_comm!r}"
            ) from None

    def size(self) -> int | None:
        """How many ranks; None where the set is not in use."""
        return None if self.process_set_id is None else len(self._members())

    def rank(self) -> int | None:
        """This process's number within the set; None where the set is not in use.

        Raises:
            ValueError: this process is not in the set.
        """
        if self.process_set_id is None:
            return None
        rank = required().rank
        if rank not in self._members():
            raise ValueError(f"Process is not part of provided process set: rank {rank} is not in {self.ranks}")
        return self._members().index(rank)

    def included(self) -> bool | None:
        """Whether this process is in the set."""
        return None if self.ranks is None else required().rank in self.ranks

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"

    def _members(self) -> tuple[int, ...]:
        assert self.process_set_id is not None
        members = required().engine.members.get(self.process_set_id)
        if members is None:
            raise ValueError(f"Process set does not exist or has not been registered: {self}")
        return members


global_process_set = ProcessSet([])
"""All ranks."""
global_process_set.process_set_id = 0
global_process_set.ranks = None


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Makes a process set usable; every rank of the world calls it with the same ranks.

    Raises:
        ValueError: there is a set of these ranks already, or a rank that does not exist.
        HorovodInternalError: the ranks called it with different sets.
    """
    context = required()
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    ranks = tuple(process_set.ranks or ())
    if len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(context.size)):
        raise ValueError(f"process set {list(ranks)}: the world has the ranks 0 to {context.size - 1}, name each once")
    number = _agree(Request("add_process_set", "process_set", shapes=(ranks,)))
    if number < 0:
        raise ValueError(f"Attempted to add a duplicate process set: {process_set}")
    process_set.process_set_id = number
    return process_set


def remove_process_set(process_set: ProcessSet) -> bool:
    """Makes a process set unusable again; every rank of the world calls it. False where it is not removable."""
    number = process_set.process_set_id
    if not number:
        return False
    process_set.process_set_id = None
    return _agree(Request("remove_process_set", "process_set", root=number)) >= 0


def set_up(process_sets: Iterable[ProcessSet]) -> None:
    """For `init`: makes the sets usable that it was given."""
    global_process_set.ranks = list(range(required().size))
    for number, process_set in enumerate(process_sets):
        try:
            add_process_set(process_set)
        except ValueError as error:
            raise ValueError(
                f"Horovod could not be initialized because process_sets entry number {number} is wrong: {error}"
            ) from None


def _agree(request: Request) -> int:
    engine = required().engine
    entry = Entry(request=request)
    engine.submit(entry)
    engine.flush()
    entry.wait()
    return entry.value
