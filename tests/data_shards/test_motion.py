"""The embedded data set: a frame says nothing about the direction of time, splits share no scene, bytes repeat."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from data_shards.motion import (
    MOTION_CLASSES,
    MOTION_PAIRS,
    MotionConfig,
    encode_h264,
    make_motion_dataset,
    render_clip,
)
from data_shards.motion_scene import FORWARD_MOTIONS, Scene, draw_scene, render_take

SMALL = MotionConfig(num_clips=60, size=32, num_frames=8, workers=1)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "set"
    make_motion_dataset(SMALL, folder)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decode(encoded: bytes) -> np.ndarray:
    """All frames, uint8 planes of yuv420p."""
    with av.open(io.BytesIO(encoded)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def test_each_clip_is_a_real_h264_file_of_the_asked_size(small_set: Path):
    rows = rows_of(small_set)
    assert len(rows) == SMALL.num_clips
    assert {row["file"] for row in rows} == {str(path.relative_to(small_set)) for path in small_set.rglob("*.mp4")}
    with av.open(str(small_set / rows[0]["file"])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 32, 32)
        assert sum(1 for _ in container.decode(stream)) == 8


def test_splits_share_no_scene_and_hold_each_class_alike(small_set: Path):
    rows = rows_of(small_set)
    scenes = {split: {row["scene"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert all(scenes.values())
    assert not scenes["train"] & scenes["val"]
    assert not scenes["train"] & scenes["test"]
    assert not scenes["val"] & scenes["test"]
    for split in scenes:
        counts = Counter(row["label"] for row in rows if row["split"] == split)
        assert counts.keys() == set(MOTION_CLASSES)
        assert len(set(counts.values())) == 1


def test_both_classes_of_a_pair_are_shown_in_the_same_scenes(small_set: Path):
    scenes: dict[str, set[str]] = {}
    for row in rows_of(small_set):
        scenes.setdefault(row["label"], set()).add(row["scene"])
    for first, second in MOTION_PAIRS:
        assert scenes[first] == scenes[second]


def test_other_scenes_look_different():
    scenes = [draw_scene(np.random.default_rng([0, 1, number])) for number in range(200)]
    assert len({scene.background_seed for scene in scenes}) == 200
    assert len({scene.shape for scene in scenes}) == 8
    first, second = (render_clip(SMALL, index=0, label="left", scene=scene) for scene in (0, 5))
    assert np.abs(first.astype(int) - second).mean() > 5


@pytest.mark.parametrize("pair", MOTION_PAIRS, ids="-".join)
def test_the_second_class_is_the_first_ones_process_played_backwards(pair: tuple[str, str]):
    forward = render_clip(SMALL, index=3, label=pair[0], scene=7)
    backward = render_clip(SMALL, index=3, label=pair[1], scene=7)
    assert (forward[::-1] == backward).all()
    assert not (forward == backward).all()


@pytest.mark.parametrize("interval", [1, 4])
def test_coding_leaves_no_trace_of_a_frames_place(interval: int):
    frames = render_clip(MotionConfig(size=64), index=0, label="growing", scene=3)
    forward = decode(encode_h264(frames, keyframe_interval_frames=interval))
    backward = decode(encode_h264(frames[::-1], keyframe_interval_frames=interval))
    assert (forward == backward[::-1]).all()
    assert np.abs(forward.astype(int) - frames).mean() < (3 if interval == 1 else 1e-9)


def test_key_frames_stand_at_the_asked_distance():
    frames = render_clip(SMALL, index=0, label="up", scene=0)
    with av.open(io.BytesIO(encode_h264(frames, keyframe_interval_frames=4))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        keys = sorted(packet.pts for packet in packets if packet.is_keyframe)
        assert [key // (packets[0].duration or 1) for key in np.subtract(keys, keys[0])] == [0, 4]


def object_track(motion: str, number: int) -> dict[str, np.ndarray]:
    """Where the object is in each frame: the take with the object less the same take without it."""
    scene = draw_scene(np.random.default_rng([9, number]))
    takes = [
        render_take(shown, motion, size=64, num_frames=12, rng=np.random.default_rng([8, number]))[:, :64]
        for shown in (scene, _without_object(scene))
    ]
    difference = np.abs(takes[0].astype(float) - takes[1])
    rows, columns = np.mgrid[:64, :64]
    area = (difference > 8).sum((1, 2))
    weight = np.maximum((difference > 8).sum((1, 2)), 1)
    return {
        "x": ((difference > 8) * columns).sum((1, 2)) / weight,
        "y": ((difference > 8) * rows).sum((1, 2)) / weight,
        "area": area,
        "contrast": difference.sum((1, 2)),
    }


def _without_object(scene: Scene) -> Scene:
    return replace(scene, radius=1e-3)


@pytest.mark.parametrize("number", range(4))
def test_what_moves_moves_as_the_class_says(number: int):
    assert object_track("left", number)["x"][0] - object_track("left", number)["x"][-1] > 18
    assert object_track("up", number)["y"][0] - object_track("up", number)["y"][-1] > 18
    growing = object_track("growing", number)
    assert growing["area"][-1] > 4 * growing["area"][0]
    appearing = object_track("appearing", number)
    assert appearing["contrast"][-1] > 10 * appearing["contrast"][0]
    turning = object_track("clockwise", number)
    x, y = turning["x"] - turning["x"].mean(), turning["y"] - turning["y"].mean()
    turns = x[:-1] * y[1:] - y[:-1] * x[1:]  # positive: clockwise, for y points down
    assert turns.sum() > 0
    assert (turns > 0).mean() > 0.7


def test_single_frames_of_a_pair_have_the_same_statistics():
    """A shift of the mean of any simple statistic between the classes of a pair would be a leak."""
    config = MotionConfig(size=32, num_frames=8)
    for pair in MOTION_PAIRS:
        statistics = []
        for label in pair:
            clips = [render_clip(config, index=number * 2 + (label == pair[1]), label=label, scene=number)
                     for number in range(60)]  # fmt: skip
            luma = np.stack(clips)[:, :, :32].astype(float)
            left_less_right = luma[..., :16].mean((2, 3)) - luma[..., 16:].mean((2, 3))
            statistics.append([luma.mean((1, 2, 3)), luma.std((2, 3)).mean(1), left_less_right.mean(1)])
        paired = np.subtract(*statistics)  # 3 statistics, 60 scenes; the scene is the same, the take is not
        score = paired.mean(1) / (paired.std(1) / np.sqrt(60))
        assert (np.abs(score) < 3.5).all(), (pair, score)


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(small_set: Path, tmp_path: Path):
    make_motion_dataset(MotionConfig(num_clips=60, size=32, num_frames=8, workers=2), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(small_set)


def test_another_seed_gives_other_clips(small_set: Path, tmp_path: Path):
    make_motion_dataset(MotionConfig(num_clips=60, size=32, num_frames=8, workers=1, seed=1), tmp_path / "other")
    ours, theirs = digest(small_set), digest(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] == theirs[name]] == ["labels.csv"]


def test_progress_counts_every_clip(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    counts = make_motion_dataset(SMALL, tmp_path / "set", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 60) for done in range(1, 61)]
    assert counts == {"train": 40, "val": 10, "test": 10}


def test_a_folder_that_is_not_empty_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty; remove it, or choose another name"):
        make_motion_dataset(SMALL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "set").mkdir()
    make_motion_dataset(SMALL, tmp_path / "set" / ".." / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["clips", "labels.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_partial_folder_of_somebody_else_is_not_cleaned_away(tmp_path: Path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not a leftover of reelscale; move it away"):
        make_motion_dataset(SMALL, tmp_path / "set")
    assert (tmp_path / "set.partial" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clips": 29}, "num_clips is 29, too few"),
        ({"size": 65}, "size is 65, give a multiple of 4"),
        ({"num_frames": 7}, "num_frames is 7"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "below 1 together"),
        ({"keyframe_interval_frames": 0}, "keyframe_interval_frames is 0"),
        ({"seed": -1}, "seed and workers are -1"),
        ({"size": 8, "num_frames": 1}, "size is 8.*num_frames is 1"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MotionConfig(**options)


def test_every_forward_motion_belongs_to_a_pair():
    assert tuple(first for first, _ in MOTION_PAIRS) == FORWARD_MOTIONS
    with pytest.raises(ValueError, match="'right' is no forward motion"):
        render_take(draw_scene(np.random.default_rng(0)), "right", size=32, num_frames=8, rng=np.random.default_rng(0))


KILLED = """
import sys
from data_shards.motion import MotionConfig, make_motion_dataset
if __name__ == "__main__":
    make_motion_dataset(MotionConfig(num_clips=100000, size=32, num_frames=8, workers=2), sys.argv[1])
"""


def test_a_kill_leaves_no_folder_and_no_process_and_the_next_run_cleans_up(tmp_path: Path):
    folder, script = tmp_path / "set", tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(folder)], start_new_session=True)
    partial = tmp_path / "set.partial"
    _wait_until(lambda: any(partial.rglob("*.mp4")), "no clip was written")
    with pytest.raises(RuntimeError, match="another process is writing"):
        make_motion_dataset(SMALL, folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until(lambda: not _group_lives(process.pid), "a worker outlived its parent")
    assert not folder.exists()
    make_motion_dataset(SMALL, folder)
    assert len(list(folder.rglob("*.mp4"))) == 60
    assert not partial.exists()


def _wait_until(condition, otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
