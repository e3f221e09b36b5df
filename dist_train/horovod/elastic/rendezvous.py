"""How the ranks of an elastic run find each other again, in the same processes, after some have died or joined.

Each process keeps a door open: a store of its own, so that no single process must survive. The processes of a world
know each other's doors. When it ends, the most senior one that is still alive leads: the others register in its store;
once every process that is alive has done so (and there are HOROVOD_ELASTIC_MIN_NP of them), the leader publishes the
new world, old members first in their old order, and the process group is formed over the leader's store.

A process started later joins if it finds the doors of the running job in the file HOROVOD_ELASTIC_FILE: it registers
with the leader, who is rank 0 and sees it at its next `State.check_host_updates`.

A process is alive when its port answers. One that is stuck is waited for until HOROVOD_ELASTIC_TIMEOUT (600 s).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dist_train.placement import Placement, find_placement
from dist_train.rendezvous import TIMEOUT_SECONDS, choose_backend, make_world

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
CONNECT_TIMEOUT = datetime.timedelta(seconds=5)


class NoWorldError(RuntimeError):
    """Not enough processes found each other in time."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A process of an elastic run."""

    key: str
    """Different for every process there ever was."""
    host: str
    """The name of its host, by which local ranks are counted."""
    address: str
    port: int
    """Where its door is."""


class _Door:
    """This process's own store, and who was in the last world."""

    def __init__(self, address: str) -> None:
        self.store = dist.TCPStore("0.0.0.0", 0, None, True, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
        self.me = Member(key=uuid.uuid4().hex, host=socket.gethostname(), address=address, port=self.store.port)
        self.members: list[Member] = []
        """Of the last world, the most senior first: rank order."""


_door: _Door | None = None


def open_door(on_one_node: bool, exchange: Callable[[Member], list[Member]]) -> None:
    """Makes every rank known to all others, for the time after a failure; nothing where that has been done.

    Args:
        on_one_node: whether all ranks are on this host.
        exchange: gathers what each rank calls it with, in rank order.
    """
    global _door
    if _door is None:
        master = find_placement(os.environ).master_address
        door = _Door(_address_towards(master or socket.gethostname(), on_one_node))
        door.members = exchange(door.me)
        _door = door
        _announce(door)


def close_door() -> None:
    """This process will not be a member of another world."""
    global _door
    _door = None


def is_elastic() -> bool:
    """True when the next world is to be formed here: by `join_world`."""
    return _door is not None or bool(_doors_on_file())


def join_world(stack: ExitStack) -> None:
    """Makes the default process group that of the next world that this process is a member of; `stack` ends it.

    Raises:
        NoWorldError: HOROVOD_ELASTIC_TIMEOUT seconds passed.
        RuntimeError: a rank died while the group formed.
    """
    global _door
    if _door is None:
        candidates = _doors_on_file()
        _door = _Door(_address_towards(candidates[0].address, all(m.address == LOOPBACK for m in candidates)))
        _door.members = candidates
    placement, store = _agree(_door)
    world = make_world(placement)
    if _door.me.address == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        choose_backend(world, store),
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )
    stack.callback(dist.destroy_process_group)


def _agree(door: _Door) -> tuple[Placement, dist.Store]:
    """The next world: this process's place in it, and the store to form its process group over."""
    deadline = time.monotonic() + float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", "600"))
    while time.monotonic() < deadline:
        leader = next((member for member in door.members if member == door.me or _is_alive(member)), door.me)
        agreed = _lead(door, deadline) if leader == door.me else _follow(door, leader, deadline)
        if agreed is not None:
            door.members, store = agreed
            _announce(door)
            return _placement(door), store
    raise NoWorldError(
        f"no world of at least {_min_np()} ranks (HOROVOD_ELASTIC_MIN_NP) formed in HOROVOD_ELASTIC_TIMEOUT seconds: "
        f"process {os.getpid()} on {door.me.host} gives up"
    )


def somebody_waits() -> bool:
    """On rank 0: whether a process has registered for the next world, and there is room for it."""
    if _door is None or len(_door.members) >= _max_np():
        return False
    members = _registered(_door.store, _open_round(_door.store))
    return any(member not in _door.members and _is_alive(member) for member in members)


def now() -> float:
    """The time by which updates are ordered."""
    return time.time()


def _lead(door: _Door, deadline: float) -> tuple[list[Member], dist.Store] | None:
    """Waits for the others and publishes the world. None: a more senior member is alive after all, or time is up."""
    index = _open_round(door.store)
    seniors = door.members[: door.members.index(door.me)] if door.me in door.members else []
    while time.monotonic() < deadline:
        if any(_is_alive(member) for member in seniors):
            return None
        arrived = [member for member in _registered(door.store, index) if member != door.me and _is_alive(member)]
        awaited = [m for m in door.members if m not in arrived and m != door.me and _is_alive(m)]
        old = [member for member in door.members if member in arrived or member == door.me]
        new = [member for member in arrived if member not in old]
        world = (old + new if door.me in old else [door.me, *old, *new])[: _max_np()]
        if not awaited and len(world) >= _min_np():
            door.store.set(f"{index}/world", json.dumps([dataclasses.asdict(member) for member in world]))
            door.store.add("round", 1)
            return world, dist.PrefixStore(f"{index}/group", door.store)
        time.sleep(POLL_SECONDS)
    return None


def _follow(door: _Door, leader: Member, deadline: float) -> tuple[list[Member], dist.Store] | None:
    """Registers with the leader and waits. None: it died, or published a world without this process."""
    try:
        store = dist.TCPStore(leader.address, leader.port, None, False, timeout=CONNECT_TIMEOUT)
        index = _open_round(store)
        store.set(f"{index}/member/{store.add(f'{index}/count', 1)}", json.dumps(dataclasses.asdict(door.me)))
        while time.monotonic() < deadline:
            is_over = _open_round(store) != index  # asked first: the world is published before the round ends
            if store.check([f"{index}/world"]):
                world = [Member(**member) for member in json.loads(store.get(f"{index}/world"))]
                return (world, dist.PrefixStore(f"{index}/group", store)) if door.me in world else None
            if is_over:
                return None
            time.sleep(POLL_SECONDS)
    except RuntimeError:  # the leader died
        time.sleep(POLL_SECONDS)
    return None


def _open_round(store: dist.Store) -> int:
    """The number of the world that a door's store is collecting members for."""
    return store.add("round", 0)


def _registered(store: dist.Store, index: int) -> list[Member]:
    keys = [f"{index}/member/{number + 1}" for number in range(store.add(f"{index}/count", 0))]
    members = [Member(**json.loads(store.get(key))) for key in keys if store.check([key])]
    return list(dict.fromkeys(members))


def _is_alive(member: Member) -> bool:
    """Whether the process's door answers; a host that does not answer is asked three times."""
    for _ in range(3):
        try:
            socket.create_connection((member.address, member.port), timeout=2).close()
            return True
        except ConnectionRefusedError:
            return False
        except OSError:
            continue
    return False


def _placement(door: _Door) -> Placement:
    """This process's place in the world of `door.members`."""
    hosts = list(dict.fromkeys(member.host for member in door.members))
    neighbours = [member for member in door.members if member.host == door.me.host]
    return Placement(
        launcher="elastic",
        rank=door.members.index(door.me),
        world_size=len(door.members),
        local_rank=neighbours.index(door.me),
        local_world_size=len(neighbours),
        node_rank=hosts.index(door.me.host),
        num_nodes=len(hosts),
    )


def _announce(door: _Door) -> None:
    """Rank 0 writes where the job's doors are, for processes started later."""
    path = os.environ.get("HOROVOD_ELASTIC_FILE")
    if path and door.members[0] == door.me:
        aside = Path(f"{path}.{os.getpid()}")
        aside.write_text(json.dumps([dataclasses.asdict(member) for member in door.members]))
        aside.replace(path)


def _doors_on_file() -> list[Member]:
    """The doors of the running job that answer; none where no job runs."""
    path = os.environ.get("HOROVOD_ELASTIC_FILE")
    try:
        members = [Member(**member) for member in json.loads(Path(path).read_text())] if path else []
    except FileNotFoundError:
        return []
    return [member for member in members if _is_alive(member)]


def _address_towards(host: str, on_one_node: bool) -> str:
    """The address by which others reach this host: that of the interface towards `host`, or else its name."""
    if on_one_node:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        address = str(probe.getsockname()[0])
    return socket.gethostname() if address.startswith("127.") else address


def _min_np() -> int:
    return int(os.environ.get("HOROVOD_ELASTIC_MIN_NP", "1"))


def _max_np() -> int:
    return int(os.environ.get("HOROVOD_ELASTIC_MAX_NP", str(1 << 30)))
