"""HOROVOD_TIMELINE: a Chrome trace (chrome://tracing, Perfetto) of when each tensor was negotiated and exchanged."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, TextIO


class Timeline:
    """Writes a trace file while one is open; otherwise every call is nothing. Times are of `time.monotonic`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._mark_cycles = False
        self._started = 0.0
        self._rows: dict[str, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether events are written."""
        return self._file is not None

    def start(self, path: str | Path, mark_cycles: bool = False) -> None:
        """Begins a trace in a new file; one that is being written is completed first."""
        self.stop()
        with self._lock:
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (stays open until stop)
            self._mark_cycles = mark_cycles
            self._started = time.monotonic()
            self._rows = {}
            origin = {"start_time_since_epoch_in_micros": time.time_ns() // 1000}
            self._file.write("[\n" + json.dumps({"name": "process_name", "ph": "M", "pid": 0, "args": origin}))

    def stop(self) -> None:
        """Completes the file."""
        with self._lock:
            if self._file is not None:
                self._file.write("\n]\n")
                self._file.close()
                self._file = None

    def span(self, tensor: str, activity: str, start: float, end: float) -> None:
        """`tensor` was in `activity`, such as NEGOTIATE_ALLREDUCE, between two times."""
        with self._lock:
            if self._file is None or start < self._started:
                return
            row = self._rows.get(tensor)
            if row is None:
                row = self._rows[tensor] = len(self._rows) + 1
                self._write({"name": "process_name", "ph": "M", "pid": row, "args": {"name": tensor}})
            duration = round((end - start) * 1e6, 3)
            self._write({"name": activity, "ph": "X", "pid": row, "ts": self._micros(start), "dur": duration})
            self._file.flush()  # a trace is looked at while the job runs, and when it was killed

    def cycle(self) -> None:
        """The coordinator's answers have arrived."""
        with self._lock:
            if self._file is not None and self._mark_cycles:
                self._write(
                    {"name": "CYCLE_START", "ph": "i", "s": "g", "pid": 0, "ts": self._micros(time.monotonic())}
                )

    def _micros(self, moment: float) -> float:
        return round((moment - self._started) * 1e6, 3)

    def _write(self, event: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(",\n" + json.dumps(event))
