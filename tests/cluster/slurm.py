"""A real SLURM on this machine: slurmctld and a slurmd a node, each node with its own host name, hosts file and
processes.

    with SlurmCluster(folder, num_nodes=2) as cluster:
        cluster.srun("-N2", "--ntasks-per-node=1", "hostname")

Needs root (mount, UTS and PID namespaces) and Debian's slurmctld, slurmd and slurm-client; nothing of it is installed
as a service and nothing stays behind. Nodes share the loopback network.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAMS = ("slurmctld", "slurmd", "srun", "sinfo", "unshare")

_CONFIGURATION = """\
ClusterName=reelscale
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MessageTimeout=10
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
{nodes}
PartitionName=train Nodes=n[1-{num_nodes}] Default=YES MaxTime=60 State=UP OverSubscribe=YES
"""


def missing() -> str | None:
    """Why no SLURM can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (`make cluster-packages`)"
    return None if os.geteuid() == 0 else "nodes of their own need root"


class SlurmCluster:
    """Starts on entering, kills every process on leaving."""

    def __init__(self, folder: Path, *, num_nodes: int) -> None:
        self.root, self.num_nodes = folder, num_nodes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._configuration = folder / "slurm.conf"

    def __enter__(self) -> Self:
        ports = _free_ports(self.num_nodes + 1)
        for name in ("state", "spool", "run", "log"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        numbers = range(1, self.num_nodes + 1)
        nodes = "\n".join(
            f"NodeName=n{n} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=4 RealMemory=2000 State=UNKNOWN" for n in numbers
        )
        self._configuration.write_text(
            _CONFIGURATION.format(root=self.root, ports=ports, nodes=nodes, num_nodes=self.num_nodes)
        )
        hosts = self.root / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"127.0.0.1 n{n}\n" for n in numbers))
        self._start("slurmctld", "-D")
        for n in numbers:
            node = f'mount --bind {hosts} /etc/hosts && hostname n{n} && exec "$@"'
            unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
            self._start(*unshare, "sh", "-c", node, "sh", "slurmd", "-D", "-N", f"n{n}")
        deadline = time.monotonic() + 30
        while self._run("sinfo", "-h", "-o", "%D %t").stdout.split() != [str(self.num_nodes), "idle"]:
            if time.monotonic() > deadline:
                said = self._run("sinfo").stdout + (self.root / "log" / "slurmctld.log").read_text()
                self._stop()
                raise RuntimeError(f"SLURM did not come up:\n{said}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def srun(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`srun ARGUMENTS` to its end."""
        return self._run("srun", *arguments, timeout=timeout)

    def _run(self, *command: str, timeout: float = 10) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, env=self._environment(), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:  # clients block while the controller is not up
            return subprocess.CompletedProcess(command, 124, "", "timed out")

    def _start(self, *command: str) -> None:
        log = self.root / "log" / f"daemon_{len(self._processes)}.log"
        with log.open("wb") as output:
            self._processes.append(
                subprocess.Popen(command, env=self._environment(), stdout=output, stderr=output, start_new_session=True)
            )

    def _stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGKILL)
            process.wait()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self._configuration), "PYTHONUNBUFFERED": "1"}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()
