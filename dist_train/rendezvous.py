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

import torch
import torch.distributed as dist

from dist_train.placement import Placement
from dist_train.world import World

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(minutes=10)


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


@contextmanager
def process_group(world: World, placement: Placement) -> Iterator[None]:
    """The default process group inside this block: NCCL for CUDA tensors, Gloo for the host's.

    Raises:
        RuntimeError: the ranks did not find each other in time.
    """
    if world.world_size == 1:
        yield
        return
    if placement.on_one_node:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The prefix keeps a job that happens on another job's port from meddling with its keys.
    store = dist.PrefixStore(placement.job_key or "reelscale", _store(placement))
    dist.init_process_group(
        _backend(world, store), store=store, rank=world.rank, world_size=world.world_size, timeout=TIMEOUT
    )
    dist.barrier()
    if world.is_first:
        _port_file(placement).unlink(missing_ok=True)
    yield
    dist.destroy_process_group()  # not after an error: peers may be gone, and the process ends anyway


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


def _backend(world: World, store: dist.Store) -> str:
    """Gloo for the host's tensors; for CUDA's NCCL, or Gloo where processes of one node share a GPU (NCCL refuses)."""
    if world.device.type != "cuda":
        return "gloo"
    gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(world.device).uuid}"
    store.set(f"gpu/{world.rank}", gpu)
    gpus = store.multi_get([f"gpu/{rank}" for rank in range(world.world_size)])
    if len(set(gpus)) == len(gpus):
        return "cpu:gloo,cuda:nccl"
    if world.num_nodes > 1:
        raise ValueError("processes share a GPU on some node: start at most one process a GPU")
    return "gloo"


def _store(placement: Placement) -> dist.Store:
    address, port = placement.master_address, placement.master_port
    if address is None and not placement.on_one_node:
        address, port = _address_by_mpi(placement)
    if address is not None and port is not None:
        return dist.TCPStore(
            address, port, placement.world_size, placement.rank == 0, timeout=TIMEOUT, wait_for_workers=False
        )
    return _store_on_one_node(placement)


def _store_on_one_node(placement: Placement) -> dist.Store:
    """Rank 0 takes a free port and tells it to its neighbours in a file that only this job knows."""
    path = _port_file(placement)
    if placement.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, placement.world_size, True, timeout=TIMEOUT, wait_for_workers=False)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(f"{store.port} {os.getpid()}")
        aside.replace(path)
        return store
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        try:
            port, pid = (int(word) for word in path.read_text().split())
            os.kill(pid, 0)
            store = dist.TCPStore("127.0.0.1", port, placement.world_size, False, timeout=datetime.timedelta(seconds=5))
            store.set_timeout(TIMEOUT)
            return store
        except (OSError, ValueError, dist.DistNetworkError):  # not there yet, or left behind by a job that was killed
            time.sleep(0.02)
    raise RuntimeError(f"rank {placement.rank}: rank 0 did not announce itself in {path} in {TIMEOUT}")


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
