"""What an elastic run keeps the same on all ranks: the base class, and a state of plain Python objects."""

from __future__ import annotations

import queue
from collections.abc import Callable
from enum import IntFlag
from typing import Any

from dist_train.horovod.elastic import rendezvous
from dist_train.horovod.exceptions import HostsUpdatedInterrupt


class HostUpdateResult(IntFlag):
    """What happened to the set of workers."""

    no_update = 0
    removed = 1
    added = 2
    mixed = 3


class State:
    """What `run` needs of a state; a subclass says how it is saved, restored and synchronised.

    Args:
        bcast_object: broadcasts an object from rank 0.
        get_rank: this process's rank.
    """

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int]) -> None:
        self._bcast_object, self._rank = bcast_object, get_rank
        self._host_messages: queue.Queue[tuple[float, HostUpdateResult]] = queue.Queue()
        self._last_updated_timestamp = 0.0
        self._reset_callbacks: list[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: list[Callable[[], None]]) -> None:
        """Adds functions to call when a new world has formed, before the state is synchronised in it."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Called by `run` when a new world has formed."""
        self._host_messages = queue.Queue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: float, update_res: HostUpdateResult) -> None:
        """Says that workers come or go: the next `check_host_updates` raises. Only rank 0's call counts."""
        self._host_messages.put((timestamp, update_res))

    def commit(self) -> None:
        """Saves the state in this process's memory, then `check_host_updates`."""
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Looks for workers that wait to join. A broadcast of a few bytes: every rank must call it.

        Raises:
            HostsUpdatedInterrupt: on every rank, if rank 0 knows of a change.
        """
        before, update = self._last_updated_timestamp, HostUpdateResult.no_update
        latest = before
        if self._rank() == 0 and rendezvous.somebody_waits():
            latest, update = rendezvous.now(), HostUpdateResult.added
        while not self._host_messages.empty():
            timestamp, message = self._host_messages.get()
            if timestamp > before:
                latest, update = max(latest, timestamp), update | message
        before, self._last_updated_timestamp, update = self._bcast_object((before, latest, update))
        if self._last_updated_timestamp > before:
            raise HostsUpdatedInterrupt(update == HostUpdateResult.removed)

    def save(self) -> None:
        """Remembers the state in this process's memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Goes back to what was saved last."""
        raise NotImplementedError

    def sync(self) -> None:
        """Makes the state that of rank 0, and saves it."""
        raise NotImplementedError

    def reset(self) -> None:
        """Adapts to a new world, before the synchronisation in it."""


class ObjectState(State):
    """A state of Python objects, given by keyword and kept as attributes."""

    def __init__(self, bcast_object: Callable[[Any], Any], get_rank: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(bcast_object, get_rank)
        self._saved_state = kwargs
        self._set_attributes()

    def save(self) -> None:
        """Remembers the attributes. They are not copied: replace a list, do not append to it."""
        self._saved_state = {name: getattr(self, name) for name in self._saved_state}

    def restore(self) -> None:
        """Goes back to the attributes saved last."""
        self._set_attributes()

    def sync(self) -> None:
        """Takes the attributes of rank 0 as they are, and saves them."""
        if self._saved_state:
            ObjectState.save(self)
            self._saved_state = self._bcast_object(self._saved_state)
            self._set_attributes()

    def _set_attributes(self) -> None:
        for name, value in self._saved_state.items():
            setattr(self, name, value)
