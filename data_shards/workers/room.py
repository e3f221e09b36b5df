"""What the machine has room for: processors and memory for a loader's workers."""

from __future__ import annotations

import os
from typing import Literal

from data_shards.workers.memory import available_bytes
from data_shards.workers.tuning import MAX_PREFETCH, Size

_MEMORY_SHARE = 0.5  # of what is free, for the slabs that `auto` may come to use


def most_size(
    num_workers: int | Literal["auto"],
    prefetch: int | Literal["auto"],
    *,
    slab_bytes: int,
    spare_slabs: int,
    local_world_size: int,
) -> Size:
    """Workers and batches ahead that a loader may have at most: with `auto` what there is room for."""
    workers = own_cores(local_world_size) if num_workers == "auto" else num_workers
    if prefetch != "auto":
        return Size(workers, prefetch)
    free = available_bytes()
    if free is None or workers == 0:
        return Size(workers, MAX_PREFETCH)
    room = int(free * _MEMORY_SHARE) // local_world_size // slab_bytes - spare_slabs
    return Size(workers, max(1, min(room // workers, MAX_PREFETCH)))


def own_cores(local_world_size: int) -> int:
    """This rank's part of the machine's processors: those that it is bound to, else an equal share of all."""
    all_cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
    return bound if bound < all_cores else max(all_cores // local_world_size, 1)


def check_memory(needed: int) -> None:
    """Raises RuntimeError where the machine lacks `needed` bytes: a worker would be ended in the middle of a write."""
    free = available_bytes()
    if free is not None and needed > free:
        raise RuntimeError(
            f"this machine has {free / 2**20:.0f} MiB of memory free, the batches of this loader's workers need "
            f"{needed / 2**20:.0f} MiB: lower num_workers, prefetch_batches or the batch"
        )
