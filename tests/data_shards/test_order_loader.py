"""The real loader on every kind of order: the same clips at any number of ranks and workers, and from any resume."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from data_shards.batch import Batch
from data_shards.clips import ClipConfig, read_clip
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.mixture import Mixture
from data_shards.sample_order import OrderConfig, make_order
from tests.data_shards.packed import make_split
from tests.data_shards.videos import encode

CLIP = ClipConfig(num_segments=2, crop_size=16, short_side=16, horizontal_flip=True)
NUM_CLIPS = 48


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder: Path = tmp_path_factory.mktemp("sets")
    videos = {f"clip_{number}": encode(4, width=24, height=16, seed=number) for number in range(7)}
    first = make_split(folder / "first", videos, labels=[0, 0, 0, 0, 1, 1, 2])
    second = make_split(folder / "second", dict(list(videos.items())[:4]), labels=[2, 1, 0, 0])
    return Mixture([first, second], shares=(0.6, 0.4))


KINDS = {
    "mixture": OrderConfig(),
    "mixture of blocks": OrderConfig(block_samples=2, window_blocks=2),
    "mixture of balanced sets": OrderConfig(balance="classes"),
    "drop_last": OrderConfig(tail="drop_last"),
    "pad": OrderConfig(tail="pad"),
}


def read(
    sets: Mixture, kind: str, legs: Iterable[tuple[int, int, int]], batch: int = 4
) -> list[tuple[int, int, int, float, bytes]]:
    """(position, sample id, label, weight, pixels) of each clip, through legs of (ranks, workers, global batches)."""
    source = sets if kind.startswith("mixture") else sets.manifests[0]
    clips: list[tuple[int, int, int, float, bytes]] = []
    start = 0
    for world_size, workers, steps in legs:
        stop = start + steps * batch
        for rank in range(world_size):
            config = LoaderConfig(order=KINDS[kind], num_workers=workers)
            with ClipLoader(
                source,
                clip=CLIP,
                loader=config,
                training=True,
                global_batch_clips=batch,
                rank=rank,
                world_size=world_size,
                seed=5,
            ) as loader:
                for made in loader.batches(start, stop):
                    clips += rows(made)
        start = stop
    return sorted(clips)


def rows(batch: Batch) -> list[tuple[int, int, int, float, bytes]]:
    columns = (batch.positions, batch.sample_ids, batch.labels, batch.weights)
    pixels = [clip.numpy().tobytes() for clip in batch.clips]
    return list(zip(*(column.tolist() for column in columns), pixels, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_gives_what_the_order_says(sets, kind):
    source = sets if kind.startswith("mixture") else Mixture(sets.manifests[:1])
    order = make_order(source.labels, KINDS[kind], seed=5, global_batch_clips=4, shares=source.shares)
    visits = order.at(np.arange(NUM_CLIPS))
    found = read(sets, kind, [(1, 0, NUM_CLIPS // 4)])
    assert [row[0] for row in found] == list(range(NUM_CLIPS))
    assert [row[1] for row in found] == source.sample_ids(visits.sets, visits.samples).tolist()
    assert [row[3] for row in found] == visits.weights.tolist()
    for position in range(0, NUM_CLIPS, 5):
        number, sample = int(visits.sets[position]), int(visits.samples[position])
        manifest = source.manifests[number]
        seed, epoch = order.set_seeds[number], int(visits.epochs[position])
        clip, _ = read_clip(manifest, sample, clip=CLIP, training=True, seed=seed, epoch=epoch)
        assert found[position][2] == manifest.samples["label"][sample]
        assert found[position][4] == clip.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_at_another_number_of_ranks_gives_the_same_clips(sets, kind):
    expected = read(sets, kind, [(1, 0, NUM_CLIPS // 4)])
    assert read(sets, kind, [(2, 0, 3), (4, 0, 2), (1, 0, 7)]) == expected


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.thorough] if kind != "mixture" else []) for kind in KINDS]
)
def test_worker_processes_give_the_same_clips(sets, kind):
    expected = read(sets, kind, [(1, 0, NUM_CLIPS // 4)])
    assert read(sets, kind, [(1, 2, 5), (1, 1, 7)]) == expected


def test_the_length_of_an_epoch_goes_with_the_tail(sets):
    lengths = {}
    for tail in ("wrap", "drop_last", "pad"):
        config = LoaderConfig(order=OrderConfig(tail=tail), num_workers=0)
        with ClipLoader(sets.manifests[0], clip=CLIP, loader=config, training=True, global_batch_clips=4) as loader:
            lengths[tail] = loader.num_samples
            if tail != "wrap":
                with pytest.raises(ValueError, match="position 2 is not the start of a global batch of 4 clips"):
                    loader.batches(2, 6)
    assert lengths == {"wrap": 7, "drop_last": 4, "pad": 8}


@pytest.mark.parametrize("world_size", [1, 2, 3, 11, 13])
def test_a_padded_evaluation_counts_each_sample_of_all_sets_once_in_as_many_batches_on_every_rank(sets, world_size):
    counted, shapes = [], set()
    config = LoaderConfig(order=OrderConfig(tail="pad"), num_workers=0)
    for rank in range(world_size):
        with ClipLoader(
            sets,
            clip=CLIP,
            loader=config,
            training=False,
            global_batch_clips=2 * world_size,
            rank=rank,
            world_size=world_size,
        ) as loader:
            batches = list(loader.evaluation_batches())
        shapes.add(tuple(len(batch) for batch in batches))
        for row in (row for batch in batches for row in rows(batch)):
            if row[3] > 0:
                counted.append(row[1])
            else:
                assert (row[1], row[2]) == (-1, 0)
                assert not any(row[4])
    assert counted == list(range(len(sets)))
    assert len(shapes) == 1
