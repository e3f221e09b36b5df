"""Append-only JSON-lines files that survive a kill: a line cut short never spoils the next one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends objects to `path`, one a line. After a kill in mid-line the file goes on with a fresh line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not _ends_with_newline(path)
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds one object; it reaches the operating system at the next `flush`."""
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        """Hands what was written to the operating system: it survives this process's death."""
        self._file.flush()

    def sync(self) -> None:
        """Puts what was written on the disk: it survives the machine's death."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes; later calls do nothing."""
        self._file.close()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in `path` in order, a line at a time; a line that a kill cut short is passed over."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"
