"""The slabs that workers make batches in: shared memory that stays allocated, lent to whoever uses a batch.

A slab comes back by itself when nothing refers to the tensors of its batch any more (and, after an asynchronous copy,
when the device has done it), so a batch may be kept for as long as one likes and nothing has to be returned by hand.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from data_shards.batch import BatchArrays, BatchShape
from data_shards.workers.memory import SharedMemory

logger = logging.getLogger(__name__)


class Slabs:
    """`num_slabs` places for batches of `shape`, in memory shared with the workers."""

    def __init__(self, shape: BatchShape, num_slabs: int) -> None:
        self.shape = shape
        self.num_slabs = num_slabs
        self._memory = SharedMemory(shape.num_bytes * num_slabs)

    def arrays(self, slab: int, num_clips: int) -> BatchArrays:
        """The tensors of a slab, to write to (a worker's view)."""
        return self.shape.arrays(_bytes_of(self._part(slab)), num_clips)

    @property
    def used_bytes(self) -> int:
        """Memory that the slabs take now."""
        return self._memory.used_bytes

    def _part(self, slab: int) -> ctypes.Array[ctypes.c_ubyte]:
        return self._memory.part(slab * self.shape.num_bytes, self.shape.num_bytes)


class LentSlabs(Slabs):
    """The training process's side of it: lends slabs out, and knows when they are back.

    Args:
        give_back: called with the slab's number when it is free; on any thread, and soon after it is.
        pin: page-lock the slabs that are used, for asynchronous copies to a CUDA device.
    """

    def __init__(self, shape: BatchShape, num_slabs: int, *, give_back: Callable[[int], None], pin: bool) -> None:
        super().__init__(shape, num_slabs)
        self._give_back = give_back
        self._pin = pin
        self._pinned: set[int] = set()
        self._cooling: deque[tuple[int, list[Any]]] = deque()
        self.lent: set[int] = set()

    def __del__(self) -> None:  # not before the last lent slab is back: what watches a slab refers to this
        if self.__dict__.get("_pinned"):
            while self.cool_down():
                pass
            for slab in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(ctypes.addressof(self._part(slab)))

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "num_slabs": self.num_slabs, "_memory": self._memory}

    def lend(self, slab: int, num_clips: int) -> tuple[BatchArrays, Lease]:
        """The batch of a slab; it comes back when no tensor refers to it any more."""
        if self._pin and slab not in self._pinned:
            self._pin_slab(slab)
        part = self._part(slab)
        lease = Lease()
        self.lent.add(slab)
        weakref.finalize(part, self._returned, slab, lease.events).atexit = False
        return self.shape.arrays(_bytes_of(part), num_clips), lease

    def collect(self) -> None:
        """Give back the slabs whose copies to a device have ended meanwhile."""
        for _ in range(len(self._cooling)):
            self._returned(*self._cooling.popleft())

    def cool_down(self) -> bool:
        """Wait for the oldest copy under way; False where there is none."""
        if not self._cooling:
            return False
        for event in self._cooling[0][1]:
            event.synchronize()
        self.collect()
        return True

    def _returned(self, slab: int, events: list[Any]) -> None:
        if not all(event.query() for event in events):
            self._cooling.append((slab, events))
            return
        self.lent.discard(slab)
        self._give_back(slab)

    def _pin_slab(self, slab: int) -> None:
        address = ctypes.addressof(self._part(slab))
        status = int(torch.cuda.cudart().cudaHostRegister(address, self.shape.num_bytes, 0))
        if status:
            logger.warning(
                "batches are not in pinned memory, copies to the device will wait: cudaHostRegister of %d MiB says "
                "error %d (see ulimit -l)",
                self.shape.num_bytes >> 20,
                status,
            )
            self._pin = False
            return
        self._pinned.add(slab)


class Lease:
    """What keeps a slab beyond the tensors on it: copies that a device has not done yet."""

    __slots__ = ("events",)

    def __init__(self) -> None:
        self.events: list[Any] = []

    def used_by(self, device: torch.device) -> None:
        """What `device` was just asked to do uses the slab until it is done."""
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self.events.append(event)


def _bytes_of(part: ctypes.Array[ctypes.c_ubyte]) -> torch.Tensor:
    return torch.frombuffer(part, dtype=torch.uint8)
