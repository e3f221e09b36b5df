"""A worker that dies, hangs or leaks is named and replaced, and what it was at is made again, exactly once."""

from __future__ import annotations

import logging
import os
import random
import signal
from pathlib import Path

import pytest

from data_shards.clips import ClipConfig
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest
from data_shards.order import sample_at
from tests.data_shards.deadly import Deadly, Leaky, Slow, give_maker
from tests.data_shards.packed import make_split
from tests.data_shards.test_loader import contents
from tests.data_shards.videos import encode

CLIP = ClipConfig(num_segments=2, crop_size=24, short_side=32)
VIDEOS = {f"clip_{number:02d}": encode(4, width=40, height=32, seed=number) for number in range(14)}
BAD = int(sample_at(9, seed=0, num_samples=14))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("packed") / "train", VIDEOS, samples_per_shard=5)


@pytest.fixture(scope="module")
def stream(manifest: Manifest) -> list[tuple[int, int, int, bytes]]:
    with make_loader(manifest, num_workers=0) as loader:
        return contents(loader.batches(0, 160))


def make_loader(manifest: Manifest, **config: object) -> ClipLoader:
    return ClipLoader(
        manifest,
        clip=CLIP,
        loader=LoaderConfig(**{"num_workers": 2, "prefetch_batches": 2, **config}),
        training=True,
        global_batch_clips=4,
    )


def running(loader: ClipLoader) -> list[int]:
    """Workers that have made something and still run."""
    return [account.pid for account in loader.accounts if account.ended is None and account.num_batches]


def read(loader: ClipLoader, found: list[tuple[int, int, int, bytes]]) -> None:
    """Adds the clips of a stream to `found`, as far as it comes."""
    for batch in loader.batches(0, 160):
        found += contents([batch])


def test_workers_that_are_killed_at_any_moment_change_nothing(manifest, stream, caplog):
    moments = random.Random(5)
    killed = set()
    with make_loader(manifest) as loader:
        give_maker(loader, Slow)
        found: list[tuple[int, int, int, bytes]] = []
        for number, batch in enumerate(loader.batches(0, 160)):
            found += contents([batch])
            if number % 6 == 2 and number < 34 and (pids := running(loader)):
                killed.add(pid := moments.choice(pids))
                os.kill(pid, signal.SIGKILL)
        accounts = loader.accounts
        assert len(running(loader)) <= 2
    assert found == stream
    assert len(killed) >= 4
    assert {account.pid for account in accounts if account.end == "was killed by SIGKILL"} == killed
    for pid in killed:
        assert f"(pid {pid}) was killed by SIGKILL" in caplog.text
    assert "another takes its place, its batch is made again" in caplog.text


def test_a_worker_that_is_stopped_is_ended_and_its_batch_made_again(manifest, stream, caplog):
    with make_loader(manifest, num_workers=1, worker_timeout_seconds=1.0) as loader:
        give_maker(loader, Slow)
        iterator = loader.batches(0, 80)
        found = contents([next(iterator)])
        pid = running(loader)[0]
        while True:
            os.kill(pid, signal.SIGSTOP)
            if loader.doing().startswith("worker 0: decoding "):
                break
            os.kill(pid, signal.SIGCONT)  # it was between two batches
            found += contents([next(iterator)])
        found += contents(iterator)
        assert [account.end for account in loader.accounts] == ["hung", ""]
    assert found == stream[:80]
    assert f"data worker 0 (pid {pid}) has been decoding shard-" in caplog.text
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("kill", r"was killed by SIGKILL, decoding shard-00000\d.tar:clip_\d\d \(sample \d+\) for "),
        pytest.param("exit", "ended with exit code 9, decoding ", marks=pytest.mark.thorough),
        ("hang", r"has been decoding shard-00000\d.tar:clip_\d\d \(sample \d+\) for 1\.\d s and was ended"),
    ],
)
def test_a_sample_that_ends_its_workers_is_named_in_the_end(manifest, stream, how, said):
    found: list[tuple[int, int, int, bytes]] = []
    with make_loader(manifest, worker_timeout_seconds=1.0) as loader:
        give_maker(loader, Deadly, deadly_sample=BAD, how=how)
        with pytest.raises(RuntimeError, match=said) as caught:
            read(loader, found)
        message = str(caught.value)
        assert message.startswith(f"sample {BAD}, {manifest.describe(BAD)}, has ended 3 data workers, one after the")
        assert "\n" not in message
        assert sum(account.end != "" for account in loader.accounts) >= 3
        assert running(loader) == []
        assert len(list(loader.batches(0, 8))) == 2  # another stream begins with new workers
    assert found == stream[: len(found)]


def test_a_sample_that_ends_its_workers_is_a_bad_sample_where_those_are_skipped(manifest, stream, caplog):
    with make_loader(manifest, on_bad_sample="skip") as loader:
        give_maker(loader, Deadly, deadly_sample=BAD)
        batches = list(loader.batches(0, 40))
        assert sum(account.end != "" for account in loader.accounts) in (3, 4)  # two may be at it at a time
    assert f"sample {BAD}, {manifest.describe(BAD)}, has ended 3 data workers and is skipped from now on" in caplog.text
    clips = contents(batches)
    for number, (position, sample_id, _, pixels) in enumerate(clips):
        assert (position, sample_id) == stream[number][:2]
        assert pixels == (bytes(2 * 3 * 24 * 24) if sample_id == BAD else stream[number][3])
    lines = [line for batch in batches for line in batch.skipped]
    assert len(lines) == sum(sample_id == BAD for _, sample_id, *_ in clips) >= 2
    assert all("ended the worker processes that read it" in line and manifest.key(BAD) in line for line in lines)
    assert sum(float((batch.weights == 0).sum()) for batch in batches) == len(lines)


def test_a_worker_that_leaks_is_replaced_without_a_batch_made_twice(manifest, stream, caplog):
    with make_loader(manifest, num_workers=1) as loader:
        list(loader.batches(0, 4))
        own_mib = loader.accounts[0].peak_bytes >> 20
    with make_loader(manifest, num_workers=1, worker_memory_mib=own_mib + 200) as loader:
        give_maker(loader, Leaky)
        assert contents(loader.batches(0, 80)) == stream[:80]
        accounts = loader.accounts
        assert len(accounts) >= 3
        assert all(account.end == "held too much memory" for account in accounts[:-1])
        assert all(account.num_batches > 1 for account in accounts[:-1])
        assert max(account.peak_bytes for account in accounts) < (own_mib + 300) << 20
        assert sum(account.num_batches for account in accounts) == 20
    assert f"it may hold {own_mib + 200}: another takes its place" in caplog.text


def test_a_bound_that_no_worker_can_keep_is_an_error(manifest):
    with (
        make_loader(manifest, worker_memory_mib=1) as loader,
        pytest.raises(
            RuntimeError, match=r"held \d+ MiB after its first batch, it may hold 1: raise worker_memory_mib"
        ),
    ):
        list(loader.batches(0, 400))


def test_a_mistake_in_the_code_is_raised_where_its_batch_is_due(manifest, stream):
    found: list[tuple[int, int, int, bytes]] = []
    with make_loader(manifest) as loader:
        give_maker(loader, Deadly, deadly_sample=BAD, how="mistake")
        with pytest.raises(
            RuntimeError, match=r"failed: ZeroDivisionError: a mistake in the code \(deadly.py:\d+\)"
        ) as caught:
            read(loader, found)
    assert "\n" not in str(caught.value)
    assert found == stream[:8]


def test_rows_of_each_worker_add_up_to_its_wall_time(manifest):
    with make_loader(manifest) as loader:
        give_maker(loader, Slow)
        for number, _ in enumerate(loader.batches(0, 80)):
            if number == 5:
                os.kill(running(loader)[0], signal.SIGKILL)
        accounts = loader.accounts
    assert len(accounts) == 3
    for account in accounts:
        rows = account.seconds
        assert list(rows) == ["startup", "read", "decode", "augment", "idle", "lost"]
        assert sum(rows.values()) == pytest.approx(account.wall_seconds)
        assert min(rows.values()) >= 0
        assert account.tier_seconds["disk"] == pytest.approx(rows["read"])
        assert account.tier_bytes["disk"] > 0
        assert account.frames_decoded >= account.frames_used > 0


def test_batches_under_way_are_left_when_another_stream_begins(manifest, stream, caplog):
    with make_loader(manifest) as loader, caplog.at_level(logging.WARNING):
        give_maker(loader, Slow)
        for start in (0, 60, 20, 100, 40):
            iterator = loader.batches(start, 160)
            assert contents([next(iterator)]) == stream[start : start + 4]
        assert contents(iterator) == stream[44:160]
    assert caplog.text == ""
