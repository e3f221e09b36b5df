"""The start of a job: every rank says that it is there, and those that never do are named."""

from __future__ import annotations

import os
import resource
import socket
from datetime import timedelta

import torch.distributed as dist

from dist_train.activity import spell_ranks
from dist_train.diagnosis import CollectiveTimeout, PeerLost

_HOSTS = 8
"""So many hosts are named."""


def wait_for_all(store: dist.Store, *, rank: int, world_size: int, timeout_seconds: float) -> None:
    """Returns once every rank has called it.

    Each rank waits for one key, which the last to come sets: the cost is linear in the world size.

    Raises:
        CollectiveTimeout: not all came in time; the same words on every rank that did.
        PeerLost: rank 0, which keeps the store, went away.
    """
    try:
        store.set(f"arrived/{rank}", f"{socket.gethostname()} {os.getpid()}")
        if store.add("arrivals", 1) == world_size:
            store.set("all arrived", "")
        try:
            store.wait(["all arrived"], timedelta(seconds=timeout_seconds))
        except dist.DistNetworkError:
            raise
        except RuntimeError:
            _raise_missing(store, world_size, timeout_seconds)
    except dist.DistNetworkError as error:
        raise PeerLost(
            f"rank {rank}: rank 0 went away while the ranks were starting", on_every_rank=rank != 1
        ) from error


def allow_connections(world_size: int) -> None:
    """Lets this process, rank 0, keep the store's connections (three a rank) and those of its collectives."""
    wanted = 4 * world_size + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _raise_missing(store: dist.Store, world_size: int, timeout_seconds: float) -> None:
    keys = {r: f"arrived/{r}" for r in range(world_size)}
    here = [r for r, key in keys.items() if store.check([key])]
    if len(here) == world_size:  # the last one came just now
        return
    hosts = list(dict.fromkeys(store.get(keys[r]).decode().split()[0] for r in here))
    more = f" and {len(hosts) - _HOSTS} more" if len(hosts) > _HOSTS else ""
    missing = [r for r in keys if r not in here]
    raise CollectiveTimeout(
        f"{spell_ranks(missing)} of {world_size} did not start within {timeout_seconds:g} s; the others came from "
        f"{', '.join(hosts[:_HOSTS])}{more}: look at the output of the missing ranks and at the nodes not named"
    )
