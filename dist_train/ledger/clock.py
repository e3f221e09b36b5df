"""Clocks that stamp a moment without waiting for it.

A stamp is opaque; `resolve` turns stamps into seconds on the host's monotonic clock. `HostClock` reads the clock at
once. `CudaClock` records an event on the current stream, so a stamp costs about a microsecond and never blocks: the
time between two stamps is the time the *stream* spent between them, and a host that runs ahead of the device
(a batch that was there in time, a log line) shows as zero, which is what it cost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Stamps moments; see `HostClock` and `CudaClock`."""

    def stamp(self) -> Any:
        """A stamp of this moment."""

    def resolve(self, stamps: Sequence[Any]) -> list[float]:
        """Seconds on the host's monotonic clock, one for each stamp, in the order given."""


class HostClock:
    """The host's monotonic clock: a stamp is the time itself, in seconds."""

    def stamp(self) -> float:
        """Seconds now."""
        return time.perf_counter()

    def resolve(self, stamps: Sequence[float]) -> list[float]:
        """The stamps themselves."""
        return list(stamps)


class CudaClock:
    """Events on the current CUDA stream, tied to the host's clock by one synchronisation at each `resolve`.

    `resolve` waits for the last stamp, so call it at log intervals only. Events are reused. Elapsed times are
    float32 milliseconds in CUDA; each `resolve` starts from a new base event, which keeps them precise to
    microseconds over intervals of minutes.
    """

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self._base, self._base_seconds = self._synchronized_event()

    def stamp(self) -> torch.cuda.Event | float:
        """An event recorded on the current stream."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def resolve(self, stamps: Sequence[torch.cuda.Event | float]) -> list[float]:
        """Seconds of each stamp; a float (taken on the host before the device existed) is passed through."""
        base, base_seconds = self._synchronized_event()
        seconds = []
        for stamp in stamps:
            if isinstance(stamp, float):
                seconds.append(stamp)
                continue
            seconds.append(self._base_seconds + self._base.elapsed_time(stamp) / 1e3)
            self._free.append(stamp)
        self._base, self._base_seconds = base, base_seconds
        return seconds

    def _synchronized_event(self) -> tuple[torch.cuda.Event, float]:
        torch.cuda.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event, time.perf_counter()


def clock_for(device: torch.device) -> Clock:
    """The clock that measures work on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()


def process_start_seconds() -> float:
    """When this process started, in seconds on `time.perf_counter`'s clock, to 10 ms (the kernel's tick).

    Read from /proc; where there is none, the moment of this call.
    """
    now = time.perf_counter()
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            after_name = file.read().rsplit(")", 1)[1].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), seconds since boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(age, 0.0)
