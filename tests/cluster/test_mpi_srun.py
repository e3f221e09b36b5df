"""`srun --mpi=pmix reelscale train --transport mpi`: SLURM starts Open MPI's ranks itself, without mpirun."""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.cluster.mpi import own_mpi
from tests.cluster.slurm import SlurmCluster, missing
from tests.launch.commands import COMMAND, QUICK, assert_same_bits, reelscale, succeeded


@pytest.fixture
def node():
    """SLURM with one node: Open MPI's PMIx wants a folder of its own on each."""
    reason = missing()
    if reason is None and ctypes.util.find_library("pmix") is None:
        reason = "libpmix is not installed"
    if reason is None and own_mpi() is None:
        reason = "no Open MPI beside this Python"
    if reason and os.environ.get("FAIL_ON_SKIP"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    try:
        with SlurmCluster(folder, num_nodes=1) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_srun_with_pmix_ends_in_the_bits_of_two_local_processes(node, tmp_path, small):
    flags = ["train", "motion_tsm", *small, *QUICK]
    succeeded(reelscale(*flags, f"--run-dir={tmp_path / 'local'}", "--nproc=2"))
    job = ["-N1", "--ntasks-per-node=2", "--mpi=pmix", "--export=ALL,OMP_NUM_THREADS=1", *COMMAND, *flags]
    succeeded(node.srun(*job, f"--run-dir={tmp_path / 'srun'}", "--transport=mpi"))
    assert_same_bits(tmp_path / "local", tmp_path / "srun")
    world = json.loads((tmp_path / "srun" / "config.json").read_text())["world"]
    assert (world["transport"], world["launcher"]) == ("mpi4py", "slurm")


def test_srun_that_starts_no_mpi_program_is_refused_with_the_flag_to_use(node, small):
    job = ["-N1", "--ntasks-per-node=2", "--mpi=none", *COMMAND, "train", "motion_tsm", *small]
    done = node.srun(*job, "--transport=mpi")
    assert done.returncode == 2
    assert "slurm started 2 processes and MPI (Open MPI v5" in done.stderr
    assert "srun --mpi=pmix" in done.stderr
