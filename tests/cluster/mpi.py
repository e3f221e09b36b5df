"""How tests start an MPI program: the MPI beside this Python, or one of a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.launch.commands import environment


@dataclass(frozen=True, kw_only=True)
class Mpi:
    """A launcher, the Python that it starts, and the flags that let it start more processes than there are cores."""

    mpirun: Path
    python: Path
    flags: tuple[str, ...] = ()

    def run(self, num_ranks: int, *arguments: object, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        """`mpirun -n num_ranks python -P ARGUMENTS` to its end."""
        folder = self.mpirun.parent
        changes = {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",  # where Intel's launcher looks for its parts
            "LD_LIBRARY_PATH": str(folder.parent / "lib"),
            "PYTHONPATH": str(REPOSITORY),  # found after -P, which keeps the current folder out
        }
        command = [self.mpirun, *self.flags, "-n", num_ranks, self.python, "-P", *arguments]
        return subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env=environment() | changes,
        )


def own_mpi() -> Mpi | None:
    """Open MPI of the package `openmpi` beside this Python, or None."""
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        return None
    return Mpi(mpirun=mpirun, python=Path(sys.executable), flags=("--oversubscribe", "--allow-run-as-root"))
