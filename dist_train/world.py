"""Where this process stands in the job: one frozen `World`, made once at the start, passed as an argument.

`placement` reads it from the launcher's environment and `rendezvous` makes the process group; no other module asks
`torch.distributed` for a rank or reads it from the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class World:
    """A process's place among all processes of the job. Ranks count from 0."""

    rank: int = 0
    """Number of this process in the whole job."""
    world_size: int = 1
    """Number of processes in the whole job."""
    local_rank: int = 0
    """Number of this process on its node."""
    local_world_size: int = 1
    """Number of processes on this node."""
    node_rank: int = 0
    """Number of this node in the job."""
    num_nodes: int = 1
    """Number of nodes in the job."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The device that this process computes on."""
    launcher: str = "single"
    """What started the process: single, local, torchrun, slurm, openmpi, or mpich (PMI)."""

    def __post_init__(self) -> None:
        for name, value, bound in (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
            ("node_rank", self.node_rank, self.num_nodes),
        ):
            if not 0 <= value < bound:
                raise ValueError(f"{name} {value} is outside 0..{bound - 1} (started by {self.launcher})")

    @property
    def is_first(self) -> bool:
        """True on the one process that writes to the console and to shared files."""
        return self.rank == 0
