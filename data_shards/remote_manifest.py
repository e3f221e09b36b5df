"""The manifest of a split behind a URL, copied to this node so that all its processes map the same `samples.npy`.

    open_manifest("s3://bucket/set/train", storage=StorageConfig(cache_folder=Path("/local/cache")))

The first process of a node fetches `manifest.json` and `samples.npy`, checks them and asks for each shard's size; the
others wait for it, and later runs find the copy. Its folder is named by the URL and the manifest's checksum: a set that
was packed again gets another, and nothing of the old one is used with the new.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_shards.durable import write_atomically
from data_shards.errors import ManifestError
from data_shards.manifest import SAMPLES_NAME, Manifest, check_samples, crc32_of_file, open_manifest
from data_shards.manifest_header import MANIFEST_NAME, Shard, check_header, shards_of
from data_shards.storage.base import ReadCosts, StorageConfig
from data_shards.storage.remote import RemoteStorage

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_PART_BYTES = 64 << 20
_UPLOAD_AGAIN = "upload the split again"


def open_remote(url: str, config: StorageConfig, *, check_shards: bool) -> Manifest:
    """The split at `url`, its manifest copied to this node if it is not there yet.

    Raises:
        ManifestError: there is no split, it is damaged, or a shard is missing or has another size.
        OSError: the network does not give it, naming the file, after retries.
        ValueError: the URL's kind is unknown, or its package is not installed.
    """
    storage = RemoteStorage(url, config)
    try:
        content = _asked(storage, lambda: storage.read_file(MANIFEST_NAME))
    except FileNotFoundError:
        raise ManifestError(
            f"{storage.root} is not a packed split (it has no {MANIFEST_NAME}); give the URL of a split, such as "
            "s3://bucket/set/train"
        ) from None
    header = check_header(content, f"{storage.root}/{MANIFEST_NAME}")
    shards = shards_of(header, f"{storage.root}/{MANIFEST_NAME}")
    folder = _folder_of_copies(config) / _copy_name(storage.root, header["samples_crc32"])
    with _alone_in(folder):
        if not _is_whole(folder, content, header, check_shards):
            _copy(storage, folder, content, header, shards)
    return replace(open_manifest(folder, check_shards=False, storage=config), url=storage.root)


def _is_whole(folder: Path, content: bytes, header: dict[str, Any], check: bool) -> bool:
    path, samples = folder / MANIFEST_NAME, folder / SAMPLES_NAME
    if not path.is_file() or not samples.is_file() or path.read_bytes() != content:
        return False
    return not check or crc32_of_file(samples) == header["samples_crc32"]


def _copy(
    storage: RemoteStorage, folder: Path, content: bytes, header: dict[str, Any], shards: tuple[Shard, ...]
) -> None:
    """Copy both files; the copy counts as whole only when all checks are passed."""
    logger.info("copying the manifest of %s to %s", storage.root, folder)
    path = folder / MANIFEST_NAME
    path.unlink(missing_ok=True)
    try:
        _check_sizes(storage, shards)
        _copy_samples(storage, folder / SAMPLES_NAME)
    except FileNotFoundError as error:
        raise ManifestError(f"{storage.root}/{error.filename} is missing; {_UPLOAD_AGAIN}") from None
    write_atomically(path, content)
    try:
        check_samples(folder, header, shards, open_manifest(folder, check_shards=False).samples)
    except ManifestError as error:
        path.unlink()
        raise ManifestError(f"{storage.root}: of its copy, {error}") from None


def _check_sizes(storage: RemoteStorage, shards: Sequence[Shard]) -> None:
    sizes = _asked(storage, lambda: storage.sizes([shard.name for shard in shards]))
    for shard, size in zip(shards, sizes, strict=True):
        if size is not None and size != shard.num_bytes:
            raise ManifestError(
                f"{storage.root}/{shard.name} has {size} bytes, {MANIFEST_NAME} says {shard.num_bytes}: the tar was "
                f"cut or replaced; {_UPLOAD_AGAIN}"
            )


def _copy_samples(storage: RemoteStorage, path: Path) -> None:
    """Copy `samples.npy`, in parts, for it may not fit into memory."""
    (size,) = _asked(storage, lambda: storage.sizes([SAMPLES_NAME]))
    offset = 0
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        while size is None or offset < size:
            wanted = _PART_BYTES if size is None else min(_PART_BYTES, size - offset)
            (part,) = _asked(storage, partial(storage.read, SAMPLES_NAME, [(offset, wanted)], ReadCosts()))
            file.write(part)
            offset += len(part)
            if len(part) < wanted:
                break
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _asked(storage: RemoteStorage, ask: Callable[[], Result]) -> Result:
    """What `ask` gives; an error of the network names the place."""
    try:
        return ask()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise type(error)(error.errno, f"{error.strerror}, reading {storage.root}/{error.filename}") from error


def _folder_of_copies(config: StorageConfig) -> Path:
    """The node's cache, or without one a folder of this user among the temporary ones."""
    if config.cache_folder is not None:
        return config.cache_folder
    folder = Path(tempfile.gettempdir()) / f"reelscale-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(errno.EACCES, f"{folder} belongs to somebody else; set --data.storage.cache-folder")
    return folder


def _copy_name(url: str, samples_crc32: int) -> str:
    """Short, readable, and another for every split."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "_", url.partition("://")[2])[-60:].strip("._")
    digest = hashlib.sha256(f"{url} {samples_crc32}".encode()).hexdigest()[:16]
    return f"{words}-{digest}"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process of this node is in here; one that is killed lets go. Makes the folder where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        advice = "give a folder of yours on a disk of this node with --data.storage.cache-folder"
        raise type(error)(error.errno, f"{error.strerror}: {folder} cannot be written to; {advice}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
