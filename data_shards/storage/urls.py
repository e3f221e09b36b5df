"""URLs of remote sets."""

from __future__ import annotations

import os
import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether `place` is a URL ("s3://bucket/set") and not a path."""
    return _SCHEME.match(os.fspath(place)) is not None


def below(place: str | os.PathLike[str], name: str) -> str:
    """Folder or file `name` below a folder or a URL."""
    return f"{os.fspath(place).rstrip('/')}/{name}"
