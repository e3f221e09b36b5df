"""`reelscale pack` as a user runs it: forms, the plan, going on after Ctrl-C and kill."""

from __future__ import annotations

import gzip
import re
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from data_shards.manifest import open_manifest
from launch.cli import run_command
from launch.console import ProgressLine
from tests.launch.commands import start


@pytest.fixture
def videos(motion_clips, tmp_path: Path) -> Path:
    """Twelve real videos of two classes in folders."""
    for label in ("left", "right"):
        (tmp_path / "videos" / label).mkdir(parents=True)
        for path in sorted(motion_clips.rglob(f"{label}_*.mp4"))[:6]:
            (tmp_path / "videos" / label / path.name).write_bytes(path.read_bytes())
    return tmp_path / "videos"


def test_each_form_is_a_flag_and_ends_in_the_manifest(videos: Path, capsys):
    for flags, form, frames in (
        ("--as mp4", "video", 28),
        ("--as jpeg --frames 4 --quality 80", "jpeg", 4),
        ("--as raw --frames 2 --short-side 16", "raw", 2),
    ):
        destination = videos.parent / form
        assert run_command(["pack", str(videos), str(destination), "--workers", "1", *flags.split()]) == 0
        manifest = open_manifest(destination / "train")
        assert (manifest.form, int(manifest.samples["num_frames"][0])) == (form, frames)
    assert re.search(r"2 classes\n  train +10 videos +1 shard  ", capsys.readouterr().out)


def test_a_flag_of_another_form_is_one_line(videos: Path, capsys):
    assert run_command(["pack", str(videos), str(videos.parent / "out"), "--as", "raw", "--gop", "8"]) == 2
    assert "gop is for mp4, not for raw" in capsys.readouterr().err
    assert run_command(["pack", str(videos), str(videos.parent / "out"), "--as", "gif"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_plan_measures_each_form_recommends_one_and_writes_nothing(videos: Path, capsys):
    flags = ["--plan", "--cores", "4", "--storage-megabytes-per-second", "100", "--target-clips-per-second", "5"]
    assert run_command(["pack", str(videos), str(videos.parent / "out"), *flags]) == 0
    said = capsys.readouterr().out
    assert "Measured on 12 of 12 samples" in said
    assert "mp4, untouched" in said
    assert "Recommended: " in said
    assert max(map(len, said.splitlines())) <= 80
    assert [path.name for path in videos.parent.iterdir()] == ["videos"]


def test_images_say_how_they_are_packed_and_are_packed_so(tmp_path: Path, capsys):
    (tmp_path / "mnist").mkdir()
    for kind, array in (("images-idx3", np.zeros((40, 8, 8), np.uint8)), ("labels-idx1", np.zeros(40, np.uint8))):
        content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
        (tmp_path / "mnist" / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    arguments = ["pack", str(tmp_path / "mnist"), str(tmp_path / "out"), "--workers", "1"]
    assert run_command(arguments) == 2
    assert "holds pictures: pack them --as jpeg, or --as raw" in capsys.readouterr().err
    assert run_command([*arguments, "--as", "raw"]) == 0
    assert re.search(r"train +36 images +2 shards", capsys.readouterr().out)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.thorough)]
)
def test_a_stopped_command_goes_on(motion_clips, motion_shards, tmp_path: Path, number: int):
    out = tmp_path / "out"
    flags = ("--max-shard-samples", 1, "--workers", 2, "--as", "mp4", "--gop", 4)
    running = start("pack", motion_clips, out, *flags)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/records/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(number)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == (-number if number == signal.SIGKILL else 128 + number), said
    if number != signal.SIGKILL:
        (line,) = said.splitlines()[-1:]
        assert line == f"stopped; finished shards are kept in {out}.partial, the same command goes on from there"
    assert not out.exists()
    finished = len(list(tmp_path.glob("out.partial/records/*.json")))
    assert finished > 0
    assert run_command(["pack", str(motion_clips), str(out), *map(str, flags)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for split in ("train", "val", "test"):
        one, other = open_manifest(out / split), open_manifest(motion_shards / split)
        assert one.samples["key"].tolist() == other.samples["key"].tolist()


def test_a_command_that_is_stopped_while_it_lists_the_source_says_so(videos: Path, capsys, monkeypatch):
    def list_source(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("data_shards.pack.read_source", list_source)
    assert run_command(["pack", str(videos), str(videos.parent / "out")]) == 143
    assert capsys.readouterr().err == "stopped; no shard was begun\n"
    assert [path.name for path in videos.parent.iterdir()] == ["videos"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_plan_measures_samples_from_the_whole_list(tmp_path: Path, monkeypatch):
    for number in range(31):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{number:02d}.png").write_bytes(b"")
    measured: list[str] = []

    def plan_forms(reads, **_: object) -> None:
        measured.extend(read.__self__.path.stem for read in reads)
        raise ValueError("enough")

    monkeypatch.setattr("data_shards.forms.planning.plan_forms", plan_forms)
    assert run_command(["pack", str(tmp_path / "pictures"), str(tmp_path / "out"), "--plan"]) == 2
    assert measured == [f"{place * 31 // 16:02d}" for place in range(16)]


def test_the_time_left_does_not_count_what_an_earlier_run_did(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("launch.console.time.monotonic", lambda: clock[0])
    with ProgressLine("packing", unit="samples") as line:
        line.update(80, 100)
        clock[0] = 10.0
        line.update(90, 100)
    assert "90/100 samples  10 s left" in capsys.readouterr().err
