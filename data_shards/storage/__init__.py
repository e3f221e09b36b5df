"""Where the files of a split lie, and how ranges of them are read: `open_storage("packed/train")`."""

from __future__ import annotations

import os
from pathlib import Path

from data_shards.storage.base import ReadCosts, Storage, StorageConfig
from data_shards.storage.local import LocalStorage
from data_shards.storage.read_ahead import Held, ReadAhead, Reads
from data_shards.storage.urls import below, is_url

__all__ = [
    "Held",
    "LocalStorage",
    "ReadAhead",
    "ReadCosts",
    "Reads",
    "Storage",
    "StorageConfig",
    "below",
    "check_url",
    "is_url",
    "open_storage",
]


def open_storage(
    root: str | os.PathLike[str], config: StorageConfig | None = None, *, cache: Path | None = None
) -> Storage:
    """The storage of the files below `root`: a folder, or a URL that fsspec knows (`s3://`, `https://`, `gs://`).

    Args:
        cache: folder of this set in the node's cache; used for a URL where `config.cache_folder` is set.

    The first read of a URL raises what `check_url` does.
    """
    config = config or StorageConfig()
    if not is_url(root):
        return LocalStorage(root)
    from data_shards.storage.cache import BlockCache  # only remote sets need it
    from data_shards.storage.remote import RemoteStorage

    blocks = None
    if cache is not None and config.cache_folder is not None:
        blocks = BlockCache(cache, max_bytes=int(config.cache_gigabytes * 1e9))
    return RemoteStorage(os.fspath(root), config, cache=blocks)


def check_url(root: str) -> None:
    """Raises ValueError for a URL whose kind is unknown or whose package is not installed; makes no request."""
    from data_shards.storage.remote_files import open_remote_files  # only remote sets need it

    open_remote_files(root, num_connections=1)
