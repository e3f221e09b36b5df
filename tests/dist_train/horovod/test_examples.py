"""The programs in examples/horovod run under real launchers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch.commands import environment

EXAMPLES = REPOSITORY / "examples" / "horovod"
SMALL = ["--samples", "320", "--epochs", "1"]


def run(command: list[object]) -> str:
    """Runs a command in the repository and returns what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env={**environment(), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def launcher(name: str) -> Path:
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"no {name} beside this Python: install the extra 'dev'")
    return path


@pytest.mark.thorough
def test_a_horovod_program_runs_alike_under_mpirun_and_torchrun():
    mpirun = [launcher("mpirun"), "--oversubscribe", "--allow-run-as-root", "-np", 2, sys.executable]
    torchrun = [launcher("torchrun"), "--standalone", "--nproc-per-node", 2]
    lines = [
        [line for line in run([*start, EXAMPLES / "mnist.py", *SMALL]).splitlines() if line.startswith("epoch")]
        for start in (mpirun, torchrun)
    ]
    assert lines[0] == lines[1]
    assert [line.startswith("epoch 1 ranks 2 loss ") for line in lines[0]] == [True]


def test_the_elastic_program_outlives_a_worker():
    printed = run(
        [
            *(sys.executable, "-m", "dist_train.horovod.elastic", "-np", 2, "--min-np", 1),
            *(EXAMPLES / "mnist_elastic.py", *SMALL, "--commit-every", 2, "--die", "0:3"),
        ]
    )
    assert "rank 0 of 2: epoch 0, 0 done" in printed
    assert "rank 0 of 1: epoch 0, 128 done" in printed
    assert re.search(r"epoch 0 ranks 1 last loss \d", printed)


def test_only_the_import_tells_the_example_from_a_horovod_program():
    for name in ("mnist.py", "mnist_elastic.py"):
        lines = [line for line in (EXAMPLES / name).read_text().splitlines() if "dist_train" in line]
        assert [line for line in lines if line.startswith("import")] == ["import dist_train.horovod as hvd"]
