"""What the operating system counts for this process and this host, to hold against what the ledger says.

- of the main thread: seconds that it was ready to run but had no core (`/proc/thread-self/schedstat`, field 2);
- of the process: CPU seconds, involuntary context switches, seconds in Python's garbage collector;
- of the host: bytes and packets of the network interface that the process group uses, and of InfiniBand ports.

Linux only; elsewhere these are zero or absent.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import socket
import struct
import time
from pathlib import Path
from typing import Any

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of netdevice(7)


class HostCounters:
    """Differences of counters from one `since_last` to the next. Make it on the main thread.

    Args:
        interface: name of the interface to count, or None to leave it to another rank of this host.
    """

    def __init__(self, *, interface: str | None) -> None:
        self._schedstat = Path(f"/proc/self/task/{os.getpid()}/schedstat")
        self._interface = interface
        self._collecting_since = 0.0
        self._collected = 0.0
        gc.callbacks.append(self._on_collection)
        self._last = self._read()

    def since_last(self) -> dict[str, Any]:
        """`run_queue`, `cpu`, `gc` in seconds, `switches`; `interface` and `infiniband` with what they moved."""
        now, before = self._read(), self._last
        self._last = now
        changes: dict[str, Any] = {}
        for name, value in now.items():
            if isinstance(value, dict):
                changes[name] = {key: count - before.get(name, {}).get(key, 0) for key, count in value.items()}
            else:
                changes[name] = round(value - before[name], 6)
        if self._interface in changes:
            changes["interface"] = {"name": self._interface, **changes.pop(self._interface)}
        return changes

    def close(self) -> None:
        """Stops to time the garbage collector."""
        if self._on_collection in gc.callbacks:
            gc.callbacks.remove(self._on_collection)

    def _read(self) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        found: dict[str, Any] = {
            "run_queue": _run_queue_seconds(self._schedstat),
            "cpu": usage.ru_utime + usage.ru_stime,
            "switches": usage.ru_nivcsw,
            "gc": self._collected,
        }
        if self._interface is not None:
            moved = interface_counters().get(self._interface)
            if moved is not None:
                found[self._interface] = moved
            ports = infiniband_counters()
            if ports["tx_bytes"] or ports["rx_bytes"]:
                found["infiniband"] = ports
        return found

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collecting_since = time.perf_counter()
        else:
            self._collected += time.perf_counter() - self._collecting_since


def _run_queue_seconds(schedstat: Path) -> float:
    try:
        return int(schedstat.read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def interface_counters() -> dict[str, dict[str, int]]:
    """Bytes (link headers included) and packets of each interface of this process's network namespace."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, numbers = line.partition(":")
        fields = [int(number) for number in numbers.split()]
        found[name.strip()] = {
            "tx_bytes": fields[8],
            "rx_bytes": fields[0],
            "tx_packets": fields[9],
            "rx_packets": fields[1],
        }
    return found


def infiniband_counters(root: Path = Path("/sys/class/infiniband")) -> dict[str, int]:
    """Bytes of all InfiniBand ports that count them; the kernel does so in words of four bytes."""
    sums = {}
    for direction, counter in (("tx_bytes", "port_xmit_data"), ("rx_bytes", "port_rcv_data")):
        files = root.glob(f"*/ports/*/counters/{counter}")
        sums[direction] = 4 * sum(_read_count(file) for file in files)
    return sums


def _read_count(file: Path) -> int:
    """Of a port; 0 where it has no counter behind its file (virtual functions: EINVAL, or "N/A (no PMA)")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return 0


def group_interface() -> str | None:
    """The interface that Gloo and NCCL use: the one their variables name, else the one with the host's address."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").split(",")[0]
        if wanted and not wanted.startswith("^"):  # which says what NCCL is not to use
            names = [name for _, name in socket.if_nameindex() if name.startswith(wanted.lstrip("="))]
            return min(names, key=len, default=None)  # the exact name, where "eth1" is also how "eth10" begins
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address(name) == address), None)


def _address(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
