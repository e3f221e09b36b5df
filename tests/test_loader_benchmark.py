"""The loader's benchmark runs, its arms do the same work, and its table says what was and was not measured."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import warnings
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.loader import NAMES, main, rows_of
from benchmarks.loader_peers.ours import _loop, ours
from benchmarks.loader_peers.peers import files_torchcodec, webdataset_pyav
from benchmarks.loader_peers.run import ARMS, resume, session_totals, turn
from benchmarks.loader_peers.work import BATCH_CLIPS, NUM_FRAMES, Place, with_pyav, with_torchcodec
from benchmarks.loader_sets import encode as encode_set
from benchmarks.loader_sets import make_real, read_footage, to_and_fro
from data_shards.sampling import segment_frames
from tests.conftest import REPOSITORY
from tests.data_shards.packed import make_split
from tests.data_shards.videos import decode_everything, encode


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """Four small clips, as files and as shards."""
    folder = tmp_path_factory.mktemp("bench")
    videos = {f"v{number}": encode(24, width=320, height=256, seed=number) for number in range(4)}
    make_split(folder / "shards", videos, samples_per_shard=2)
    for key, payload in videos.items():
        (folder / "files" / "class").mkdir(parents=True, exist_ok=True)
        (folder / "files" / "class" / f"{key}.mp4").write_bytes(payload)
    return Place(files=folder / "files", shards=folder / "shards", litdata=folder / "no", mds=folder / "no")


@pytest.mark.parametrize("decode", [with_pyav, with_torchcodec])
def test_a_peers_decoder_gives_the_frames_that_were_asked_for(decode):
    if decode is with_torchcodec:
        pytest.importorskip("torchcodec.decoders")
    payload = encode_set(list(decode_everything(encode(40, width=64, height=48))))
    wanted = segment_frames(40, NUM_FRAMES, np.random.default_rng(3))
    got = decode(payload, np.random.default_rng(3))
    assert np.abs(got.astype(int) - decode_everything(payload)[wanted]).max() <= 3


def check_turn(seen: dict[str, float]) -> None:
    assert seen["clips_per_second"] > 0
    assert seen["cpu_milliseconds"] >= 0
    assert seen["read_bytes"] >= 0


def test_our_arm_is_timed_and_resumes(place: Place):
    check_turn(turn(ours, place, 0, 1))
    assert resume(ours, place, 0, 3 * BATCH_CLIPS)["seconds"] > 0


def test_a_peers_arm_is_timed(place: Place):
    pytest.importorskip("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        check_turn(turn(webdataset_pyav, place, 0, 1))


def test_files_are_batched_and_resuming_replays(tmp_path: Path, place: Place):
    pytest.importorskip("torchcodec.decoders")
    del tmp_path
    for path in sorted(place.files.glob("*/*.mp4")):
        for number in range(2):
            (path.parent / f"{path.stem}_{number}.mp4").write_bytes(path.read_bytes())
    with files_torchcodec(place, 0) as stream:
        batch = next(stream)
    assert batch.shape == (BATCH_CLIPS, NUM_FRAMES, 224, 224, 3)


def test_the_limit_counts_clips_of_a_given_time(place: Place):
    here, there = Pipe()
    loop = threading.Thread(target=_loop, args=(place.shards, 0, 1, there))
    loop.start()
    assert here.recv() == "warm"
    here.send((0.0, 0.0))
    clips, rate, cpu_seconds = here.recv()
    loop.join()
    assert (clips, rate) == (0, 0)
    assert cpu_seconds >= 0


def test_an_arm_answers_requests_and_says_why_it_cannot(place: Place):
    values = json.dumps({name: str(value) for name, value in vars(place).items()})
    command = [sys.executable, "-P", "-m", "benchmarks.loader_peers.run", "litdata_torchcodec", values, "0"]
    done = subprocess.run(
        command,
        input='{"do": "turn", "batches": 1}\n',
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0] == {"ready": True}
    assert "error" in lines[1]
    assert done.returncode == 1


def test_processor_time_and_reads_of_the_session_are_counted(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    cpu, read = session_totals()
    (tmp_path / "file").read_bytes()
    sum(range(3_000_000))
    cpu_after, read_after = session_totals()
    assert cpu_after > cpu
    assert read_after - read >= 1_000_000


def fake(name: str, form: str, rates: list[float], error: str = "") -> tuple[SimpleNamespace, list[dict[str, float]]]:
    turns = [{"clips_per_second": rate, "cpu_milliseconds": 10.0, "read_bytes": 4e5} for rate in rates]
    return SimpleNamespace(name=name, form=form, error=error, title=f"{NAMES[name]}, {form}"), turns


def test_rows_compare_turns_of_the_same_round_at_the_same_form():
    turns = [
        fake("ours", "mp4", [20.0, 10.0, 30.0]),
        fake("limit", "mp4", [20.0, 10.0, 30.0]),
        fake("files_decord", "mp4", [10.0, 5.0, 15.0]),
        fake("litdata_torchcodec", "mp4", [], "ImportError: no"),
        fake("ours", "jpeg", [100.0, 50.0, 150.0]),
    ]
    arms = {SimpleKey(arm): of_arm for arm, of_arm in turns}
    rows = {row.what: row for row in rows_of("kinetics", arms)}  # type: ignore[arg-type]
    assert rows["kinetics, mp4: ours"].seen == "20.0 clips/s, 10.0 ms CPU a clip, 400 kB read a clip"
    limit = rows["kinetics, mp4: the limit: decode and frame in a loop"]
    assert limit.seen == "20.0 clips/s, 10.0 ms CPU a clip; ours / it 1.000 (1.000 to 1.000, 3 pairs)"
    assert limit.goal == "at least 0.95"
    assert "ours / it 2.000 (2.000 to 2.000, 3 pairs)" in rows["kinetics, mp4: files + decord"].seen
    assert rows["kinetics, mp4: LitData + TorchCodec"].seen == "not measured: ImportError: no"
    assert rows["kinetics: ours, jpeg / files + decord, mp4"].seen == "10.000 (10.000 to 10.000, 3 pairs)"
    assert not any("jpeg / LitData" in what for what in rows)


class SimpleKey(SimpleNamespace):
    """A namespace that can be a key, as an `Arm` can."""

    def __init__(self, arm: SimpleNamespace) -> None:
        super().__init__(**vars(arm))

    __hash__ = object.__hash__


def test_every_arm_has_a_name_for_people():
    assert ARMS.keys() == NAMES.keys()


def test_footage_is_read_class_by_class_in_turn(tmp_path: Path):
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "label"), ("a1.mp4", "a"), ("a2.mp4", "a"), ("b1.mp4", "b")])
    for name in ("a1", "a2", "b1"):
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    assert [clip.path.stem for clip in read_footage(tmp_path)] == ["a1", "b1", "a2"]
    made = make_real(tmp_path, tmp_path / "real", num_clips=2)
    assert sorted(path.relative_to(made).as_posix() for path in made.glob("*/*")) == ["a/a1.mp4", "b/b1.mp4"]
    with pytest.raises(ValueError, match="does not exist; give a folder"):
        read_footage(tmp_path / "elsewhere")


def test_to_and_fro_shows_no_cut():
    assert to_and_fro([0, 1, 2, 3], 9) == [0, 1, 2, 3, 2, 1, 0, 1, 2]  # type: ignore[arg-type, list-item, comparison-overlap]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "unknown section 'nothing'"),
        (["--peers-python", "/nowhere/python"], "make it with --make-peers"),
        (["real", "--footage", "/nowhere", "--folder", "{tmp}"], "does not exist; give a folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, capsys, monkeypatch, arguments: list[str], words: str):
    monkeypatch.setattr("sys.argv", ["loader", *(part.format(tmp=tmp_path) for part in arguments)])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err
