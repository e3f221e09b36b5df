"""Hosts on this machine: network namespaces on one switch, each with its own address, host name, hosts file and link.

    with Hosts(4, rate="1gbit") as hosts:
        hosts[0].run(["ping", "-c1", "h2"])
        run_ranks_on_hosts(hosts, [sys.executable, "script.py"])    # one process a host, as torchrun would start it
        run_ranks(function, 4, enter=hosts.enter)                   # tests/ranks.py: forked ranks, one a host
        hosts[2].set_rate("100mbit")                                # while they run
        hosts[2].tx_bytes()                                         # what its interface has sent, headers included

Host `h1` has the address 10.77.0.1, `h2` 10.77.0.2 and so on, on the interface `eth0`. The machine's own network is not
touched: the switch is a bridge in a namespace of its own, and namespaces carry the maker's process id in their name.
Needs root and iproute2. On leaving, also after an error, every process inside is killed and everything is deleted; what
a killed maker left behind is deleted by the next one.

Bytes: TCP's headers cost 66 of every 1514 bytes on a shaped link (the queue cuts what TCP hands it into frames of
`mtu`), and next to nothing on one without a rate, where the counter sees TCP's segments of 64 KiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

INTERFACE = "eth0"
_INSTANCES = itertools.count()
_NAMESPACES = Path("/run/netns")
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_NEW_NET, _NEW_UTS, _NEW_MOUNTS = 0x40000000, 0x04000000, 0x00020000


def missing() -> str | None:
    """Why no hosts can be made here, or None."""
    absent = [name for name in ("ip", "tc", "nsenter", "unshare") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (`make cluster-packages`)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True, check=False
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def need_hosts() -> None:
    """Skips the test where no hosts can be made; fails it where `FAIL_ON_SKIP` is set."""
    if reason := missing():
        (pytest.fail if os.environ.get("FAIL_ON_SKIP") else pytest.skip)(reason)


class Host:
    """One host; made by `Hosts`."""

    def __init__(self, *, name: str, address: str, namespace: str, hosts_file: Path, switch: str, port: str) -> None:
        self.name, self.address, self.namespace = name, address, namespace
        self._hosts_file, self._switch, self._port = hosts_file, switch, port
        self._processes: list[subprocess.Popen[Any]] = []

    def command(self, arguments: Sequence[str | Path]) -> list[str]:
        """`arguments` as a command that anyone may start: it becomes a process of this host, under the same pid."""
        enter = ["nsenter", f"--net={_NAMESPACES / self.namespace}", "unshare", "--mount", "--uts"]
        return [*enter, "sh", "-c", f'{self._mounts()} && exec "$@"', "sh", *map(str, arguments)]

    def popen(
        self, arguments: Sequence[str | Path], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """`subprocess.Popen` on this host; `env` is added to this process's environment."""
        process = subprocess.Popen(
            self.command(arguments), env={**os.environ, **(env or {})}, start_new_session=True, **options
        )
        self._processes.append(process)
        return process

    def run(
        self, arguments: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs to the end and captures text; the exit status is the caller's to judge."""
        environment = {**os.environ, **(env or {})}
        return subprocess.run(
            self.command(arguments), env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def enter(self) -> None:
        """Moves the calling process onto this host, for good. For a forked rank: see `Hosts.enter`."""
        with (_NAMESPACES / self.namespace).open() as namespace:
            _system_call("setns", namespace.fileno(), _NEW_NET)
        _system_call("unshare", _NEW_UTS | _NEW_MOUNTS)
        subprocess.run(["sh", "-c", f"mount --make-rprivate / && {self._mounts()}"], check=True)

    def tx_bytes(self) -> int:
        """Bytes that the host's interface has sent since it came up, Ethernet's and all headers included."""
        return self._counters()["tx"]["bytes"]

    def rx_bytes(self) -> int:
        """Bytes that the host's interface has received since it came up."""
        return self._counters()["rx"]["bytes"]

    def set_rate(self, rate: str | None) -> None:
        """Shapes the host's link in both directions to `rate` ("100mbit", "1gbit"); None takes the limit away."""
        for namespace, device in ((self.namespace, INTERFACE), (self._switch, self._port)):
            where = ("tc", "-n", namespace, "qdisc")
            if rate is None:
                subprocess.run([*where, "del", "dev", device, "root"], capture_output=True, check=False)
            else:
                burst = max(32_000, round(bits_per_second(rate) / 8 * 1e-3))  # a millisecond: the kernel's own clock
                shape = ("tbf", "rate", rate, "burst", str(burst), "latency", "50ms")
                _do(*where, "replace", "dev", device, "root", *shape)

    def set_link(self, *, up: bool) -> None:
        """Pulls the host's cable out of the switch, or puts it back."""
        _do("ip", "-n", self._switch, "link", "set", self._port, "up" if up else "down")

    def kill_everything(self) -> None:
        """SIGKILL to every process of this host, however it came here."""
        for _ in range(50):
            found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
            pids = [int(pid) for pid in found.stdout.split()]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._processes:
                if process.poll() is None:  # perhaps not inside yet
                    process.kill()
                    process.wait()
            if not pids:
                return
            time.sleep(0.02)

    def _mounts(self) -> str:
        """In a mount and UTS namespace of one's own: the host's name, its hosts file, and a /sys with its interface."""
        aside = self._hosts_file.with_name("cgroup")  # a new /sys would hide the control groups, which SLURM wants
        return (
            f"hostname {self.name} && mount --bind {self._hosts_file} /etc/hosts"
            f" && mount --rbind /sys/fs/cgroup {aside} && mount -t sysfs sysfs /sys"
            f" && mount --rbind {aside} /sys/fs/cgroup"
        )

    def _counters(self) -> dict[str, Any]:
        shown = _do("ip", "-n", self.namespace, "-s", "-j", "link", "show", INTERFACE)
        return json.loads(shown)[0]["stats64"]


class Hosts:
    """Makes the hosts on entering; kills and deletes all of it on leaving.

    Args:
        num_hosts: how many, 1 to 250.
        rate: of each link in each direction, as `tc` writes it ("100mbit", "1gbit"); None: as fast as memory.
        mtu: bytes of IP in a frame; 9000 for the jumbo frames of a cluster's network.
    """

    def __init__(self, num_hosts: int, rate: str | None = None, *, mtu: int = 1500) -> None:
        if not 1 <= num_hosts <= 250:
            raise ValueError(f"num_hosts is {num_hosts}: use 1 to 250")
        if rate is not None:
            bits_per_second(rate)
        self.num_hosts, self.rate, self.mtu = num_hosts, rate, mtu
        self._prefix = f"reelscale-{os.getpid()}-{next(_INSTANCES)}"
        self._switch = f"{self._prefix}-switch"
        self._hosts: list[Host] = []
        self._runs = itertools.count()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        _delete_what_dead_makers_left()
        self._folder = tempfile.TemporaryDirectory(prefix="hosts-")
        try:
            self._make()
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._delete()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    @property
    def remote_shell(self) -> Path:
        """A program `remote_shell [-options] HOST COMMAND...` in ssh's place, for mpirun's launch agents."""
        assert self._folder is not None
        return Path(self._folder.name) / "remote_shell"

    def enter(self, rank: int, *, ranks_per_host: int = 1) -> None:
        """Moves a freshly forked rank onto its host and tells Gloo the interface (`run_ranks(..., enter=...)`)."""
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        self._hosts[rank // ranks_per_host].enter()

    def rank_environment(self, rank: int, *, ranks_per_host: int = 1, port: int = 29500) -> dict[str, str]:
        """What torchrun would set for `rank`; ranks are numbered host by host."""
        values = {
            "RANK": rank,
            "WORLD_SIZE": self.num_hosts * ranks_per_host,
            "LOCAL_RANK": rank % ranks_per_host,
            "LOCAL_WORLD_SIZE": ranks_per_host,
            "GROUP_RANK": rank // ranks_per_host,
            "GROUP_WORLD_SIZE": self.num_hosts,
            "MASTER_ADDR": self._hosts[0].name,
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": 1,
        }
        return {name: str(value) for name, value in values.items()}

    def free_port(self) -> int:
        """A port that no run on these hosts has had yet; no process of any other host can take it."""
        return 20000 + next(self._runs)

    def _make(self) -> None:
        assert self._folder is not None
        numbers = range(1, self.num_hosts + 1)
        (Path(self._folder.name) / "cgroup").mkdir()
        hosts_file = Path(self._folder.name) / "hosts"
        hosts_file.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{n} h{n}\n" for n in numbers))
        _do("ip", "netns", "add", self._switch)
        _do("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _do("ip", "-n", self._switch, "link", "set", "switch", "mtu", str(self.mtu), "up")
        for n in numbers:
            namespace, port = f"{self._prefix}-h{n}", f"port{n}"
            _do("ip", "netns", "add", namespace)
            peer = ("type", "veth", "peer", "name", port, "netns", self._switch)
            _do("ip", "-n", namespace, "link", "add", INTERFACE, *peer)
            _do("ip", "-n", namespace, "addr", "add", f"10.77.0.{n}/24", "dev", INTERFACE)
            _do("ip", "-n", namespace, "link", "set", "lo", "up")
            _do("ip", "-n", namespace, "link", "set", INTERFACE, "mtu", str(self.mtu), "up")
            _do("ip", "-n", self._switch, "link", "set", port, "mtu", str(self.mtu), "master", "switch", "up")
            host = Host(
                name=f"h{n}",
                address=f"10.77.0.{n}",
                namespace=namespace,
                hosts_file=hosts_file,
                switch=self._switch,
                port=port,
            )
            host.set_rate(self.rate)
            self._hosts.append(host)
        cases = "".join(f'{host.name}) exec {" ".join(map(_quoted, host.command([])))} sh -c "$*";;\n' for host in self)
        self.remote_shell.write_text(
            f'#!/bin/sh\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\nname=$1\nshift\ncase $name in\n{cases}esac\n'
            'echo "no host $name" >&2\nexit 255\n'
        )
        self.remote_shell.chmod(0o755)

    def _delete(self) -> None:
        for host in self._hosts:
            host.kill_everything()
        _delete_namespaces(self._prefix)
        self._hosts.clear()
        if self._folder is not None:
            self._folder.cleanup()


def run_ranks_on_hosts(
    hosts: Hosts,
    command: Sequence[str | Path],
    *,
    ranks_per_host: int = 1,
    env: Mapping[str, str] | None = None,
    env_of: Callable[[int], Mapping[str, str]] = lambda rank: {},
    timeout: float = 120,
) -> list[subprocess.CompletedProcess[str]]:
    """Runs `command` as ranks, numbered host by host, as torchrun would; returns what became of them in rank order.

    `env` is added to every rank's environment, `env_of(rank)` to one's. Ranks alive after `timeout` seconds are killed
    (returncode -9).
    """
    port = hosts.free_port()
    with tempfile.TemporaryDirectory() as name:
        processes = []
        for rank in range(len(hosts) * ranks_per_host):
            environment = hosts.rank_environment(rank, ranks_per_host=ranks_per_host, port=port)
            environment |= {**(env or {}), **env_of(rank)}
            with (Path(name) / f"{rank}.out").open("w") as out, (Path(name) / f"{rank}.err").open("w") as err:
                process = hosts[rank // ranks_per_host].popen(command, env=environment, stdout=out, stderr=err)
                processes.append(process)
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0))
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return [
            subprocess.CompletedProcess(
                list(map(str, command)),
                process.returncode,
                (Path(name) / f"{rank}.out").read_text(),
                (Path(name) / f"{rank}.err").read_text(),
            )
            for rank, process in enumerate(processes)
        ]


def bits_per_second(rate: str) -> float:
    """`tc`'s "100mbit" as 1e8."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not match or not float(match[1]):
        raise ValueError(f"rate is {rate!r}: use a number with kbit, mbit or gbit, as in '1gbit'")
    return float(match[1]) * _UNITS[match[2]]


def _delete_what_dead_makers_left() -> None:
    for path in _NAMESPACES.glob("reelscale-*"):
        maker = path.name.split("-")[1]
        if not Path(f"/proc/{maker}").exists():
            _delete_namespaces(f"reelscale-{maker}")


def _delete_namespaces(prefix: str) -> None:
    for path in _NAMESPACES.glob(f"{prefix}-*"):
        subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _system_call(name: str, *arguments: int) -> None:
    """A call that Python 3.11's `os` does not have yet."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
