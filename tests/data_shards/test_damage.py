"""Each damaged or odd file ends in a counted skip, in one clear line, or in the right pixels, packed and loaded."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.batch import Batch
from data_shards.clips import ClipConfig
from data_shards.errors import DataError
from data_shards.framing import apply_framing
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest, open_manifest
from data_shards.pack import PackConfig, pack
from data_shards.probe import probe_video
from data_shards.verify import VerifyConfig, verify
from tests.data_shards.damaged import SOURCES, Taken
from tests.data_shards.packed import make_split
from tests.data_shards.videos import decode_everything

CLIP = ClipConfig(num_segments=4, crop_size=32, short_side=32)
GOOD = [name for name, case in SOURCES.items() if isinstance(case.outcome, Taken) and not case.outcome.damaged]
BAD = [name for name, case in SOURCES.items() if not isinstance(case.outcome, Taken)]
# Of a file with damage in the middle it depends on the frames wanted.
PARTLY = [name for name, case in SOURCES.items() if isinstance(case.outcome, Taken) and case.outcome.damaged]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The corpus by name."""
    return {name: case.make() for name, case in SOURCES.items()}


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory) -> Path:
    """The corpus packed in one go, with what cannot be packed skipped."""
    source = tmp_path_factory.mktemp("damaged")
    for name, payload in files.items():
        path = source / "videos" / "class" / f"{name}{SOURCES[name].suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    config = PackConfig(
        source=source / "videos", destination=source / "packed", on_bad="skip", val_fraction=0, workers=1
    )
    result = pack(config)
    assert len(result.rejected) == len(BAD)
    return source / "packed"


@pytest.fixture(scope="module")
def smuggled(files, tmp_path_factory) -> Manifest:
    """The corpus in shards, each file with the checksum of its damaged bytes: as if it had been packed unseen."""
    return make_split(tmp_path_factory.mktemp("smuggled") / "train", files, labels=[0] * len(files))


def rows_by_name(manifest: Manifest) -> dict[str, np.void]:
    return {manifest.key(number).split("/")[-1]: manifest.samples[number] for number in range(len(manifest))}


def load(manifest: Manifest, *, num_workers: int = 0, on_bad_sample: str = "skip") -> list[Batch]:
    config = LoaderConfig(num_workers=num_workers, on_bad_sample=on_bad_sample)
    with ClipLoader(manifest, clip=CLIP, loader=config, training=False, global_batch_clips=8) as loader:
        return list(loader.evaluation_batches())


def test_the_corpus_is_large_and_its_files_differ(files):
    assert len(files) >= 60
    assert len(BAD) >= 40
    assert len(set(files.values())) == len(files)


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_rejected_with_its_reason(packed: Path, name: str):
    with (packed / "rejected.csv").open(newline="") as file:
        reasons = {Path(row["file"]).stem: row["reason"] for row in csv.DictReader(file)}
    assert SOURCES[name].outcome in reasons[name]
    assert "\n" not in reasons[name]
    assert reasons[name]
    assert name not in rows_by_name(open_manifest(packed / "train"))


@pytest.mark.parametrize("name", GOOD + PARTLY)
def test_an_odd_file_that_can_be_used_is_described_as_it_is_shown(packed: Path, name: str):
    row, outcome = rows_by_name(open_manifest(packed / "train"))[name], SOURCES[name].outcome
    assert (row["num_frames"], row["width"], row["height"]) == (outcome.num_frames, outcome.width, outcome.height)


def test_every_loaded_clip_shows_what_ffmpeg_shows(packed: Path, files):
    manifest = open_manifest(packed / "train")
    seen = 0
    for batch in load(manifest):
        for place, sample_id in enumerate(batch.sample_ids.tolist()):
            name = manifest.key(sample_id).split("/")[-1]
            if name in PARTLY:  # FFmpeg's own plain way stops at the damage
                continue
            assert batch.weights[place], name
            seen += 1
            row = manifest.samples[sample_id]
            (view,) = CLIP.views(row, int(row["num_frames"]), None)
            whole = shown(files[name], name)[view.frame_numbers]
            wanted = apply_framing(torch.from_numpy(whole), view.framing)
            got = batch.clips[place].permute(0, 2, 3, 1)
            apart = (got.int() - wanted.int()).abs().float().mean(dim=(1, 2, 3))
            assert apart.max() < 6, f"{name}: a frame is {apart.max():.1f} levels away from FFmpeg's"
    assert seen == len(GOOD)


def shown(payload: bytes, name: str) -> np.ndarray:
    """All frames, upright, in the plain way."""
    frames = decode_everything(payload)
    if not name.startswith("rotated"):
        return frames
    turns = round(probe_video(payload).rotation_degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(frames, turns, axes=(1, 2)))


def check_skips(manifest: Manifest, batches: list[Batch]) -> None:
    """Every bad sample has weight 0, a clip of zeros and a line with its key; every good one is there."""
    weight, lines = {}, {}
    for batch in batches:
        names = [manifest.key(sample_id) for sample_id in batch.sample_ids.tolist()]
        weight.update(zip(names, batch.weights.tolist(), strict=True))
        for place, name in enumerate(names):
            assert batch.weights[place] or not batch.clips[place].any()
            lines[name] = [line for line in batch.skipped if f":{name}: " in line]
        assert len(batch.skipped) == int((batch.weights == 0).sum()) == batch.costs["skipped"]
    assert weight.keys() == SOURCES.keys()
    for name in SOURCES:
        if name in PARTLY:
            continue
        assert weight[name] == (name in GOOD), (name, lines[name])
        assert len(lines[name]) == (name in BAD)
        assert all("\n" not in line and ".tar:" in line for line in lines[name])


def test_a_bad_sample_in_a_shard_is_skipped_counted_and_named(smuggled: Manifest):
    check_skips(smuggled, load(smuggled))


@pytest.mark.thorough
def test_worker_processes_survive_every_file(smuggled: Manifest):
    check_skips(smuggled, load(smuggled, num_workers=2))


def test_the_first_bad_sample_stops_a_loader_that_is_to_stop(smuggled: Manifest):
    first = next(smuggled.key(number) for number in range(len(smuggled)) if smuggled.key(number) in BAD)
    with pytest.raises(DataError, match=rf"shard-000000\.tar:{first}: ") as caught:
        load(smuggled, on_bad_sample="raise")
    assert "\n" not in str(caught.value)


def test_verify_names_every_bad_sample_once(smuggled: Manifest):
    lines: list[str] = []
    result = verify(VerifyConfig(root=smuggled.root, decode="all", workers=1), found=lines.append)
    assert result.num_problems == len(lines)
    for name in SOURCES:
        of_sample = [line for line in lines if f".tar:{name}: " in line]
        assert len(of_sample) == (name not in GOOD), (name, of_sample)
