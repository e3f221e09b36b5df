"""Stream mode: tars without a manifest give batches, the same for the same readers; what is wrong is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from data_shards.clips import ClipConfig
from data_shards.errors import DataError
from data_shards.stream import StreamLoader
from tests.data_shards.packed import make_split
from tests.data_shards.servers import Fault, serving
from tests.data_shards.videos import encode

CLIP = ClipConfig(num_segments=2, crop_size=16, short_side=24)
CLASSES = ["class0", "class1", "class2"]
NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """12 samples in 4 tars, without their manifest."""
    folder = tmp_path_factory.mktemp("stream") / "a set"
    videos = {f"clip_{number}": encode(6, width=32, height=24, seed=number) for number in range(NUM_SAMPLES)}
    make_split(folder, videos, samples_per_shard=3)
    (folder / "manifest.json").unlink()
    (folder / "samples.npy").unlink()
    return folder


def make_loader(folder: Path | str, **options) -> StreamLoader:
    defaults = {
        "classes": CLASSES,
        "clip": CLIP,
        "global_batch_clips": 4,
        "num_workers": 0,
        "shuffle_samples": 3,
        "seed": 5,
    }
    return StreamLoader(f"{folder}/shard-{{000000..000003}}.tar", **{**defaults, **options})


def clips(loader: StreamLoader, start: int, stop: int) -> list[torch.Tensor]:
    return [batch.clips for batch in loader.batches(start, stop)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_an_epoch_of_one_reader_has_each_sample_once_with_its_label(packed):
    loader = make_loader(packed, global_batch_clips=1)
    for _ in range(2):
        labels = [int(batch.labels) for batch in loader.batches(0, NUM_SAMPLES)]
        assert sorted(labels) == sorted(number % 3 for number in range(NUM_SAMPLES))
    batches = list(loader.batches(NUM_SAMPLES, 2 * NUM_SAMPLES))
    assert sorted(int(batch.labels) for batch in batches) == sorted(labels)
    assert [int(batch.labels) for batch in batches] != labels, "another order each epoch"
    assert [int(batch.positions) for batch in batches] == list(range(NUM_SAMPLES, 2 * NUM_SAMPLES))


def test_a_batch_has_the_shape_and_the_accounts_of_the_exact_loader(packed):
    batches = list(make_loader(packed, global_batch_clips=1, shuffle_samples=0).batches(0, NUM_SAMPLES + 1))
    num_bytes = sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert sum(batch.costs["read_bytes"] for batch in batches[:-1]) <= num_bytes
    assert sum(batch.costs["read_bytes"] for batch in batches) >= num_bytes
    (batch,) = make_loader(packed).batches(0, 4)
    assert batch.clips.shape == (4, 2, 3, 16, 16)
    assert batch.clips.dtype == torch.uint8
    assert batch.clips.permute(0, 1, 3, 4, 2).is_contiguous()
    assert batch.weights.tolist() == [1.0] * 4
    costs = batch.costs
    assert costs["read_disk_bytes"] == costs["read_bytes"] > 0
    assert costs["wall_seconds"] == pytest.approx(
        costs["read_seconds"] + costs["decode_seconds"] + costs["augment_seconds"]
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_replays_to_the_same_clips(packed, num_workers):
    with make_loader(packed, num_workers=num_workers) as loader:
        whole = clips(loader, 0, 20)
    with make_loader(packed, num_workers=num_workers) as loader:
        assert same(clips(loader, 12, 16), whole[3:4])
        assert same(clips(loader, 16, 20), whole[4:]), "goes on without replaying"


def test_ranks_read_other_tars(packed):
    seen = []
    for rank in range(2):
        loader = make_loader(packed, rank=rank, world_size=2, global_batch_clips=2)
        batches = list(loader.batches(0, NUM_SAMPLES))
        assert [int(batch.positions) for batch in batches] == list(range(rank, NUM_SAMPLES, 2))
        seen += [batch.clips for batch in batches]
    assert len({clip.numpy().tobytes() for clip in seen}) == NUM_SAMPLES


def test_fewer_tars_than_readers_are_refused(packed):
    with pytest.raises(ValueError, match="4 tars cannot be dealt to 3 ranks x 2 workers"):
        make_loader(packed, world_size=3, global_batch_clips=6, num_workers=2)


def test_positions_that_are_no_whole_batches_are_refused(packed):
    with pytest.raises(ValueError, match="not whole global batches of 4"):
        make_loader(packed).batches(0, 6)


def damaged_set(folder: Path, *, bad_key: str = "") -> Path:
    videos = {f"clip_{number}": encode(6, width=32, height=24, seed=number) for number in range(NUM_SAMPLES)}
    make_split(folder, videos | ({bad_key: b"no video"} if bad_key else {}), samples_per_shard=3)
    return folder


def test_a_bad_sample_is_named_or_counted(tmp_path):
    folder = damaged_set(tmp_path / "damaged", bad_key="clip_4")
    for num_workers in (0, 1):
        with (
            make_loader(folder, num_workers=num_workers) as loader,
            pytest.raises(DataError, match=r"^\S*shard-000001\.tar:clip_4: the video cannot be opened[^\n]*$"),
        ):
            clips(loader, 0, NUM_SAMPLES)
    batches = list(make_loader(folder, on_bad_sample="skip").batches(0, NUM_SAMPLES))
    assert sum(float(batch.weights.sum()) for batch in batches) == NUM_SAMPLES - 1
    (line,) = [line for batch in batches for line in batch.skipped]
    assert "shard-000001.tar:clip_4: the video cannot be opened" in line


def test_a_tar_that_is_cut_is_named_or_counted(tmp_path):
    folder = damaged_set(tmp_path / "cut")
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"shard-000002\.tar: the tar is damaged or cut"):
        clips(make_loader(folder), 0, NUM_SAMPLES)
    batches = list(make_loader(folder, on_bad_sample="skip").batches(0, 2 * NUM_SAMPLES))
    assert sum(float(batch.weights.sum()) for batch in batches) == 2 * NUM_SAMPLES
    assert any("shard-000002.tar: the tar is damaged" in line for batch in batches for line in batch.skipped)


def test_a_tar_that_is_compressed_is_refused_and_not_called_damaged(tmp_path, packed):
    path = tmp_path / "shard.tar.gz"
    path.write_bytes(gzip.compress((packed / "shard-000000.tar").read_bytes()))
    options = {"classes": CLASSES, "clip": CLIP, "global_batch_clips": 1, "num_workers": 0}
    for on_bad_sample in ("raise", "skip"):
        loader = StreamLoader(str(path), on_bad_sample=on_bad_sample, **options)
        with pytest.raises(DataError, match=r"^\S*shard\.tar\.gz: the tar is compressed, [^\n]*: unpack it$"):
            clips(loader, 0, 1)


def test_a_url_that_cannot_be_read_is_refused_at_once_and_not_called_damaged():
    with pytest.raises(ValueError, match=r"^nothing://here: Protocol not known: nothing"):
        make_loader("nothing://here", on_bad_sample="skip")


def test_a_missing_tar_is_the_machines_error(packed):
    loader = StreamLoader(str(packed / "none.tar"), classes=CLASSES, clip=CLIP, global_batch_clips=1, num_workers=0)
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        clips(loader, 0, 1)


def test_a_label_may_be_a_name_and_must_be_a_class(packed):
    with pytest.raises(DataError, match=r"its label \(\.cls\) is '2', neither a class nor 0 to 1"):
        clips(make_loader(packed, classes=CLASSES[:2]), 0, NUM_SAMPLES)


def test_tars_behind_a_url_give_the_same_clips_through_faults(packed):
    pytest.importorskip("aiohttp", reason="reading over http needs aiohttp (pip install 'reelscale[http]')")
    with serving(packed) as server:
        server.fault_of = lambda _path, number: Fault("cut") if number == 0 else None
        assert same(clips(make_loader(server.url), 0, NUM_SAMPLES), clips(make_loader(packed), 0, NUM_SAMPLES))
