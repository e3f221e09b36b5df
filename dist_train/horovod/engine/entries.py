"""A collective that this rank has asked for: its tensors, and where its outcome appears."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dist_train.horovod.engine.messages import Request
from dist_train.horovod.exceptions import HorovodInternalError


@dataclass(kw_only=True, eq=False)
class Entry:
    """One request of this rank, from the call that made it until its outcome is fetched."""

    request: Request
    inputs: list[Tensor] = field(default_factory=list)
    """Detached and contiguous; one per tensor of the request."""
    in_place: bool = False
    """Whether the outputs are the inputs."""
    splits: list[int] = field(default_factory=list)
    """Rows for each rank of the set, in an alltoall."""
    asked: float = 0.0
    """When, in seconds of `time.monotonic`."""
    inputs_ready: torch.cuda.Event | None = None
    """After which the inputs hold their values, on a GPU."""
    outputs: list[Tensor] = field(default_factory=list)
    received_splits: Tensor | None = None
    """Rows from each rank of the set, after an alltoall; int32."""
    value: int = 0
    """The response's value, where it has one."""
    error: str = ""
    outputs_ready: torch.cuda.Event | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def finish(self, error: str = "") -> None:
        """Lets `wait` return, or raise; the first call counts."""
        if not self.done.is_set():
            self.error = error
            self.done.set()

    def wait(self) -> None:
        """Blocks until the outputs are there, in the order of the current CUDA stream where they are on a GPU.

        Raises:
            HorovodInternalError: the collective failed.
        """
        self.done.wait()
        if self.error:
            raise HorovodInternalError(self.error)
        if self.outputs_ready is not None:
            self.outputs_ready.wait()
            for output in self.outputs:
                output.record_stream(torch.cuda.current_stream())

    def result(self) -> Any:
        """What Horovod's `synchronize` returns: one tensor, a tuple of a group's, or an alltoall's pair."""
        if self.received_splits is not None:
            return self.outputs[0], self.received_splits
        return self.outputs[0] if self.outputs else None
