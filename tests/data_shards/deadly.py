"""Batch makers that end the worker they are in, or let its memory grow; workers import this module."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch

from data_shards.batch import BatchArrays
from data_shards.loader import ClipLoader
from data_shards.sample_order import Visits
from data_shards.worker import BatchMaker, Failure, Made
from data_shards.workers.requests import Request


class Deadly(BatchMaker):
    """Ends its process in the middle of the clip of `deadly_sample`, in the way that `how` says."""

    deadly_sample = -1
    how = "kill"

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "deadly_sample": self.deadly_sample, "how": self.how}

    def _make_clip(self, visits: Visits, place: int, sample_id: int, out: torch.Tensor) -> dict[str, float]:
        if sample_id == self.deadly_sample and self._worker is not None:
            self._note(sample_id, 2)
            out.fill_(77)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "exit":
                os._exit(9)
            if self.how == "hang":
                time.sleep(1000)
            if self.how == "mistake":
                raise ZeroDivisionError("a mistake in the code")
        return super()._make_clip(visits, place, sample_id, out)


class Leaky(BatchMaker):
    """Holds `leak_bytes` more after each batch."""

    leak_bytes = 32 << 20

    def make(
        self,
        request: Request,
        arrays: BatchArrays,
        *,
        goes_on: Callable[[], bool] = lambda: True,
        refused: frozenset[int] = frozenset(),
    ) -> Made | Failure | None:
        """As `BatchMaker.make`."""
        kept = self.__dict__.setdefault("_kept", [])
        kept.append(bytearray(os.urandom(1) * self.leak_bytes))
        return super().make(request, arrays, goes_on=goes_on, refused=refused)


class Slow(BatchMaker):
    """Takes 20 ms longer for each clip, so that workers are killed in the middle of one."""

    def _make_clip(self, visits: Visits, place: int, sample_id: int, out: torch.Tensor) -> dict[str, float]:
        out.fill_(99)
        self._note(sample_id, 2)
        time.sleep(0.02)
        return super()._make_clip(visits, place, sample_id, out)


def give_maker(loader: ClipLoader, kind: type[BatchMaker], **attributes: object) -> None:
    """Lets the workers of a loader that has not begun make batches with `kind`."""
    maker = loader._maker
    own = kind(loader.manifest, clip=maker.clip, stream=maker.stream, activity=maker.activity)
    for name, value in attributes.items():
        setattr(own, name, value)
    loader._maker = own
