"""From a placement to a process group: how the ranks of a job find each other."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from dist_train.arrival import allow_connections, wait_for_all
from dist_train.diagnosis import CollectiveTimeout
from dist_train.placement import Placement
from dist_train.watchdog import backstop_seconds
from dist_train.world import World

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = START_SECONDS = 600.0

Transport = Literal["auto", "gloo", "nccl", "mpi"]
"""What carries the collectives: `auto` is NCCL for CUDA tensors and Gloo for the host's; the others carry all."""


def make_world(placement: Placement, device: str = "auto") -> World:
    """The world of this process, with its device chosen.

    Args:
        placement: where the process stands.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: CUDA was asked for and is not there, or there are more processes than GPUs on this node.
    """
    return World(
        rank=placement.rank,
        world_size=placement.world_size,
        local_rank=placement.local_rank,
        local_world_size=placement.local_world_size,
        node_rank=placement.node_rank,
        num_nodes=placement.num_nodes,
        launcher=placement.launcher,
        device=_choose_device(placement, device),
    )


def check_transport(transport: Transport, placement: Placement, *, world_size: int) -> None:
    """ValueError where `transport` cannot carry the collectives of processes started like this one."""
    if transport == "mpi" and world_size > 1 and placement.launcher not in ("openmpi", "mpich", "slurm"):
        started = "--nproc" if placement.launcher in ("single", "local") else placement.launcher
        raise ValueError(
            f"--transport mpi: processes started by {started} are no MPI program: start them with "
            f"mpirun -n {world_size}, or leave --transport out"
        )


@contextmanager
def process_group(
    world: World,
    placement: Placement,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    start_seconds: float = START_SECONDS,
    transport: Transport = "auto",
) -> Iterator[str]:
    """The default process group inside this block, which is given PyTorch's name of the backend.

    A world of one process has no group, and "none".

    Args:
        timeout_seconds: of a `Watchdog` that will guard the collectives; the process group's own is a little longer.
        start_seconds: how long ranks wait for each other to start.
        transport: what carries the collectives.

    Raises:
        ValueError: the transport is not to be had here.
        CollectiveTimeout: the ranks did not find each other in time; it names who did not come.
    """
    check_transport(transport, placement, world_size=world.world_size)
    if world.world_size == 1:
        yield "none"
        return
    if transport == "mpi":
        _load_mpi(placement)
    if placement.on_one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if world.is_first:
        allow_connections(world.world_size)
    # The prefix keeps a job that happens on another job's port from meddling with its keys.
    store = dist.PrefixStore(placement.job_key or "reelscale", _store(placement, start_seconds))
    wait_for_all(store, rank=world.rank, world_size=world.world_size, timeout_seconds=start_seconds)
    backend = choose_backend(world, store, transport)
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=datetime.timedelta(seconds=backstop_seconds(timeout_seconds)),
    )
    dist.barrier()
    if world.is_first:
        _port_file(placement).unlink(missing_ok=True)
    try:
        yield backend
    except BaseException:  # peers may be gone, and the process ends anyway: MPI must not wait for them
        if transport == "mpi" and dist.group.WORLD is not None:
            dist.group.WORLD.abort()
        raise
    dist.destroy_process_group()


def _choose_device(placement: Placement, wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: PyTorch sees no GPU on this machine; use --device cpu, or a CUDA build of torch"
        )
    count = torch.cuda.device_count()
    # One GPU in sight: SLURM has bound this task to it, or the processes of a laptop share it.
    index = placement.local_rank if count > 1 or placement.local_world_size == 1 else 0
    if index >= count:
        raise ValueError(
            f"{placement.local_world_size} processes on this node but {count} GPUs: start at most one process a GPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _load_mpi(placement: Placement) -> None:
    """Starts MPI and makes its backend known; ValueError where there is none, or it knows nothing of the others."""
    try:
        from dist_train.mpi_backend import MPI
    except ImportError as error:
        raise ValueError(f"--transport mpi: {error}") from None
    if MPI.COMM_WORLD.Get_size() != placement.world_size:
        library = MPI.Get_library_version().split(",")[0].splitlines()[0]
        raise ValueError(
            f"--transport mpi: {placement.launcher} started {placement.world_size} processes and MPI ({library}) sees "
            f"{MPI.COMM_WORLD.Get_size()}: use the mpirun of that MPI, or srun --mpi=pmix or pmi2, whichever it speaks"
        )


def choose_backend(world: World, store: dist.Store, transport: Transport = "auto") -> str:
    """PyTorch's name of what carries the collectives. Every rank calls it with the same store.

    `auto` is Gloo for the host's tensors, and for CUDA's NCCL, or Gloo where processes of one node share a GPU (which
    NCCL refuses).

    Raises:
        ValueError: the transport cannot carry the tensors of these devices.
    """
    if transport in ("mpi", "gloo"):
        return {"mpi": "mpi4py", "gloo": "gloo"}[transport]
    if world.device.type != "cuda":
        if transport == "nccl":
            raise ValueError("--transport nccl carries the tensors of GPUs and this run is on the CPU: leave it out")
        return "gloo"
    gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(world.device).uuid}"
    store.set(f"gpu/{world.rank}", gpu)
    gpus = store.multi_get([f"gpu/{rank}" for rank in range(world.world_size)])
    if len(set(gpus)) == len(gpus):
        return "cpu:gloo,cuda:nccl"
    if world.num_nodes > 1 or transport == "nccl":
        raise ValueError("processes share a GPU on some node: start at most one process a GPU")
    return "gloo"


def _store(placement: Placement, timeout_seconds: float) -> dist.Store:
    address, port = placement.master_address, placement.master_port
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if address is None and not placement.on_one_node:
        address, port = _address_by_mpi(placement)
    if address is not None and port is not None:
        opens = placement.rank == 0 and not placement.store_is_there
        try:
            return dist.TCPStore(address, port, placement.world_size, opens, timeout=timeout, wait_for_workers=False)
        except dist.DistError as error:
            if opens:
                raise
            keeper = f"{placement.launcher}'s store" if placement.store_is_there else "rank 0"
            raise CollectiveTimeout(
                f"rank {placement.rank} on {socket.gethostname()} did not find {keeper} at {address}:{port} within "
                f"{timeout_seconds:g} s: look whether it has started, and whether its port can be reached",
                on_every_rank=placement.local_rank > 1,  # rank 0 does not say it: one or two of each node do
            ) from error
    return _store_on_one_node(placement, timeout)


def _store_on_one_node(placement: Placement, timeout: datetime.timedelta) -> dist.Store:
    """Rank 0 takes a free port and tells it to its neighbours in a file that only this job knows."""
    path = _port_file(placement)
    if placement.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, placement.world_size, True, timeout=timeout, wait_for_workers=False)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(f"{store.port} {os.getpid()}")
        aside.replace(path)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        try:
            port, pid = (int(word) for word in path.read_text().split())
            os.kill(pid, 0)
            store = dist.TCPStore("127.0.0.1", port, placement.world_size, False, timeout=datetime.timedelta(seconds=5))
            store.set_timeout(timeout)
            return store
        except (OSError, ValueError, dist.DistNetworkError):  # not there yet, or left behind by a job that was killed
            time.sleep(0.02)
    raise CollectiveTimeout(
        f"rank {placement.rank}: rank 0 did not start within {timeout.total_seconds():g} s (it would have announced "
        f"itself in {path}): look at its own output",
        on_every_rank=placement.rank > 1,
    )


def _port_file(placement: Placement) -> Path:
    """Where rank 0 announces its port: in a folder that only this user may enter, under a name only this job knows."""
    folder = Path(tempfile.gettempdir()) / f"reelscale-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RuntimeError(f"{folder} is not a folder of this user alone: remove it, or set TMPDIR")
    key = placement.job_key or f"parent-{os.getppid()}-{_started(os.getppid())}"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.port"


def _address_by_mpi(placement: Placement) -> tuple[str, int]:
    """Several nodes under mpirun: MPI itself carries rank 0's address."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{placement.launcher} on {placement.num_nodes} nodes does not say where rank 0 is: install "
            f"reelscale[mpi] (mpi4py: {error}), or pass MASTER_ADDR and MASTER_PORT to every rank"
        ) from None
    mine = None
    if placement.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            mine = (socket.gethostbyname(socket.gethostname()), probe.getsockname()[1])
    return MPI.COMM_WORLD.bcast(mine, root=0)


def _started(pid: int) -> str:
    """When process `pid` started, in the kernel's ticks: tells it from an older one of the same number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return "unknown"
