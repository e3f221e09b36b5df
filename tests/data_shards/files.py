"""Files of tests: written with their folders, compared as a whole."""

from __future__ import annotations

import hashlib
from pathlib import Path


def put(path: Path, content: bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def digest(folder: Path) -> dict[str, str]:
    """A checksum of each file below `folder`, by its relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
