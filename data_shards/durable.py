"""Files and folders that are whole or not there: written aside, fsynced, and made visible by one rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["beside", "folder_written_aside", "fsync_folder", "lock_folder", "refuse_existing", "write_atomically"]

_MARKER = ".reelscale-partial"  # only a folder with it is ever cleaned away


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: other processes, and a crash, see the old file or the whole new one."""
    partial = beside(path, ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def folder_written_aside(folder: Path) -> Iterator[Path]:
    """Yield `FOLDER.partial` to write into; it becomes `folder` when the block ends without an exception.

    An exception removes it; a kill leaves it, and the next call for the same folder cleans it away. The files
    inside are the caller's to fsync.

    Raises:
        ValueError: `folder` exists and is not an empty folder.
        RuntimeError: another process is writing the same folder now.
        OSError: the disk is full, with `folder` named; any other as it came.
    """
    refuse_existing(folder)
    partial = beside(folder, ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock_folder(descriptor, folder, partial)
        _clean(partial)
        (partial / _MARKER).touch()
        try:
            yield partial
            (partial / _MARKER).unlink()
            fsync_folder(partial)
            refuse_existing(folder)
            partial.rename(folder)  # replaces an empty folder, fails on any other
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"the disk is full: {folder} was not written and nothing of it was kept; "
                    "free some space, or choose another place",
                ) from None
            raise
        fsync_folder(folder.parent)
    finally:
        os.close(descriptor)


def beside(path: Path, suffix: str) -> Path:
    """The sibling of `path` whose name is that of `path` with `suffix`; also for paths such as "." and "a/.."."""
    whole = path.resolve()
    return whole.with_name(whole.name + suffix)


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if `folder` is there and is not an empty folder."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} exists and is not a folder; choose another name")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; remove it, or choose another name")


def lock_folder(descriptor: int, folder: Path, partial: Path) -> None:
    """Hold `partial`, open as `descriptor`, for this process alone while it writes `folder`.

    `descriptor` may be that of a file in it that is open for writing: NFS locks nothing else.

    Raises RuntimeError where another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RuntimeError(
                f"another process is writing {folder} ({partial} is locked); wait for it, or choose another name"
            ) from None  # a file system without locks (some NFS, Lustre) goes on without


def _clean(partial: Path) -> None:
    entries = list(partial.iterdir())
    if entries and not (partial / _MARKER).exists():
        raise ValueError(f"{partial} exists and is not a leftover of reelscale; move it away")
    for entry in entries:
        if entry.name == _MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
