"""The loader's stream is the same whoever makes it, wherever it starts; what goes wrong arrives as one clear error."""

import pickle
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from data_shards.batch import Batch
from data_shards.clips import ClipConfig, read_clip
from data_shards.errors import DataError
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest
from data_shards.order import sample_at
from data_shards.sample_order import OrderConfig
from data_shards.worker import BATCH_COST_NAMES, BatchMaker
from tests.data_shards.packed import damage, make_split
from tests.data_shards.videos import encode

CLIP = ClipConfig(num_segments=3, crop_size=24, short_side=32, horizontal_flip=True)
VIDEOS = {f"clip_{number:02d}": encode(8, width=40, height=32, seed=number) for number in range(14)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("packed") / "train", VIDEOS, samples_per_shard=5)


@pytest.fixture
def own_manifest(tmp_path: Path) -> Manifest:
    """One that a test may damage."""
    return make_split(tmp_path / "train", VIDEOS, samples_per_shard=5)


def make_loader(
    manifest: Manifest,
    *,
    training: bool = True,
    batch: int = 4,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
    **config: object,
) -> ClipLoader:
    return ClipLoader(
        manifest,
        clip=CLIP,
        loader=LoaderConfig(**{"num_workers": 0, **config}),
        seed=3,
        training=training,
        global_batch_clips=batch,
        rank=rank,
        world_size=world_size,
        micro_batches=micro_batches,
    )


def train_batches(manifest: Manifest, start: int, stop: int, **options: object) -> list[Batch]:
    with make_loader(manifest, **options) as loader:
        return list(loader.batches(start, stop))


def contents(batches: Iterable[Batch]) -> list[tuple[int, int, int, bytes]]:
    """(position, sample id, label, pixels) of each clip, whatever the batches."""
    return [
        (int(batch.positions[i]), int(batch.sample_ids[i]), int(batch.labels[i]), batch.clips[i].numpy().tobytes())
        for batch in batches
        for i in range(len(batch))
    ]


@pytest.fixture(scope="module")
def stream(manifest: Manifest) -> list[tuple[int, int, int, bytes]]:
    """Two epochs and a half, made in this process."""
    return contents(train_batches(manifest, 0, 36))


def test_the_stream_is_what_order_and_read_clip_say(manifest, stream):
    for position, sample_id, label, pixels in stream:
        assert sample_id == sample_at(position, seed=3, num_samples=14)
        assert label == manifest.samples[sample_id]["label"]
        clip, _ = read_clip(manifest, sample_id, clip=CLIP, training=True, seed=3, epoch=position // 14)
        assert clip.numpy().tobytes() == pixels
    assert [position for position, *_ in stream] == list(range(36))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_make_the_same_stream(manifest, stream, num_workers):
    assert contents(train_batches(manifest, 0, 36, num_workers=num_workers, prefetch_batches=3)) == stream


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(manifest, stream, num_workers):
    with make_loader(manifest, num_workers=num_workers) as loader:
        for start in (0, 4, 13, 21, 32):
            stop = start + (36 - start) // 4 * 4
            assert contents(loader.batches(start, stop)) == stream[start:stop]


def test_ranks_and_micro_batches_share_the_same_stream(manifest, stream):
    for world_size, micro_batches in ((1, 3), (2, 1), (2, 3), (6, 2)):
        ranks = [
            train_batches(manifest, 0, 36, batch=12, rank=rank, world_size=world_size, micro_batches=micro_batches)
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {3 * micro_batches}
        assert {len(batch) for batches in ranks for batch in batches} == {12 // world_size // micro_batches}
        assert sorted(clip for batches in ranks for clip in contents(batches)) == stream


def test_a_block_shuffle_reaches_each_sample_in_workers(manifest):
    batches = train_batches(manifest, 0, 28, order=OrderConfig(block_samples=3, window_blocks=2), num_workers=1)
    samples = [sample_id for _, sample_id, *_ in contents(batches)]
    assert sorted(samples[:14]) == sorted(samples[14:]) == list(range(14))
    positions = range(28)
    expected = sample_at(list(positions), seed=3, num_samples=14, block_samples=3, window_blocks=2)
    assert samples == expected.tolist()


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (5, 0), (16, 0), (1, 2), (2, 2)])
def test_evaluation_sees_each_sample_once_and_in_order(manifest, num_workers, world_size):
    seen = []
    for rank in range(world_size):
        batch = 4 * world_size
        with make_loader(
            manifest, training=False, batch=batch, rank=rank, world_size=world_size, num_workers=num_workers
        ) as loader:
            batches = list(loader.evaluation_batches())
            assert contents(loader.evaluation_batches()) == contents(batches)
        assert all(len(batch) == 4 for batch in batches[:-1])
        seen += contents(batches)
    assert [sample_id for _, sample_id, *_ in seen] == list(range(14))
    for _, sample_id, label, pixels in seen:
        clip, _ = read_clip(manifest, sample_id, clip=CLIP, training=False)
        assert (label, pixels) == (manifest.samples[sample_id]["label"], clip.numpy().tobytes())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_flatten_to_channels_last_frames_without_a_copy(manifest, num_workers):
    (batch,) = train_batches(manifest, 0, 4, num_workers=num_workers)
    assert batch.clips.shape == (4, 3, 3, 24, 24)
    assert batch.clips.dtype == torch.uint8
    for moved in (batch, batch.to("cpu"), batch.to("meta"), batch.to("cpu", non_blocking=True)):
        frames = moved.clips.flatten(0, 1)
        assert frames.is_contiguous(memory_format=torch.channels_last)
        assert frames.untyped_storage()._cdata == moved.clips.untyped_storage()._cdata
    assert batch.to("meta").labels.device.type == "meta"
    assert batch.to("meta").costs == batch.costs
    assert batch.to("meta").positions.tolist() == batch.positions.tolist()
    assert batch.num_bytes == 4 * (3 * 3 * 24 * 24 + 8 + 4)
    assert len(batch) == 4
    assert batch.weights.tolist() == [1.0] * 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_arrives_as_one_line_when_its_batch_is_due(own_manifest, num_workers):
    bad = int(sample_at(9, seed=3, num_samples=14))
    damage(own_manifest, bad)
    with make_loader(own_manifest, num_workers=num_workers, prefetch_batches=2) as loader:
        good = []
        with pytest.raises(DataError) as caught:
            good.extend(loader.batches(0, 28))  # type: ignore[arg-type]
        message = str(caught.value)
        assert own_manifest.describe(bad) in message
        assert "crc32" in message
        assert "\n" not in message
        assert caught.type is DataError
    with make_loader(own_manifest) as loader:
        iterator = loader.batches(0, 28)
        assert [position for position, *_ in contents([next(iterator), next(iterator)])] == list(range(8))
        with pytest.raises(DataError):
            next(iterator)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_skipped_sample_keeps_its_slot_with_weight_zero_and_is_named(own_manifest, stream, num_workers):
    bad = int(sample_at(9, seed=3, num_samples=14))
    damage(own_manifest, bad)
    batches = train_batches(own_manifest, 0, 12, num_workers=num_workers, on_bad_sample="skip")
    assert [batch.weights.tolist() for batch in batches] == [[1.0] * 4, [1.0] * 4, [1.0, 0.0, 1.0, 1.0]]
    assert [batch.costs["skipped"] for batch in batches] == [0, 0, 1]
    (line,) = batches[2].skipped
    assert f"{own_manifest.describe(bad)}: " in line
    assert batches[0].skipped == batches[1].skipped == []
    clips = contents(batches)
    assert clips[9] == (9, bad, own_manifest.samples[bad]["label"], bytes(3 * 3 * 24 * 24))
    assert clips[:9] + clips[10:] == stream[:9] + stream[10:12]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_shard_that_the_machine_cannot_read_is_never_skipped(own_manifest, num_workers, policy):
    own_manifest.shard_path(0).unlink()
    with (
        make_loader(own_manifest, training=False, num_workers=num_workers, on_bad_sample=policy) as loader,
        pytest.raises(OSError, match=r"shard-000000\.tar:clip_00") as caught,
    ):
        list(loader.evaluation_batches())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_costs_of_each_worker_add_up_to_its_wall_time(manifest, num_workers):
    started = time.perf_counter()
    batches = train_batches(manifest, 0, 80, num_workers=num_workers)
    elapsed = time.perf_counter() - started
    totals = dict.fromkeys(range(-1, 2), 0.0)
    for batch in batches:
        costs = batch.costs
        assert set(costs) == set(BATCH_COST_NAMES)
        parts = sum(costs[f"{name}_seconds"] for name in ("read", "decode", "augment", "idle"))
        assert parts == pytest.approx(costs["wall_seconds"], rel=1e-9, abs=1e-9)
        assert min(costs[f"{name}_seconds"] for name in ("read", "decode", "augment")) > 0
        assert costs["idle_seconds"] >= 0
        assert costs["frames_used"] == 12
        assert costs["read_bytes"] == sum(int(manifest.samples["size"][i]) for i in batch.sample_ids)
        totals[int(costs["worker"])] += costs["wall_seconds"]
    assert {int(batch.costs["worker"]) for batch in batches} == ({0, 1} if num_workers else {-1})
    assert max(totals.values()) < elapsed


def test_a_worker_waiting_for_its_next_request_is_idle(manifest):
    with make_loader(manifest, num_workers=1, prefetch_batches=1) as loader:
        iterator = loader.batches(0, 32)
        next(iterator)
        time.sleep(0.8)
        assert max(batch.costs["idle_seconds"] for batch in iterator) > 0.3


def test_leaving_a_stream_early_does_not_leak_into_the_next(manifest, stream):
    with make_loader(manifest, num_workers=2) as loader:
        for batch in loader.batches(0, 36):
            assert contents([batch]) == stream[:4]
            break
        assert contents(loader.batches(8, 16)) == stream[8:16]
        older = loader.batches(0, 36)
        next(older)
        newer = loader.batches(4, 12)
        assert contents([next(newer)]) == stream[4:8]
        with pytest.raises(RuntimeError, match="this stream of the loader has ended"):
            next(older)
        assert contents([next(newer)]) == stream[8:12]


def test_a_stream_draws_no_global_random_numbers(manifest):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train_batches(manifest, 0, 8, num_workers=1)
    train_batches(manifest, 0, 8)
    assert torch.equal(torch.rand(3), expected)


def test_batches_that_are_kept_stay_as_they_were(manifest, stream):
    with make_loader(manifest, num_workers=2, prefetch_batches=1) as loader:
        batches = list(loader.batches(0, 36))  # more than there are slabs
        iterator = loader.batches(0, 36)
        first = next(iterator)
        later = [contents([batch]) for batch in iterator]
    assert contents(batches) == stream
    assert contents([first]) == stream[:4]  # also after the workers have ended
    assert [clip for clips in later for clip in clips] == stream[4:]


def test_memory_of_a_batch_is_used_again_once_nobody_has_it(manifest):
    with make_loader(manifest, num_workers=1, prefetch_batches=1) as loader:
        places = {batch.clips.data_ptr() for batch in loader.batches(0, 120)}
    assert len(places) <= 3


def test_close_ends_the_workers_and_the_stream(manifest):
    loader = make_loader(manifest, num_workers=2)
    iterator = loader.batches(0, 400)
    next(iterator)
    accounts = loader.accounts
    assert loader.num_workers == 2
    loader.close()
    assert len(accounts) == 2
    assert all(account.ended is not None and account.end == "" for account in accounts)
    assert not any(Path(f"/proc/{account.pid}").exists() for account in accounts)
    with pytest.raises(RuntimeError, match="close"):
        next(iterator)
    loader.close()
    assert len(list(loader.batches(0, 8))) == 2  # a new stream starts new workers
    loader.close()


def test_workers_are_sent_a_folder_and_not_the_samples(manifest):
    with make_loader(manifest, order=OrderConfig(balance="classes")) as loader:
        assert len(_sent(loader._maker)) < 3000


def _sent(maker: BatchMaker) -> bytes:
    """What a worker is sent of it, but for the shared memory."""
    return pickle.dumps({**maker.__getstate__(), "activity": None})


def test_too_little_memory_is_said_before_a_worker_dies_of_it(manifest, monkeypatch):
    monkeypatch.setattr("data_shards.workers.room.available_bytes", lambda: 10_000)
    with make_loader(manifest, num_workers=1) as loader, pytest.raises(RuntimeError, match="lower num_workers"):
        next(loader.batches(0, 8))
    assert len(train_batches(manifest, 0, 8)) == 2  # in this process no shared memory is used


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: make_loader(m).batches(0, 10), "not a whole number of global batches of 4 clips; stop at 8"),
        (lambda m: make_loader(m).batches(8, 4), "positions 8 to 4 are not"),
        (lambda m: make_loader(m).batches(-4, 4), "positions -4 to 4 are not"),
        (lambda m: make_loader(m).evaluation_batches(), "training=False"),
        (lambda m: make_loader(m, training=False).batches(0, 4), "training=True"),
        (lambda m: make_loader(m, batch=6, world_size=4), "multiple of 4, for example 8"),
        (lambda m: make_loader(m, rank=2, world_size=2), "rank 2 does not exist"),
        (lambda m: LoaderConfig(num_workers=-1, prefetch_batches=0), "num_workers is -1.*prefetch_batches is 0"),
        (lambda m: LoaderConfig(num_workers="some"), "num_workers is 'some'"),
        (lambda m: LoaderConfig(worker_timeout_seconds=0), "worker_timeout_seconds is 0"),
        (lambda m: LoaderConfig(on_bad_sample="ignore"), "on_bad_sample is 'ignore'"),
    ],
)
def test_misuse_is_said_at_once(manifest, call, message):
    with pytest.raises(ValueError, match=message):
        call(manifest)
