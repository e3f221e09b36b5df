"""What `inspect` says of a set is what is in it, and bad news are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import DataError
from data_shards.inspection import histogram, inspect_set, pick_samples, sample_frames
from data_shards.manifest import Manifest, open_manifest, write_manifest
from tests.data_shards.packed import make_split
from tests.data_shards.videos import encode

VIDEOS = {f"v{number}": encode(6 + number, seed=number) for number in range(6)}


def described(manifest: Manifest, fps: float = 2.0) -> Manifest:
    """The split with the frames and the rate that `make_split` leaves out."""
    samples = manifest.samples.copy()
    samples["num_frames"], samples["fps"] = np.arange(len(samples)) + 6, fps
    write_manifest(
        manifest.root, split=manifest.split, classes=manifest.classes, shards=manifest.shards, samples=samples
    )
    return open_manifest(manifest.root)


def split(folder: Path, videos: dict[str, bytes], name: str, **options: object) -> Manifest:
    return described(make_split(folder / name, videos, split=name, samples_per_shard=4, **options))  # type: ignore[arg-type]


def test_the_facts_are_those_of_the_videos(tmp_path: Path):
    split(tmp_path, {"w": encode(6, width=96, height=64), "x": encode(7, seed=9), "y": encode(8, seed=8)}, "val")
    split(tmp_path, VIDEOS, "train")
    facts = inspect_set(tmp_path)
    train, val = facts.splits
    assert (train.manifest.split, val.manifest.split) == ("train", "val")
    assert train.class_counts.tolist() == [2, 2, 2]
    assert facts.sizes == (("64x48", 8), ("96x64", 1))
    assert train.seconds == sum(range(6, 12)) / 2
    assert train.num_bytes == sum(path.stat().st_size for path in (tmp_path / "train").glob("*.tar"))
    by_name = {spread.name: spread for spread in facts.histograms}
    assert (by_name["length"].least, by_name["length"].median, by_name["length"].most) == (6, 8, 11)
    assert by_name["length"].counts.tolist() == [2, 2, 2, 1, 1, 1]
    assert (by_name["frame rate"].edges.tolist(), by_name["frame rate"].counts.tolist()) == ([2, 2], [9])
    assert facts.notes == ()


def test_one_split_alone_can_be_inspected(tmp_path: Path):
    split(tmp_path, VIDEOS, "train")
    assert len(inspect_set(tmp_path / "train").splits) == 1


def test_leaks_doubles_and_empty_classes_are_told(tmp_path: Path):
    split(tmp_path, VIDEOS | {"again": VIDEOS["v0"]}, "train", labels=[0, 1, 2, 0, 1, 2, 2])
    split(tmp_path, {"stolen": VIDEOS["v3"], "own": encode(9, seed=77)}, "test", labels=[0, 2])
    notes = inspect_set(tmp_path).notes
    assert "1 samples of train are there a second time (the same bytes)" in notes
    assert any(note.startswith("1 samples are in train and in test (the same bytes)") for note in notes)
    assert "1 of 3 classes have no sample in test: 'class1'" in notes


def test_a_set_without_frame_rates_says_so_and_has_no_durations(tmp_path: Path):
    described(make_split(tmp_path / "train", VIDEOS), fps=0)
    facts = inspect_set(tmp_path)
    assert "6 of 6 samples of train state no frame rate" in facts.notes
    assert "duration" not in {spread.name for spread in facts.histograms}


def test_a_damaged_set_is_refused_with_the_way_on(tmp_path: Path):
    split(tmp_path, VIDEOS, "train")
    (tmp_path / "train" / "samples.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"samples\.npy is damaged .*`reelscale verify "):
        inspect_set(tmp_path)


@pytest.mark.parametrize(
    ("values", "edges", "counts"),
    [
        ([3.0] * 4, [3, 3], [4]),
        ([0.0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]),
        ([1.0, 1.5, 1.5, 7.0], [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5], [1, 2] + [0] * 10 + [1]),
    ],
)
def test_a_histogram_has_round_borders(values: list[float], edges: list[float], counts: list[int]):
    spread = histogram(np.array(values), name="x", unit="s")
    assert spread.edges.tolist() == pytest.approx(edges)
    assert spread.counts.tolist() == counts


def test_one_giant_does_not_flatten_a_histogram():
    values = np.concatenate([np.linspace(1, 11, 1000), [1e6]])
    spread = histogram(values, name="x", unit="s")
    assert spread.edges[-1] < 20
    assert spread.counts.sum() == 1001
    assert spread.most == 1e6


def test_samples_to_look_at_are_of_all_classes_in_turn(tmp_path: Path):
    manifest = split(tmp_path, VIDEOS, "train", labels=[0, 0, 0, 0, 1, 2])
    labels = manifest.samples["label"]
    picked = pick_samples(manifest, 5)
    assert labels[picked].tolist() == [0, 1, 2, 0, 0] or labels[picked].tolist()[:4] == [0, 1, 2, 0]
    assert len(set(picked)) == len(picked)
    assert labels[pick_samples(manifest, 2)].tolist() == [0, 1]
    assert sorted(pick_samples(manifest, 100)) == list(range(6))


def test_frames_to_look_at_are_spread_and_whole_pictures(tmp_path: Path):
    manifest = split(tmp_path, {"short": encode(3), "long": encode(30)}, "train")
    assert sample_frames(manifest, 0).shape == (3, 48, 64, 3)
    assert sample_frames(manifest, 1).shape == (8, 48, 64, 3)
