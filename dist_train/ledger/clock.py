"""Clocks that stamp a moment without waiting for it.

A stamp is opaque; `resolve` turns stamps into seconds on the host's monotonic clock. `HostClock` reads the clock at
once. `CudaClock` records an event on the current stream, so a stamp costs about a microsecond and never blocks: the
time between two stamps is the time the *stream* spent between them, and a host that runs ahead of the device
(a batch that was there in time, a log line) shows as zero, which is what it cost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Stamps moments; see `HostClock` and `CudaClock`."""

    def stamp(self) -> Any:
        """A stamp of this moment."""

    def now(self) -> float:
        """Seconds on the host's monotonic clock, from any thread."""

    def resolve(self, stamps: Sequence[Any]) -> list[float]:
        """Seconds on the host's monotonic clock, one for each stamp, in the order given."""


class HostClock:
    """The host's monotonic clock (or `now`, in a test): a stamp is the time itself, in seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = self.stamp = now

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

    def now(self) -> float:
        """Seconds on the host's clock."""
        return time.perf_counter()

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


@dataclass(frozen=True, kw_only=True)
class ClockReading:
    """One comparison of this host's clock with rank 0's."""

    at: float
    """When, in seconds on this host's clock."""
    offset: float
    """This host's clock minus rank 0's, in seconds."""
    uncertainty: float
    """The offset is within plus or minus this many seconds: half the shortest round trip."""


class ClockOffset:
    """This host's clock minus rank 0's at any moment: a line through the last two readings, which follows the drift."""

    def __init__(self, *readings: ClockReading) -> None:
        self._readings = list(readings)

    def add(self, reading: ClockReading) -> None:
        """Takes a later reading; only the last two count."""
        self._readings = [*self._readings[-1:], reading]

    @property
    def uncertainty(self) -> float:
        """Of the last reading, in seconds; 0 without any."""
        return self._readings[-1].uncertainty if self._readings else 0.0

    def at(self, moment: float) -> float:
        """The offset in seconds at `moment` on this host's clock; 0 without a reading."""
        if not self._readings:
            return 0.0
        first, last = self._readings[0], self._readings[-1]
        if last.at - first.at < 1.0:  # too close to tell a drift from the noise of the readings
            return last.offset
        return last.offset + (last.offset - first.offset) / (last.at - first.at) * (moment - last.at)


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
