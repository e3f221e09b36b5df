"""From a process that knows nothing to one that is connected: what `init` does, step by step."""

from __future__ import annotations

import os
import resource
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from dist_train.horovod.elastic import rendezvous
from dist_train.horovod.engine.coordinator import TOKEN_BYTES, Coordinator
from dist_train.horovod.engine.messages import Channel
from dist_train.horovod.settings import Settings
from dist_train.placement import find_placement
from dist_train.rendezvous import make_world, process_group


class Groups:
    """The process groups that exchanges run on, apart from the program's own, whose calls come from other threads.

    A group lives as long as the default process group: making one is dear, and Horovod's programs remove and add the
    same process sets again.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        """Of a Horovod world that consists of these ranks of the default process group, in this order."""
        self._ranks = tuple(ranks)
        config = str(dist.get_backend_config(dist.group.WORLD))
        self._backend = f"cpu:gloo,{config}" if "cpu" not in config and "nccl" in config else config
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, members: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these ranks of the Horovod world, all of whose ranks call this together where it is new."""
        if members not in self._groups:
            ranks = [self._ranks[member] for member in members]
            if len(self._ranks) == default_group().size():
                group = dist.new_group(ranks, backend=self._backend)
            else:
                # The other ranks of the job do not take part, so PyTorch derives the group's name from its ranks and
                # from the number of this process's groups. That number stays alike if all make one at the same time.
                me = default_group().rank()
                group = dist.new_group(
                    ranks if me in ranks else [me],
                    backend=self._backend,
                    use_local_synchronization=True,
                    sort_ranks=False,
                )
            self._groups[members] = group
        return self._groups[members]


def join_default_group(stack: ExitStack) -> bool:
    """Makes the default process group where the program has not; `stack` ends it. Returns whether it did."""
    if dist.is_initialized():
        return False
    if rendezvous.is_elastic():
        rendezvous.join_world(stack)
        return True
    placement = find_placement(os.environ)
    stack.enter_context(process_group(make_world(placement), placement))
    if not dist.is_initialized():  # alone
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
    return True


def default_group() -> dist.ProcessGroup:
    """The default process group, which is there."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def chosen_ranks(comm: Any) -> list[int]:
    """The ranks of the default group that `init(comm)` makes the Horovod world of.

    Raises:
        ValueError: `comm` is neither a list of ranks nor an MPI communicator, or leaves this process out.
    """
    size, rank = default_group().size(), default_group().rank()
    ranks = list(range(size)) if comm is None else listed_ranks(comm)
    if not ranks:
        ranks = list(range(size))
    if sorted(set(ranks) & set(range(size))) != sorted(ranks):
        raise ValueError(f"hvd.init(comm={ranks}): the job has the ranks 0 to {size - 1}, name each at most once")
    if rank not in ranks:
        raise ValueError(f"hvd.init(comm={ranks}) on rank {rank}: only the ranks in comm may call it")
    return ranks


def find_nodes(group: dist.ProcessGroup) -> tuple[list[str], list[int]]:
    """For each rank, a name that it shares with the ranks on its node, and its number among them."""
    placement = find_placement(os.environ)
    up_to_date = not rendezvous.is_elastic() and placement.world_size == group.size()
    launched = up_to_date and placement.launcher != "single"
    mine = (f"node {placement.node_rank}", placement.local_rank) if launched else (socket.gethostname(), None)
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    nodes = [node for node, _ in told]
    if launched:
        return nodes, [local_rank for _, local_rank in told]
    seen: Counter[str] = Counter()
    local_ranks = []
    for node in nodes:
        local_ranks.append(seen[node])
        seen[node] += 1
    return nodes, local_ranks


def connect(group: dist.ProcessGroup, nodes: Sequence[str], settings: Settings) -> tuple[Channel, Coordinator | None]:
    """Starts the coordinator on the first rank and connects every rank to it.

    Raises:
        RuntimeError: not all ranks were connected in time.
    """
    coordinator = None
    told: list[Any] = [None]
    if group.rank() == 0:
        local = len(set(nodes)) == 1
        _allow_open_files(group.size() + 256)
        listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=min(group.size(), 4096))
        token = secrets.token_bytes(TOKEN_BYTES)
        coordinator = Coordinator(listener, token, group.size(), settings)
        coordinator.start()
        told = [(["127.0.0.1"] if local else _addresses(), listener.getsockname()[1], token)]
    dist.broadcast_object_list(told, group_src=0, group=group)
    hosts, port, token = told[0]
    connection = _reach(["127.0.0.1"] if group.rank() == 0 else hosts, port, settings.connect_seconds)
    connection.sendall(token + struct.pack("!I", group.rank()))
    channel = Channel(connection)
    _await_welcome(channel, settings.connect_seconds)
    return channel, coordinator


def _allow_open_files(number: int) -> None:
    """The coordinator holds a socket for each rank; the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and number > hard:
        raise ValueError(f"rank 0 needs {number} open files and may have {hard}: raise the hard limit (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and number > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _await_welcome(channel: Channel, seconds: float) -> None:
    """Blocks until all ranks are connected, so that what happens to one from now on is told to all."""
    channel.socket.settimeout(seconds)
    messages: list[Any] = []
    try:
        while not messages:
            messages = list(channel.receive())
        lost = [content[0] for word, *content in messages if word == "abort"]
    except EOFError:
        lost = [f"not all ranks came in {seconds:g} s (HOROVOD_GLOO_TIMEOUT_SECONDS), or rank 0 is gone"]
    if lost:
        raise RuntimeError(f"Horovod could not be initialized: {lost[0]}")
    channel.socket.settimeout(None)


def listed_ranks(comm: Any) -> list[int]:
    """The ranks in a list, or those of an mpi4py communicator in MPI.COMM_WORLD.

    Raises:
        ValueError: neither of these.
    """
    if not hasattr(comm, "Get_group"):
        try:
            return [int(rank) for rank in comm]
        except (TypeError, ValueError):
            raise ValueError(
                f"Invalid type of argument comm: {comm!r}. Expected list of rank integers or mpi4py.MPI.Comm object."
            ) from None
    from mpi4py import MPI

    group = comm.Get_group()
    return [int(rank) for rank in MPI.Group.Translate_ranks(group, range(group.Get_size()), MPI.COMM_WORLD.Get_group())]


def _addresses() -> list[str]:
    """Under which this host may be reached by others, the most likely first."""
    address = find_placement(os.environ).master_address
    found = [address] if address and default_group().rank() == 0 else []
    try:
        found.append(socket.gethostbyname(socket.gethostname()))
    except OSError:
        found.append(socket.gethostname())
    return found


def _reach(hosts: Sequence[str], port: int, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    reason: OSError | None = None
    while time.monotonic() < deadline:
        for host in hosts:
            try:
                connection = socket.create_connection((host, port), timeout=5)
            except OSError as error:
                reason = error
            else:
                connection.settimeout(None)
                return connection
        time.sleep(0.1)
    raise RuntimeError(f"the coordinator on the first rank was not reached at {hosts} port {port}: {reason}")
