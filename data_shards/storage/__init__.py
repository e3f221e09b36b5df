"""Where the files of a split lie, and how ranges of them are read: `open_storage("packed/train")`."""

from __future__ import annotations

import os

from data_shards.storage.base import ReadCosts, Storage
from data_shards.storage.local import LocalStorage

__all__ = ["LocalStorage", "ReadCosts", "Storage", "open_storage"]


def open_storage(root: str | os.PathLike[str]) -> Storage:
    """The storage of the files below `root`, a folder."""
    return LocalStorage(root)
