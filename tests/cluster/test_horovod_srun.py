"""Horovod programs under `srun` on a real SLURM of two nodes, one of which loses its worker."""

from __future__ import annotations

import sys

from tests.cluster.test_srun import cluster  # noqa: F401
from tests.conftest import REPOSITORY
from tests.launch.commands import succeeded

EXAMPLES = REPOSITORY / "examples" / "horovod"
TASKS = ["-N2", "--ntasks-per-node=1"]


def test_a_horovod_program_runs_on_two_nodes(cluster):  # noqa: F811
    program = [sys.executable, EXAMPLES / "mnist.py", "--samples=320", "--epochs=1"]
    done = succeeded(cluster.srun(*TASKS, f"--export=ALL,OMP_NUM_THREADS=1,PYTHONPATH={REPOSITORY}", *program))
    assert "epoch 1 ranks 2 loss " in done.stdout


def test_an_elastic_program_outlives_the_worker_of_a_node(cluster):  # noqa: F811
    program = [sys.executable, EXAMPLES / "mnist_elastic.py", "--samples=320", "--epochs=1", "--commit-every=2"]
    environ = f"--export=ALL,OMP_NUM_THREADS=1,PYTHONPATH={REPOSITORY}"
    done = cluster.srun(*TASKS, "--no-kill", "--wait=0", environ, *program, "--die=0:3")
    assert "rank 0 of 1: epoch 0, 128 done" in done.stdout, done.stderr
    assert "epoch 0 ranks 1 last loss" in done.stdout
