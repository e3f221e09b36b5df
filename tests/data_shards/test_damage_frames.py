"""Each damaged frames file ends in a counted skip and one clear line, each odd one in the right pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_shards.clips import ClipConfig
from data_shards.errors import DataError
from data_shards.forms.base import Form
from data_shards.forms.frames_file import FramesFile
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest, open_manifest, write_manifest
from data_shards.reading import ShardReader
from data_shards.verify import VerifyConfig, verify
from tests.data_shards.damaged_frames import FRAMES, HEIGHT, PIXELS, STORED, WIDTH
from tests.data_shards.packed import make_split

CLIP = ClipConfig(num_segments=FRAMES, crop_size=32, short_side=32)
FORMS: tuple[Form, ...] = ("jpeg", "raw")


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> dict[Form, Manifest]:
    """The corpus in two splits, described as it was before the damage."""
    found: dict[Form, Manifest] = {}
    for form in FORMS:
        files = {name: case.make() for name, case in STORED.items() if case.form == form}
        made = make_split(tmp_path_factory.mktemp(form) / form, files, labels=[0] * len(files), form=form)
        samples = made.samples.copy()
        samples["num_frames"], samples["height"], samples["width"] = FRAMES, HEIGHT, WIDTH
        write_manifest(
            made.root, split=made.split, classes=made.classes, shards=made.shards, samples=samples, form=form
        )
        found[form] = open_manifest(made.root)
    return found


def test_the_corpus_is_large_and_its_files_differ():
    assert len(STORED) >= 40
    assert len({case.make() for case in STORED.values()}) == len(STORED)


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_frames_file_is_skipped_counted_and_named_and_an_odd_one_is_read_right(splits, form: Form):
    manifest = splits[form]
    config = LoaderConfig(num_workers=0, on_bad_sample="skip")
    skipped: list[str] = []
    with ClipLoader(manifest, clip=CLIP, loader=config, training=False, global_batch_clips=8) as loader:
        for batch in loader.evaluation_batches():
            skipped += batch.skipped
            for place, sample_id in enumerate(batch.sample_ids.tolist()):
                name = manifest.key(sample_id)
                lines = [line for line in batch.skipped if f":{name}: " in line]
                assert batch.weights[place] == (not STORED[name].words), (name, lines)
                assert all(STORED[name].words in line and "\n" not in line and ".tar:" in line for line in lines), lines
                assert len(lines) == bool(STORED[name].words)
                assert batch.clips[place].any() == (not STORED[name].words)
    assert len(skipped) == sum(case.form == form and bool(case.words) for case in STORED.values())


@pytest.mark.parametrize("name", [name for name, case in STORED.items() if not case.words])
def test_an_odd_frames_file_shows_its_pictures(splits, name: str):
    manifest = splits[STORED[name].form]
    sample_id = next(number for number in range(len(manifest)) if manifest.key(number) == name)
    with ShardReader(manifest) as reader:
        source = FramesFile(reader.open(sample_id), manifest.form)
        frames = source.decode(range(FRAMES)).frames
        stored = source.read(range(FRAMES))
    if manifest.form == "raw":
        assert np.array_equal(frames, PIXELS)
        return
    by_pil = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in stored])
    assert np.abs(frames.astype(int) - by_pil).max() <= 2  # two decoders round differently


@pytest.mark.parametrize("form", FORMS)
def test_verify_names_every_bad_frames_file_once(splits, form: Form):
    lines: list[str] = []
    verify(VerifyConfig(root=Path(splits[form].root), decode="all", workers=1), found=lines.append)
    for name, case in STORED.items():
        if case.form == form:
            assert sum(f".tar:{name}: " in line for line in lines) == bool(case.words), (name, lines)


def test_the_first_bad_one_stops_a_loader_that_is_to_stop(splits):
    config = LoaderConfig(num_workers=0)
    with (
        ClipLoader(splits["jpeg"], clip=CLIP, loader=config, training=False, global_batch_clips=8) as loader,
        pytest.raises(DataError, match=r"shard-000000\.tar:empty: "),
    ):
        list(loader.evaluation_batches())
