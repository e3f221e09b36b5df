"""What a person sees on the terminal: logging set up once, and a progress bar for everything long.

On a terminal the bar is rich's; elsewhere (a SLURM log, a pipe) it is a plain line every few seconds.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 5.0


def console() -> Console:
    """Standard output; 80 columns when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 80, highlight=False)


def set_up_logging(*, rank: int = 0, log_file: Path | None = None) -> None:
    """Warnings and worse to standard error on rank 0; everything of ours to `log_file`, where one is given."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.WARNING)
    for package in ("launch", "dist_train", "data_shards", "models"):
        logging.getLogger(package).setLevel(logging.INFO)
    if rank == 0:
        screen = logging.StreamHandler(sys.stderr)
        screen.setLevel(logging.WARNING)
        screen.setFormatter(logging.Formatter("reelscale: %(levelname)s: %(message)s"))
        root.addHandler(screen)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(name)s %(levelname)s: %(message)s"))
        root.addHandler(file)


class ProgressLine:
    """A progress bar as a context manager; call `update(done, total)` as often as you like.

    Args:
        label: what is going on ("packing").
        unit: what is counted ("clips").
        shown: False on ranks that stay silent.
    """

    def __init__(self, label: str, *, unit: str, shown: bool = True) -> None:
        self._label, self._unit, self._shown = label, unit, shown
        self._note = ""
        self._done, self._total = 0, 1
        self._first: int | None = None  # what was done before it began
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
        self._task = self._bar.add_task(label, total=None, note="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def annotate(self, note: str) -> None:
        """Sets the words behind the bar."""
        self._note = note

    def meanwhile(self, note: str) -> None:
        """Shows what is being done between two updates."""
        self.annotate(note)
        self.update(self._done, self._total)

    def update(self, done: int, total: int) -> None:
        """Says how far it is; the first call may say that some was done before, which the time left leaves out."""
        self._done, self._total = done, total
        if self._first is None:
            self._first = done
            if self._bar is not None and self._task is not None:
                self._bar.reset(self._task, completed=done, total=total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=self._note)
            return
        now = time.monotonic()
        if not self._shown or now - self._last_line < PLAIN_LINE_SECONDS:
            return
        self._last_line = now
        left = (now - self._started) / max(done - self._first, 1) * (total - done)
        sys.stderr.write(
            f"{self._label} {100 * done // max(total, 1):3d} %  {done}/{total} {self._unit}  "
            f"{left:.0f} s left  {self._note}".rstrip()
            + "\n"
        )
        sys.stderr.flush()
