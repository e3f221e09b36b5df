"""Packed sets through webdataset's own pipeline."""

from __future__ import annotations

import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

import data_shards
from data_shards import webdataset_decoder
from data_shards.decode import Video
from data_shards.errors import DataError
from data_shards.forms.base import Form
from data_shards.forms.encoding import EncodingConfig, encode_sample
from data_shards.pack import PackConfig, pack
from data_shards.sampling import segment_frames
from tests.data_shards.files import put
from tests.data_shards.videos import encode

SOURCES = {f"take{number}": encode(12 + number, seed=number) for number in range(3)}
EIGHT = partial(segment_frames, num_segments=8)


def packed(folder: Path, config: EncodingConfig) -> str:
    """The sources, packed as a set of three classes; returns the name of its only tar."""
    for number, (key, video) in enumerate(SOURCES.items()):
        put(folder / "source" / f"class{number}" / f"{key}.mp4", video)
    pack(
        PackConfig(
            source=folder / "source", destination=folder / "packed", encoding=config, val_fraction=0.0, workers=1
        )
    )
    (tar,) = (folder / "packed" / "train").glob("*.tar")
    return str(tar)


def read(tar: str, handler: object) -> dict[str, dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(wds.WebDataset(tar, shardshuffle=False).decode(handler))
    return {sample["__key__"].rsplit("/", 1)[-1]: sample for sample in samples}


@pytest.mark.parametrize(("form", "member"), [("raw", "frames"), ("jpeg", "frames"), ("mp4", "mp4")])
def test_webdataset_gives_the_stored_frames_beside_its_own_members(tmp_path: Path, form, member):
    samples = read(packed(tmp_path, EncodingConfig(store_as=form)), webdataset_decoder())
    assert samples.keys() == SOURCES.keys()
    for number, (key, video) in enumerate(SOURCES.items()):
        expected = Video(video).decode(range(12 + number)).frames
        found = samples[key][member]
        assert found.dtype == np.uint8
        assert found.shape == expected.shape
        assert form == "jpeg" or np.array_equal(found, expected)
        assert samples[key]["cls"] == number
        assert samples[key]["json"]["num_frames"] == 12 + number


@pytest.mark.parametrize("form", ["raw", "mp4"])
def test_only_chosen_frames_are_decoded(tmp_path: Path, form: Form):
    samples = read(packed(tmp_path, EncodingConfig(store_as=form)), webdataset_decoder(EIGHT))
    for number, (key, video) in enumerate(SOURCES.items()):
        expected = Video(video).decode(EIGHT(12 + number)).frames
        assert np.array_equal(samples[key]["frames" if form == "raw" else "mp4"], expected)


def test_the_decoder_travels_to_worker_processes():
    handler = pickle.loads(pickle.dumps(webdataset_decoder(EIGHT)))
    frames = encode_sample(SOURCES["take0"], EncodingConfig(store_as="raw")).payload
    assert handler(".frames", frames).shape == (8, 48, 64, 3)
    assert handler(".cls", b"3") is None


def test_a_damaged_member_is_an_error_and_no_array():
    damaged = bytearray(encode_sample(SOURCES["take0"], EncodingConfig(store_as="raw")).payload)
    damaged[60] ^= 1
    with pytest.raises(DataError, match="the table of the frames file is damaged"):
        webdataset_decoder()(".frames", bytes(damaged))


def test_the_package_offers_the_decoder_and_nothing_by_accident():
    assert data_shards.webdataset_decoder is webdataset_decoder
    with pytest.raises(AttributeError, match="webdataset_encoder"):
        _ = data_shards.webdataset_encoder  # type: ignore[attr-defined]
