"""Memory that the training process and its workers share, without a name and without a limit of its own.

It belongs to no file system (`memfd_create`), so `/dev/shm` may be small (docker: 64 MiB), nothing is left behind
whatever ends the processes, and only pages that were written to take memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

_PAGE = mmap.PAGESIZE


class SharedMemory:
    """`num_bytes` of zeros that are shared with each process that this object is passed to as it starts."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(whole_pages(num_bytes), _PAGE)
        self.descriptor = _anonymous_file()
        os.ftruncate(self.descriptor, self.num_bytes)
        self.buffer = mmap.mmap(self.descriptor, self.num_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_bytes": self.num_bytes, "descriptor": DupFd(self.descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_bytes = state["num_bytes"]
        self.descriptor = state["descriptor"].detach()
        self.buffer = mmap.mmap(self.descriptor, self.num_bytes)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)  # the mapping lives on for whoever still uses it

    @property
    def used_bytes(self) -> int:
        """Memory that it takes: pages that were written to."""
        return os.fstat(self.descriptor).st_blocks * 512

    def part(self, offset: int, num_bytes: int) -> ctypes.Array[ctypes.c_ubyte]:
        """A buffer over a part of it: a new object each time, so that its end can be watched."""
        return (ctypes.c_ubyte * num_bytes).from_buffer(self.buffer, offset)


def whole_pages(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole pages."""
    return -(-num_bytes // _PAGE) * _PAGE


def available_bytes() -> int | None:
    """Memory that this process may still use: the machine's, or less where its cgroup says so; None where unknown."""
    known = [number for number in (_machine_available(), _cgroup_available()) if number is not None]
    return min(known, default=None)


def private_bytes() -> int:
    """Memory of this process that it does not share (0 where the system does not say)."""
    try:
        resident, shared = Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * _PAGE


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("reelscale-batches", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _machine_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the process's cgroups (version 2) leave of their limits; file pages that can be dropped count as free."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    left: list[int] = []
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            break
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            used = int((group / "memory.current").read_text(encoding="ascii"))
            counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            left.append(max(int(limit) - used + int(counts.get("inactive_file", 0)), 0))
    return min(left, default=None)
