"""The main job as a user runs it: real processes, real video, real kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.launch.commands import (
    COMMAND,
    QUICK,
    assert_same_bits,
    environment,
    final_state,
    one_line_of,
    reelscale,
    start,
    succeeded,
)

CHECKPOINTS = "--checkpoint.every-epochs=0.4"
WORKERS = "--data.loader.num-workers=1"


def _train(run_dir: Path, small: list[str], *flags: object, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    return reelscale("train", "motion_tsm", *small, f"--run-dir={run_dir}", f"--nproc={nproc}", *QUICK, *flags)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _ranks_of(supervisor: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def _wait_for_checkpoint(run_dir: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not (run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_killed_in_mid_epoch_and_resumed_it_ends_in_the_same_bits(tmp_path, small, nproc):
    if nproc > 1:
        small = [*small, WORKERS]
    succeeded(_train(tmp_path / "undisturbed", small, CHECKPOINTS, nproc=nproc))
    killed = tmp_path / "killed"
    process = start("train", "motion_tsm", *small, f"--run-dir={killed}", f"--nproc={nproc}", *QUICK, CHECKPOINTS)
    _wait_for_checkpoint(killed, process)
    victim = _ranks_of(process)[-1] if nproc > 1 else process.pid
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    if nproc > 1:
        assert "rank 1 was killed by SIGKILL" in output
        assert "Traceback" not in output
    assert (killed / "checkpoints" / "latest").read_text() != "step_00000014\n"
    succeeded(_train(killed, small, CHECKPOINTS, "--resume", nproc=nproc))
    assert_same_bits(tmp_path / "undisturbed", killed)
    for folder in ("undisturbed", "killed"):
        certificate = succeeded(reelscale("certify", tmp_path / folder)).stdout
        assert certificate.count("exactly once") == 2, certificate


def test_resumed_on_another_number_of_processes_the_samples_stay_exact(tmp_path, small):
    flags = ["--training.batch-norm=frozen", "--optimizer.base-learning-rate=0.02", CHECKPOINTS]
    succeeded(_train(tmp_path / "undisturbed", small, *flags))
    moved = tmp_path / "moved"
    process = start("train", "motion_tsm", *small, f"--run-dir={moved}", "--nproc=2", *QUICK, *flags)
    _wait_for_checkpoint(moved, process)
    process.kill()
    process.communicate(timeout=60)
    succeeded(_train(moved, small, *flags, "--resume"))
    assert succeeded(reelscale("certify", moved)).stdout.count("exactly once") == 2
    expected = final_state(tmp_path / "undisturbed")
    weights = [name for name in expected if not name.startswith("momentum.")]
    moved_state = final_state(moved)
    for name in weights:
        torch.testing.assert_close(moved_state[name], expected[name], rtol=0, atol=1e-5, msg=name)


def test_twenty_steps_on_two_processes_are_those_of_one_with_the_whole_batch(tmp_path, small):
    """TSM on real clips, for both strategies; the toy task of tests/dist_train adds synchronised batch norm."""
    flags = ["--training.batch-norm=frozen", "--optimizer.base-learning-rate=0.02", "--training.epochs=2.6"]
    succeeded(_train(tmp_path / "one", small, *flags))
    expected = final_state(tmp_path / "one")
    for strategy in ("allreduce", "ddp"):
        folder = tmp_path / strategy
        succeeded(_train(folder, small, *flags, f"--exchange.strategy={strategy}", nproc=2))
        assert (folder / "checkpoints" / "latest").read_text() == "step_00000020\n"
        for name, value in final_state(folder).items():
            if not name.startswith("momentum."):
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=f"{strategy}: {name}")


@pytest.mark.parametrize(
    "by", ["SIGTERM to the supervisor", pytest.param("Ctrl-C in a terminal", marks=pytest.mark.thorough)]
)
def test_a_stop_request_saves_and_can_be_continued(tmp_path, small, by):
    process = start("train", "motion_tsm", *small, f"--run-dir={tmp_path / 'run'}", "--nproc=2", *QUICK, CHECKPOINTS)
    _wait_for_checkpoint(tmp_path / "run", process)
    if by == "Ctrl-C in a terminal":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped on request after step" in output
    assert "--resume" in output
    if by == "SIGTERM to the supervisor":
        succeeded(_train(tmp_path / "run", small, CHECKPOINTS, "--resume", nproc=2))
        assert succeeded(reelscale("certify", tmp_path / "run")).stdout.count("exactly once") == 2


def test_when_the_supervisor_dies_no_rank_stays_behind(tmp_path, small):
    process = start("train", "motion_tsm", *small, f"--run-dir={tmp_path / 'run'}", "--nproc=2", *QUICK, CHECKPOINTS)
    _wait_for_checkpoint(tmp_path / "run", process)
    ranks = _ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline, "a rank is still running"
        time.sleep(0.05)


def _launched(launcher: list[str], run_dir: Path, small: list[str]) -> subprocess.CompletedProcess[str]:
    command = [*launcher, *COMMAND[1:], "train", "motion_tsm", *small, f"--run-dir={run_dir}", *QUICK]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment())


@pytest.mark.thorough
def test_torchrun_and_mpirun_give_the_bits_of_nproc(tmp_path, small):
    succeeded(_train(tmp_path / "local", small, nproc=2))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = succeeded(_launched([*torchrun, sys.executable], tmp_path / "torchrun", small))
    assert "failed to bind" not in done.stderr  # torchrun's agent keeps a store already
    assert_same_bits(tmp_path / "local", tmp_path / "torchrun")
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python: install the extra 'dev' (openmpi)")
    flags = ["--oversubscribe", "--allow-run-as-root", "-n", "2"]
    succeeded(_launched([str(mpirun), *flags, sys.executable], tmp_path / "mpirun", small))
    assert_same_bits(tmp_path / "local", tmp_path / "mpirun")
    for name in ("torchrun", "mpirun"):
        world = json.loads((tmp_path / name / "config.json").read_text())["world"]
        assert world["world_size"] == 2
        assert world["launcher"] == {"torchrun": "torchrun", "mpirun": "openmpi"}[name]


def test_a_run_leaves_ledger_report_wandb_and_predictions(tmp_path, small):
    run_dir = tmp_path / "run"
    done = succeeded(reelscale("train", "motion_tsm", *small, f"--run-dir={run_dir}", "--nproc=2", WORKERS))
    assert "report: " in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "report:" not in line) <= 80
    page = (run_dir / "report.html").read_text()
    assert "data:image/jpeg;base64," in page
    predictions = json.loads((run_dir / "predictions.json").read_text())
    assert [row["sample_id"] for row in predictions["samples"]] == list(range(len(predictions["samples"])))
    run_id = json.loads((run_dir / "config.json").read_text())["run_id"]
    assert list((run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    for rank in range(2):
        lines = _lines(run_dir / "ledger" / f"rank_{rank:05d}.jsonl")
        spans = [line for line in lines if line["kind"] == "span"]
        wall = lines[-1]["wall_seconds"]
        assert lines[-1]["exit"] == "ok"
        assert sum(sum(span["seconds"].values()) for span in spans) == pytest.approx(wall, abs=0.05)
        assert sum(span["seconds"].get("remainder", 0.0) for span in spans) < 0.02 * wall
        steps = [span for span in spans if span["name"] == "step"]
        assert all(span["bytes"][row] > 0 for span in steps for row in ("read", "decode", "host_to_device", "wire"))
        workers = {name: sum(span["workers"][name] for span in steps) for name in steps[0]["workers"]}
        parts = workers["read"] + workers["decode"] + workers["augment"] + workers["idle"]
        assert parts == pytest.approx(workers["wall"], rel=0.01)
        assert workers["frames_used"] <= workers["frames_decoded"]


def test_dry_run_prints_the_plan_and_makes_nothing(tmp_path, small):
    done = succeeded(_train(tmp_path / "run", small, "--dry-run", nproc=2))
    assert "12 clips = 2 processes x 1 micro-batches x 6 clips" in done.stdout
    assert "buckets" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_users_own_experiment_is_found_and_ledger_and_journal_can_be_switched_off(tmp_path, motion_shards):
    shutil.copy(Path(__file__).with_name("users_code.py"), tmp_path / "users_code.py")
    off = ["--monitor.ledger=off", "--monitor.journal=off"]
    done = subprocess.run(
        [*COMMAND, "train", "users_code:my_experiment", f"--data.root={motion_shards}", *QUICK, *off],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(tmp_path)},
        timeout=120,
        check=False,
    )
    succeeded(done)
    run_dir = tmp_path / "runs" / "mine"
    assert _lines(run_dir / "metrics.jsonl")[-1]["evaluation"]["num_samples"] > 0
    assert not (run_dir / "ledger").exists()
    assert not (run_dir / "journal").exists()


@pytest.mark.thorough
def test_the_real_set_packs_and_its_loss_falls_on_two_processes(tmp_path, tennis7):
    succeeded(reelscale("pack", tennis7, tmp_path / "shards"))
    flags = [
        f"--data.root={tmp_path / 'shards'}",
        f"--run-dir={tmp_path / 'run'}",
        "--nproc=2",
        "--data.clip.crop-size=56",
        "--data.clip.short-side=64",
        "--model.width=16",
        "--model.stem-stride=2",
        "--training.batch-clips=16",
        "--training.epochs=3",
        "--training.evaluate-every-epochs=0",
        "--training.log-every-steps=7",
        "--data.loader.num-workers=1",
    ]
    succeeded(reelscale("train", "video_tsm", *flags, *QUICK, timeout=280))
    losses = [line["loss"] for line in _lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.05, losses


def test_a_run_is_not_continued_as_another(tmp_path, small):
    run_dir = tmp_path / "run"
    succeeded(_train(run_dir, small))
    before = (run_dir / "config.json").read_text()
    flags = ["--model.width=16", "--training.seed=5", "--optimizer.name=lars"]
    line = one_line_of(_train(run_dir, small, "--resume", *flags))
    assert "--training.seed was 0, is 5" in line
    assert "--model.width was 8, is 16" in line
    assert "--optimizer.name was sgd, is lars" in line
    assert (run_dir / "config.json").read_text() == before
    done = succeeded(_train(run_dir, small, "--resume", "--training.epochs=3"))
    assert "Traceback" not in done.stderr
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000023\n"


def test_a_run_folder_that_exists_is_left_alone(tmp_path, small):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    for nproc in (1, 2):
        assert "exists: continue it with --resume" in one_line_of(_train(run_dir, small, nproc=nproc))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
