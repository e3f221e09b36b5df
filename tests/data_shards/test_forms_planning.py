"""The plan: measured on real encodings, its arithmetic, its choice, and the table at 80 columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_shards.clips import ClipConfig
from data_shards.errors import DataError
from data_shards.forms.encoding import EncodingConfig, encode_sample
from data_shards.forms.frames_file import table_bytes
from data_shards.forms.plan_table import describe_plan, name_of
from data_shards.forms.planning import FormCosts, Needs, Plan, candidates, measure_form, plan_forms
from tests.data_shards.videos import encode, pictures

CLIP = ClipConfig(num_segments=4, crop_size=32, short_side=48)
MP4 = FormCosts(
    encoding=EncodingConfig(), stored_megabytes=0.4, read_kilobytes=400, decode_ms=40.0, encode_seconds=0.01
)
SHORT_GOP = FormCosts(
    encoding=EncodingConfig(short_side=256, gop=8),
    stored_megabytes=0.8,
    read_kilobytes=800,
    decode_ms=8.0,
    encode_seconds=1.0,
)
JPEG = FormCosts(
    encoding=EncodingConfig(store_as="jpeg", short_side=256),
    stored_megabytes=7.0,
    read_kilobytes=200,
    decode_ms=4.0,
    encode_seconds=0.5,
)
FEW = replace(JPEG, encoding=replace(JPEG.encoding, frames=32), stored_megabytes=0.75)
RAW = FormCosts(
    encoding=EncodingConfig(store_as="raw", short_side=256),
    stored_megabytes=78.0,
    read_kilobytes=2000,
    decode_ms=1.0,
    encode_seconds=0.4,
)


def plan_for(needs: Needs, *costs: FormCosts) -> Plan:
    return Plan(costs=costs, needs=needs, clip=ClipConfig(), num_measured=16, num_samples=240_000)


def test_the_slower_of_cores_and_storage_is_the_limit():
    needs = Needs(cores=10, storage_megabytes_per_second=100)
    assert MP4.decode_limit(needs) == 250
    assert MP4.storage_limit(needs) == 250
    assert JPEG.clips_per_second(needs) == JPEG.storage_limit(needs) == 500
    assert RAW.clips_per_second(needs) == 50
    assert RAW.clips_per_second(Needs(cores=10)) == 10_000


@pytest.mark.parametrize(
    ("target", "storage", "expected"),
    [
        (200, None, MP4),  # untouched is the smallest and fast enough
        (1000, None, SHORT_GOP),
        (2000, None, JPEG),  # all frames are better than few of them, though these are smaller
        (5000, None, RAW),
        (5000, 1000, JPEG),  # nothing reaches it: the fastest
        (None, 1000, JPEG),
        (None, None, RAW),
    ],
)
def test_the_smallest_form_that_reaches_the_target_is_recommended(target, storage, expected):
    needs = Needs(cores=10, storage_megabytes_per_second=storage, target_clips_per_second=target)
    assert plan_for(needs, MP4, SHORT_GOP, FEW, JPEG, RAW).recommended() is expected


def test_few_frames_are_recommended_where_only_they_reach_the_target():
    needs = Needs(cores=10, target_clips_per_second=2000)
    assert plan_for(needs, MP4, SHORT_GOP, FEW).recommended() is FEW


def test_the_text_fits_80_columns_and_shows_its_arithmetic():
    needs = Needs(cores=64, storage_megabytes_per_second=2000, target_clips_per_second=9000)
    text = describe_plan(plan_for(needs, MP4, SHORT_GOP, JPEG, FEW, RAW))
    assert max(map(len, text.splitlines())) <= 80
    assert "Measured on 16 of 240,000 samples, one core; clips of 8 frames, 224x224" in text
    assert "* jpeg 256                7.000     200    4.00    0.50  16,000  10,000  10,000\n" in text
    assert "* decode: 64 cores x 1000 ms / 4.00 ms = 16,000 clips/s\n" in text
    assert "  storage: 2,000 MB/s / 0.200 MB = 10,000 clips/s\n" in text
    assert "  the whole set: 1,680.0 GB; 31.2 min to encode it on 64 cores\n" in text
    assert "Recommended: --as jpeg --short-side 256\n(the smallest on disk of those that reach 9,000 clips/s)\n" in text


def test_what_cannot_be_reached_is_said_with_the_limit():
    needs = Needs(cores=64, storage_megabytes_per_second=2000, target_clips_per_second=15_000)
    text = describe_plan(plan_for(needs, MP4, JPEG))
    assert "No form reaches 15,000 clips/s. The fastest: --as jpeg --short-side 256\n" in text
    assert "(the storage's MB/s are the limit: 1.50 times as many would do)\n" in text
    text = describe_plan(plan_for(Needs(cores=3, target_clips_per_second=1500), MP4, JPEG))
    assert "(the cores are the limit: 2.00 times as many would do)\n" in text
    text = describe_plan(plan_for(Needs(cores=10, target_clips_per_second=2000), MP4, FEW))
    assert "Recommended: --as jpeg --short-side 256 --frames 32\n" in text
    assert "none with all frames does" in text


def test_names_are_short():
    names = [name_of(costs.encoding) for costs in (MP4, SHORT_GOP, JPEG, FEW, RAW)]
    assert names == ["mp4, untouched", "mp4 256, gop 8", "jpeg 256", "jpeg 256, 32 frames", "raw 256"]


def test_a_measurement_counts_what_a_clip_reads():
    video = encode(40)
    for encoding in (EncodingConfig(), EncodingConfig(store_as="raw"), EncodingConfig(store_as="raw", frames=8)):
        measured = measure_form(video, encoding, clip=CLIP)
        assert measured.stored_bytes == len(encode_sample(video, encoding).payload)
        if encoding.store_as == "mp4":
            assert measured.read_bytes == len(video)
        else:
            assert measured.read_bytes == table_bytes(encoding.frames or 40) + 4 * 64 * 48 * 3
        assert measured.decode_ms > 0
        assert measured.encode_seconds > 0


def test_every_form_is_measured():
    calls: list[tuple[int, int]] = []
    videos = [encode(12, seed=seed) for seed in range(2)]
    plan = plan_forms(
        [lambda video=video: video for video in videos] + [lambda: b"no video"],
        encoding=EncodingConfig(store_as="jpeg", short_side=24, frames=4),
        needs=Needs(cores=2),
        num_samples=77,
        clip=CLIP,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [name_of(costs.encoding) for costs in plan.costs] == [
        "mp4, untouched", "mp4 24, gop 8", "jpeg 24", "jpeg 24, 4 frames", "raw 24", "raw 24, 4 frames",
    ]  # fmt: skip
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (plan.num_measured, plan.num_samples) == (2, 77)
    assert plan.rejected[0].startswith("not a video")
    assert "Left out: 1 sample that cannot be packed: not a video" in describe_plan(plan)


def test_measuring_leaves_the_threads_as_they_were():
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads + 1)
        measure_form(pictures(1, 28, 28), EncodingConfig(store_as="raw"), clip=CLIP)
        assert torch.get_num_threads() == num_threads + 1
    finally:
        torch.set_num_threads(num_threads)


def test_pictures_are_measured_as_frames_only():
    stills = candidates(EncodingConfig(store_as="raw"), pictures(1, 28, 28))
    assert [name_of(encoding) for encoding in stills] == ["jpeg", "raw"]
    several = candidates(EncodingConfig(store_as="raw"), pictures(5, 28, 28))
    assert [name_of(encoding) for encoding in several] == ["jpeg", "jpeg, 32 frames", "raw", "raw, 32 frames"]
    assert measure_form(pictures(1, 28, 28), stills[0], clip=CLIP).stored_bytes > 0


def test_a_source_without_a_good_sample_is_refused():
    with pytest.raises(DataError, match="none of 1 samples can be packed, the first because: not a video"):
        plan_forms([lambda: b"x"], encoding=EncodingConfig(), needs=Needs(cores=1), num_samples=5)


@pytest.mark.parametrize("fields", [{"cores": 0}, {"cores": 1, "storage_megabytes_per_second": -1.0}])
def test_needs_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match=r"plan: .* must be positive"):
        Needs(**fields)


def test_a_sample_that_is_not_there_is_left_out_of_the_measurement(tmp_path):
    samples = [(tmp_path / "absent.png").read_bytes, lambda: pictures(1, 28, 28)]
    plan = plan_forms(samples, encoding=EncodingConfig(), needs=Needs(cores=1), num_samples=2, clip=CLIP)
    assert plan.num_measured == 1
    assert plan.rejected == (f"{tmp_path}/absent.png cannot be read: No such file or directory",)
