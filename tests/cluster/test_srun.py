"""`srun reelscale train ...` on a real SLURM of two nodes finds its place by itself."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster, missing
from tests.launch.commands import COMMAND, QUICK, assert_same_bits, reelscale, succeeded


@pytest.fixture
def cluster():
    reason = missing()
    if reason and os.environ.get("FAIL_ON_SKIP"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's folder, which only its owner may enter
    folder.chmod(0o755)
    try:
        with SlurmCluster(folder, num_nodes=2) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_nodes_under_srun_end_in_the_bits_of_two_local_processes(cluster, tmp_path, small):
    flags = ["train", "motion_tsm", *small, *QUICK]
    succeeded(reelscale(*flags, f"--run-dir={tmp_path / 'local'}", "--nproc=2"))
    job = ["-N2", "--ntasks-per-node=1", "--export=ALL,OMP_NUM_THREADS=1", *COMMAND, *flags]
    succeeded(cluster.srun(*job, f"--run-dir={tmp_path / 'srun'}"))
    assert_same_bits(tmp_path / "local", tmp_path / "srun")
    world = json.loads((tmp_path / "srun" / "config.json").read_text())["world"]
    assert world == {
        "world_size": 2,
        "num_nodes": 2,
        "device": "cpu",
        "launcher": "slurm",
        "transport": "gloo",
    }
    ledgers = [tmp_path / "srun" / "ledger" / f"rank_0000{rank}.jsonl" for rank in range(2)]
    starts = [json.loads(path.read_text().splitlines()[0]) for path in ledgers]
    assert [(line["host"], line["node_rank"]) for line in starts] == [("n1", 0), ("n2", 1)]


def test_a_mistake_under_srun_is_said_once_and_ends_every_task(cluster, tmp_path, small):
    done = cluster.srun("-N2", "--ntasks-per-node=2", *COMMAND, "train", "motion_tsm", *small, "--data.root=/nowhere")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("reelscale: error:")]
    assert len(said) == 1, done.stderr
    assert "/nowhere is not a folder" in said[0]
