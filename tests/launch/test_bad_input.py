"""Bad input: one clear line that says what, the value, where and what to do; exit code 2; nothing lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.cli import run_command
from tests.launch.commands import QUICK, one_line_of, reelscale, succeeded


def _refused(capsys, *arguments: object) -> str:
    """The one line with which this command line is refused, run in this process (no torch import to pay)."""
    code = run_command([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert code == 2, captured
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["train"], "which experiment?"),
        (["train", "motion_tssm"], "unknown experiment 'motion_tssm' (did you mean 'motion_tsm'?)"),
        (["train", "nowhere.module:function"], "cannot be imported: No module named 'nowhere'"),
        (["train", "motion_tsm", "--optimzer.momentum", "0.8"], "did you mean --optimizer.momentum?"),
        (["train", "motion_tsm", "--training.epochs", "many"], "--training.epochs: could not convert"),
        (["train", "motion_tsm", "--exchange.strategy", "horovod"], "invalid choice 'horovod'"),
        (["train", "motion_tsm", "--nproc", "0"], "--nproc is 0"),
        (["train", "motion_tsm", "--training.micro-batches", "0"], "training.micro_batches is 0"),
        (["train", "motion_tsm", "--training.epochs", "inf"], "training.epochs is inf"),
        (
            ["train", "motion_tsm", "--nproc", "3"],
            "training.batch_clips is 32, not divisible by 3 processes x 1 micro-batches: use 30 or 33",
        ),
        (["train", "motion_tsm", "--data.root", "/nowhere"], "/nowhere is not a folder: pack one with"),
        (["train", "motion_tsm", "--device", "cuda", "--data.root", "/"], "PyTorch sees no GPU"),
        (["pack", "/nowhere", "/tmp/never"], "/nowhere"),
        (["make-data", "motoin", "/tmp/never"], "unknown data set 'motoin' (did you mean 'motion'?)"),
        (["make-data", "motion", "/tmp/never", "--num-clips", "-4"], "num_clips is -4"),
        (["report", "/nowhere"], "/nowhere is not a run folder"),
        (["ledger", "/nowhere"], "/nowhere"),
        (["certify", "/nowhere"], "/nowhere is not the folder of a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, arguments, words):
    line = _refused(capsys, *arguments)
    assert words in line
    assert line.startswith("reelscale: error: ")


def test_all_wrong_values_are_told_at_once(capsys):
    flags = ["--training.epochs", "0", "--optimizer.momentum", "2", "--checkpoint.keep", "0"]
    line = _refused(capsys, "train", "motion_tsm", *flags)
    for words in ("training.epochs is 0", "optimizer.momentum is 2", "checkpoint.keep is 0"):
        assert words in line


# -- packing ---------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path, motion_clips) -> Path:
    """Two classes of real videos in folders."""
    folder = tmp_path / "videos"
    for label in ("left", "right"):
        (folder / label).mkdir(parents=True)
        for path in sorted(motion_clips.rglob(f"{label}_*.mp4"))[:4]:
            shutil.copy(path, folder / label)
    return folder


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_an_empty_folder_has_no_videos(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = _refused(capsys, "pack", tmp_path / "empty", tmp_path / "out")
    assert "no videos" in line
    assert str(tmp_path / "empty") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [pytest.param(lambda p: p.write_text("not a video\n"), id="text"), pytest.param(_truncate, id="truncated")],
)
def test_a_bad_video_stops_the_packing_or_is_left_out_and_listed(tmp_path, videos, capsys, damage):
    damage(sorted((videos / "left").iterdir())[0])
    name = sorted((videos / "left").iterdir())[0].name
    line = _refused(capsys, "pack", videos, tmp_path / "out")
    assert name in line
    assert "on-bad" in line
    assert not (tmp_path / "out").exists()
    assert run_command(["pack", str(videos), str(tmp_path / "out"), "--on-bad", "skip"]) == 0
    assert "left out: 1 videos" in capsys.readouterr().out
    rejected = (tmp_path / "out" / "rejected.csv").read_text()
    assert name in rejected


def test_a_full_disk_while_packing_leaves_nothing_half_made(tmp_path, motion_clips):
    disk = tmp_path / "disk"
    disk.mkdir()
    with _small_disk(disk, "600k"):
        line = one_line_of(reelscale("pack", motion_clips, disk / "out"))
        assert "the disk is full" in line
        assert "the same command again" in line
        assert not (disk / "out").exists()
        assert not list((disk / "out.partial").rglob("*.tar.partial"))


# -- training --------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, motion_shards) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(motion_shards, tmp_path / "shards"))


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_tar_cut_in_the_middle_is_named_before_anything_starts(tmp_path, small, shards, nproc):
    tar = shards / "train" / "shard-000000.tar"
    _truncate(tar)
    flags = [*small, f"--data.root={shards}", f"--run-dir={tmp_path / 'run'}", f"--nproc={nproc}", *QUICK]
    line = one_line_of(reelscale("train", "motion_tsm", *flags))
    assert "shard-000000.tar" in line
    assert "bytes" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("nproc,workers", [(1, 0), (2, 1)])
def test_a_manifest_that_does_not_match_its_tar_names_shard_and_key(tmp_path, small, shards, nproc, workers):
    tar = shards / "train" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    for position in range(600, len(content), 4096):  # same size, other bytes: only the checksums can tell
        content[position] ^= 0xFF
    tar.write_bytes(content)
    flags = [*small, f"--data.root={shards}", f"--run-dir={tmp_path / 'run'}", f"--nproc={nproc}", *QUICK]
    line = one_line_of(reelscale("train", "motion_tsm", *flags, f"--data.loader.num-workers={workers}"))
    assert "shard-000000.tar" in line
    assert "checksum" in line.lower() or "crc" in line.lower()


def test_a_full_disk_while_saving_keeps_the_last_checkpoint_and_the_run_can_go_on(tmp_path, small):
    disk = tmp_path / "disk"
    disk.mkdir()
    flags = [*small, f"--run-dir={disk / 'run'}", *QUICK, "--checkpoint.every-epochs=0.2", "--checkpoint.keep=50"]
    with _small_disk(disk, "5m"):
        line = one_line_of(reelscale("train", "motion_tsm", *flags))
        assert "cannot save checkpoint" in line
        assert "No space left on device" in line
        assert "is whole" in line
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        succeeded(reelscale("train", "motion_tsm", *flags, "--resume"))
        assert succeeded(reelscale("certify", disk / "run")).stdout.count("exactly once") == 2


class _small_disk:
    """A real file system of a given size at `folder`; skips the test where mounting is not allowed."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
