"""The backend "mpi4py" over MPICH and Intel MPI, as pip installs them: the table that Open MPI has to pass, too."""

from __future__ import annotations

import json
import site
import subprocess
import sys

import pytest

from tests.cluster.mpi import Mpi
from tests.dist_train.mpi_worker import case_names
from tests.launch.commands import QUICK, assert_same_bits, reelscale, succeeded

ERRORS = ("-m", "tests.dist_train.mpi_errors_worker")


@pytest.fixture(scope="module", params=["mpich", "impi-rt"])
def mpi(request, tmp_path_factory) -> Mpi:
    """An MPI and mpi4py in an environment of their own, which sees this one's PyTorch."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", request.param, "mpi4py", "numpy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "project.pth").write_text("\n".join(site.getsitepackages()))
    return Mpi(mpirun=folder / "bin" / "mpiexec", python=python)


@pytest.mark.parametrize(("num_ranks", "dtypes"), [(2, "all"), (3, "some"), (4, "some")])
def test_every_collective_dtype_and_op_gives_gloos_answers(mpi, tmp_path, num_ranks, dtypes):
    output = tmp_path / "results.json"
    succeeded(mpi.run(num_ranks, "-m", "tests.dist_train.mpi_worker", output, dtypes))
    results = json.loads(output.read_text())
    assert list(results) == case_names(dtypes)
    failed = {name: next(filter(None, problems)) for name, problems in results.items() if any(problems)}
    assert not failed, "\n".join(f"{name}: {problem}" for name, problem in failed.items())


def test_a_rank_that_does_not_come_and_one_that_crashes_end_the_job(mpi):
    late = mpi.run(2, *ERRORS, "late")
    assert late.returncode != 0
    assert "all_reduce, number 1 of group 0 (ranks 0, 1) did not complete in 2 s on rank 0" in late.stdout + late.stderr
    crashed = mpi.run(2, *ERRORS, "crash", timeout=50)
    assert crashed.returncode != 0
    assert "this rank's own mistake" in crashed.stdout + crashed.stderr
    succeeded(mpi.run(2, *ERRORS, "leave", "mpi4py://"))


def test_training_gives_the_bits_of_gloo(mpi, tmp_path, small):
    flags = ["train", "motion_tsm", *small, *QUICK]
    succeeded(reelscale(*flags, f"--run-dir={tmp_path / 'gloo'}", "--nproc=2"))
    succeeded(mpi.run(2, "-m", "launch.entry", *flags, f"--run-dir={tmp_path / 'mpi'}", "--transport=mpi"))
    assert_same_bits(tmp_path / "gloo", tmp_path / "mpi")
    world = json.loads((tmp_path / "mpi" / "config.json").read_text())["world"]
    assert (world["transport"], world["launcher"]) == ("mpi4py", "mpich")
