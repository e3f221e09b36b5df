"""How PyTorch finds rank, world size and a store under mpirun: from MPI itself."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dist_train.mpi_backend.library import MPI
from dist_train.placement import fill_environment, find_placement

logger = logging.getLogger(__name__)

SCHEME = "mpi4py"


def offer_rendezvous() -> None:
    """Registers `mpi4py://`, and sets what `env://` misses. Called by every rank of MPI's world, at import."""
    dist.register_rendezvous_handler(SCHEME, _rendezvous)
    world = MPI.COMM_WORLD
    placement = find_placement(os.environ)
    if placement.world_size != world.Get_size() and placement.launcher != "single":
        if placement.launcher != "torchrun":
            logger.warning(
                "%s started %d processes and MPI sees %d: use the mpirun of this MPI, or srun --mpi=pmix or pmi2",
                placement.launcher,
                placement.world_size,
                world.Get_size(),
            )
        return
    fill_environment(os.environ, rank=world.Get_rank(), world_size=world.Get_size(), master=_free_address())


def _rendezvous(url: str, timeout: timedelta = dist.default_pg_timeout, **_: Any) -> Iterator[Any]:  # noqa: ARG001
    """`init_method="mpi4py://"`: rank 0 opens a store on a port of the kernel's choice and MPI tells the others."""
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    host, port, store = _host(), 0, None
    if rank == 0:
        store = dist.TCPStore(host, 0, size, True, timeout=timeout, wait_for_workers=False)
        port = store.port
    host, port = world.bcast((host, port), root=0)
    if store is None:
        store = dist.TCPStore(host, port, size, False, timeout=timeout, wait_for_workers=False)
    yield store, rank, size
    raise RuntimeError("mpi4py:// cannot meet again: MPI's world does not change")


def _free_address() -> tuple[str, int]:
    """Rank 0's host and a port that is free there now."""
    mine, host = None, _host()
    if MPI.COMM_WORLD.Get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            mine = (host, probe.getsockname()[1])
    return MPI.COMM_WORLD.bcast(mine, root=0)


def _host() -> str:
    """This host's address as the others of the job reach it. Called by every rank."""
    neighbours = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    on_one_node = neighbours.Get_size() == MPI.COMM_WORLD.Get_size()
    neighbours.Free()
    if on_one_node:
        return "127.0.0.1"
    name = socket.gethostname()
    address = socket.gethostbyname(name)
    return name if address.startswith("127.") else address  # Debian gives a host's own name a loopback address
