"""The backend "mpi4py" under a real mpirun: its answers against Gloo's, its errors, and training over it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cluster.mpi import Mpi, own_mpi
from tests.conftest import REPOSITORY
from tests.dist_train.mpi_worker import case_names
from tests.launch.commands import QUICK, assert_same_bits, environment, one_line_of, reelscale, succeeded

ERRORS = ("-m", "tests.dist_train.mpi_errors_worker")


@pytest.fixture
def mpi() -> Mpi:
    found = own_mpi()
    if found is None and os.environ.get("FAIL_ON_SKIP"):
        pytest.fail("no mpirun beside this Python")
    if found is None:
        pytest.skip("no mpirun beside this Python: install the extra 'dev' (openmpi)")
    return found


@pytest.mark.parametrize(
    ("num_ranks", "dtypes"),
    [
        (2, "all"),
        pytest.param(3, "some", marks=pytest.mark.thorough),
        pytest.param(4, "some", marks=pytest.mark.thorough),
    ],
)
def test_every_collective_dtype_and_op_gives_gloos_answers(mpi, tmp_path, num_ranks, dtypes):
    output = tmp_path / "results.json"
    succeeded(mpi.run(num_ranks, "-m", "tests.dist_train.mpi_worker", output, dtypes))
    results = json.loads(output.read_text())
    assert list(results) == case_names(dtypes)
    failed = {name: next(filter(None, problems)) for name, problems in results.items() if any(problems)}
    assert not failed, "\n".join(f"{name}: {problem}" for name, problem in failed.items())


@pytest.mark.thorough
def test_a_collective_to_which_a_rank_does_not_come_ends_in_errors_that_name_it_and_ends_the_job(mpi):
    done = mpi.run(2, *ERRORS, "late")
    assert done.returncode != 0
    title = "all_reduce, number 1 of group 0 (ranks 0, 1)"
    assert f"WAIT: {title} is not complete on rank 0 after 0.2 s" in done.stderr
    assert f"GROUP: {title} did not complete in 2 s on rank 0: another rank is gone" in done.stderr
    assert f"AFTER: barrier: the group is broken since: {title}" in done.stderr
    assert "rank 0 ended on an error and its peers do not end" in done.stderr


def test_messages_of_the_wrong_size_are_errors_and_the_job_goes_on(mpi):
    done = succeeded(mpi.run(2, *ERRORS, "sizes"))
    assert "recv from rank 0, number 1 of group 1 (ranks 0, 1): MPI: MPI_ERR_TRUNCATE" in done.stderr
    assert "SIZES: recv from rank 0: the message has 8 bytes and the tensor 12" in done.stderr


def test_a_rank_that_crashes_ends_the_job_although_others_wait_for_it(mpi):
    done = mpi.run(2, *ERRORS, "crash", timeout=50)  # the collective's own time-out is 60 seconds
    assert done.returncode != 0
    assert "this rank's own mistake" in done.stderr
    assert "rank 1 ended on an error" in done.stderr


def test_mpis_own_rendezvous_and_an_exit_without_farewell(mpi):
    succeeded(mpi.run(2, *ERRORS, "leave", "mpi4py://"))


def test_training_over_mpi_gives_the_bits_of_gloo(mpi, tmp_path, small):
    flags = ["train", "motion_tsm", *small, *QUICK]
    succeeded(reelscale(*flags, f"--run-dir={tmp_path / 'gloo'}", "--nproc=2"))
    succeeded(mpi.run(2, "-m", "launch.entry", *flags, f"--run-dir={tmp_path / 'mpi'}", "--transport=mpi"))
    assert_same_bits(tmp_path / "gloo", tmp_path / "mpi")
    worlds = [json.loads((tmp_path / name / "config.json").read_text())["world"] for name in ("gloo", "mpi")]
    assert [world["transport"] for world in worlds] == ["gloo", "mpi4py"]


def test_mpi_for_processes_that_are_no_mpi_program_is_refused(small):
    line = one_line_of(reelscale("train", "motion_tsm", *small, "--nproc=2", "--transport=mpi"))
    assert "--transport mpi: processes started by --nproc are no MPI program: start them with mpirun -n 2" in line


def test_a_missing_mpi4py_is_said_with_what_to_install(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('libmpi.so.12: cannot open shared object file')\n")
    program = "import sys; sys.path.insert(0, sys.argv[1]); import dist_train.mpi_backend"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=REPOSITORY,
        env=environment(),
    )
    assert done.returncode == 1
    assert "pip install 'reelscale[mpi]' (libmpi.so.12: cannot open shared object file)" in done.stderr
