"""Where this process stands, from whatever started it. The only file that reads a rank from the environment.

Known: nothing (one process), `reelscale train --nproc N` (local), torchrun, SLURM's srun, Open MPI's mpirun, and the
Hydra launchers of MPICH and Intel MPI. Each is a pure function of an environment mapping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What an environment says about this process."""

    launcher: str = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    master_address: str | None = None
    """Host of rank 0, where the environment tells."""
    master_port: int | None = None
    """Port on that host, where the environment tells."""
    job_key: str | None = None
    """A string that all processes of this job share and no other job on the node does, where there is one."""
    store_is_there: bool = False
    """The launcher keeps a store at the master's address and port: rank 0 need not open one."""

    @property
    def on_one_node(self) -> bool:
        """True when all processes share this node."""
        return self.local_world_size == self.world_size


def find_placement(environ: Mapping[str, str]) -> Placement:
    """This process's place in the job.

    Raises:
        ValueError: a launcher's variables are there but incomplete or contradict each other.
    """
    try:
        for matches, read in (
            (environ.keys() >= {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}, _torchrun),
            ("OMPI_COMM_WORLD_RANK" in environ, _openmpi),
            ("PMI_RANK" in environ and "SLURM_PROCID" not in environ, _hydra),
            # Inside a step only: a batch script has SLURM_PROCID=0 and SLURM_NTASKS=n too, but is one process.
            ("SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ, _slurm),
            (environ.keys() >= {"RANK", "WORLD_SIZE"}, _by_hand),
        ):
            if matches:
                return read(environ)
    except KeyError as missing:
        raise ValueError(
            f"the launcher's environment has no {missing.args[0]}: start with torchrun, srun or mpirun"
        ) from None
    return Placement()


def fill_environment(environ: MutableMapping[str, str], *, rank: int, world_size: int, master: tuple[str, int]) -> None:
    """Sets those variables of PyTorch's `env://` rendezvous that are missing; what is set stays."""
    environ.setdefault("RANK", str(rank))
    environ.setdefault("WORLD_SIZE", str(world_size))
    environ.setdefault("MASTER_ADDR", master[0])
    environ.setdefault("MASTER_PORT", str(master[1]))


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[03-07,9],login1` gives `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodelist.strip())
    if not match:
        raise ValueError(f"SLURM's node list {nodelist!r} names no host")
    prefix, numbers, suffix = match.groups()
    first = re.split(r"[-,]", numbers)[0] if numbers else ""
    return f"{prefix}{first}{suffix}"


def _by_hand(environ: Mapping[str, str]) -> Placement:
    """PyTorch's `env://` variables alone: they tell on which node a process is only where all are on this one."""
    master = environ.get("MASTER_ADDR", "localhost")
    if int(environ["WORLD_SIZE"]) > 1 and master not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError(
            f"RANK and WORLD_SIZE are set and LOCAL_WORLD_SIZE is not, with MASTER_ADDR {master}: set LOCAL_RANK and "
            "LOCAL_WORLD_SIZE too (0 and 1 where each process has a node of its own), or start with torchrun"
        )
    return _torchrun(environ)


def _torchrun(environ: Mapping[str, str]) -> Placement:
    world_size = int(environ["WORLD_SIZE"])
    local_world_size = int(environ.get("LOCAL_WORLD_SIZE", world_size))
    rank = int(environ["RANK"])
    port = environ.get("MASTER_PORT")
    return Placement(
        launcher=environ.get("REELSCALE_LAUNCHER", "torchrun"),
        rank=rank,
        world_size=world_size,
        local_rank=int(environ.get("LOCAL_RANK", rank % local_world_size)),
        local_world_size=local_world_size,
        node_rank=int(environ.get("GROUP_RANK", rank // local_world_size)),
        num_nodes=int(environ.get("GROUP_WORLD_SIZE", max(world_size // local_world_size, 1))),
        master_address=environ.get("MASTER_ADDR"),
        master_port=int(port) if port else None,
        job_key=environ.get("REELSCALE_JOB_KEY") or _attempt(environ),
        store_is_there=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _attempt(environ: Mapping[str, str]) -> str | None:
    """torchrun's agent keeps one store for all attempts: what one of them leaves there is not the next one's."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"torchrun-{environ['TORCHELASTIC_RUN_ID']}.{restarts}.{environ['WORLD_SIZE']}"


def _slurm(environ: Mapping[str, str]) -> Placement:
    job, step = environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"]
    world_size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
    node_rank = int(environ["SLURM_NODEID"])
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_TASKS_PER_NODE"])
    port = environ.get("MASTER_PORT")
    return Placement(
        launcher="slurm",
        rank=int(environ["SLURM_PROCID"]),
        world_size=world_size,
        local_rank=int(environ["SLURM_LOCALID"]),
        local_world_size=counts[node_rank],
        node_rank=node_rank,
        num_nodes=len(counts),
        master_address=environ.get("MASTER_ADDR") or first_host(nodes),
        # The same port on every node without a word exchanged, below those that the kernel hands out by itself.
        master_port=int(port) if port else 20000 + (int(job) * 7 + int(step)) % 12768,
        job_key=f"slurm-{job}.{step}",
    )


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` as `[2, 2, 2, 1]`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"SLURM's tasks per node {text!r} are not understood")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _openmpi(environ: Mapping[str, str]) -> Placement:
    world_size, local_world_size = int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    rank = int(environ["OMPI_COMM_WORLD_RANK"])
    return _mpi(environ, "openmpi", rank, world_size, int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]), local_world_size)


def _hydra(environ: Mapping[str, str]) -> Placement:
    rank, world_size = int(environ["PMI_RANK"]), int(environ["PMI_SIZE"])
    local_rank = int(environ.get("MPI_LOCALRANKID", rank))
    local_world_size = int(environ.get("MPI_LOCALNRANKS", world_size))
    return _mpi(environ, "mpich", rank, world_size, local_rank, local_world_size)


def _mpi(
    environ: Mapping[str, str], launcher: str, rank: int, world_size: int, local_rank: int, local_world_size: int
) -> Placement:
    """MPI's launchers number ranks node by node by default, which gives the node's number."""
    port = environ.get("MASTER_PORT")
    namespace = environ.get("PMIX_NAMESPACE")
    return Placement(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        # Not from the local rank: Open MPI 5 numbers the ranks of one node 0, 2, 1 where they share cores.
        node_rank=rank // local_world_size,
        num_nodes=-(-world_size // local_world_size),
        master_address=environ.get("MASTER_ADDR"),
        master_port=int(port) if port else None,
        job_key=f"{launcher}-{namespace}" if namespace else None,
    )


def expected_environment(local_rank: int) -> dict[str, str]:
    """What a library that reads its place from torchrun's variables by itself (DeepSpeed) wants to find."""
    return {"LOCAL_RANK": str(local_rank)}
