"""A collective that does not complete ends in bounded time, in an error that says who did not come and what it does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_shards.clips import ClipConfig
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import open_manifest
from dist_train.activity import Activity, Record, Ticket, main_thread_code, spell_ranks
from dist_train.collectives import Collectives
from dist_train.diagnosis import CollectiveError, diagnose, find_faults, missing_ranks
from dist_train.watchdog import Watchdog, backstop_seconds
from dist_train.world import World
from tests.data_shards.packed import make_split
from tests.ranks import run_ranks

TIMEOUT, INTERVAL, BACKSTOP = 1.5, 0.2, 4.0
Body = Callable[[Collectives], Any]


def _guarded(world: World, body: Body, **options: Any) -> tuple[str, str]:
    """Runs `body(collectives)` under a watchdog; the kind and the words of its error."""
    collectives = Collectives(world)
    collectives.barrier()  # from here on the ranks are in step
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=BACKSTOP))
    try:
        with Watchdog(collectives, **{"timeout_seconds": TIMEOUT, "interval_seconds": INTERVAL, **options}):
            body(collectives)
        said = ("", "")
    except (CollectiveError, ValueError) as error:
        said = (type(error).__name__, str(error))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]
    dist.destroy_process_group()
    return said


def _wait_for(collectives: Collectives, name: str, channel: Any = None) -> None:
    pending = collectives.start_mean_(torch.ones(1), name=name, channel=channel)
    assert pending is not None
    pending.wait()


def _sleeps(world: World) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        collectives.watch.activity.step, collectives.watch.activity.phase = 12, "main"
        if world.rank == 1:
            time.sleep(TIMEOUT + 2.0)
        else:
            _wait_for(collectives, "bucket 3 of 5")

    return _guarded(world, body)


def test_a_rank_that_does_not_come_is_named_with_what_it_does():
    (kind0, said0), _, (kind2, said2) = run_ranks(_sleeps, 3)
    assert kind0 == kind2 == "CollectiveTimeout"
    assert said0 == said2
    assert said0.startswith("step 12, phase main, bucket 3 of 5: rank 1 did not come within 1.5 s: rank 1 (host ")
    assert "has been in step 12, phase main (at test_watchdog.py:" in said0
    assert " in body) for " in said0
    assert "; ranks 0, 2 wait; if it is slow and not stuck, raise exchange.timeout_seconds" in said0


def _is_late(world: World) -> list[str]:
    def body(collectives: Collectives) -> None:
        if world.rank == 1:
            time.sleep(1.0)
        _wait_for(collectives, "bucket 1 of 1")

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_train.watchdog").addHandler(handler)
    assert _guarded(world, body, timeout_seconds=20.0, warning_seconds=0.3) == ("", "")
    return warnings


def test_a_late_rank_is_warned_of_once_and_ends_nothing():
    first, second = run_ranks(_is_late, 2)
    warnings = [line for line in first if line.startswith("bucket")]
    assert second == []
    assert len(warnings) == 1
    assert warnings[0].startswith("bucket 1 of 1: rank 1 has not come for ")
    assert warnings[0].endswith("; rank 0 waits; the job ends when this has lasted 20 s")


def _waits_elsewhere(world: World) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        channel = collectives.new_channel()
        if world.rank == 1:
            _wait_for(collectives, "barrier of a checkpoint")
        else:
            _wait_for(collectives, "bucket 3 of 5", channel)

    return _guarded(world, body)


def test_ranks_in_different_collectives_are_told_apart():
    said = run_ranks(_waits_elsewhere, 3)
    assert {kind for kind, _ in said} == {"CollectiveTimeout"}
    assert len({words for _, words in said}) == 1
    assert "the ranks wait in different collectives, each for the others: " in said[0][1]
    assert "ranks 0, 2 in bucket 3 of 5 (number 1 of group " in said[0][1]
    assert "rank 1 in barrier of a checkpoint (number 1)" in said[0][1]
    assert "rank 1 is at test_watchdog.py:" in said[0][1]


def _ends_in_mid_record(world: World) -> str | None:
    collectives = Collectives(world)
    collectives.watch.activity.loader = lambda: str(1 / 0)
    watchdog = Watchdog(collectives, timeout_seconds=TIMEOUT, interval_seconds=0.4)
    record, in_thread = watchdog._observer.record, threading.Event()

    def slow_record(*, ended: str | None = None) -> Record:
        made = record(ended=ended)
        if threading.current_thread() is watchdog._thread:
            in_thread.set()
            time.sleep(0.2)
        return made

    watchdog._observer.record = slow_record  # type: ignore[method-assign]
    with watchdog, contextlib.suppress(ValueError):
        first = Record.from_json(watchdog._store.get(f"rank/{world.rank}"))
        assert first.loader == "its loader does not say what it does: ZeroDivisionError: division by zero"
        in_thread.wait(5.0)
        raise ValueError
    watchdog._thread.join(5.0)
    return Record.from_json(watchdog._store.get(f"rank/{world.rank}")).ended


def test_the_last_record_of_a_rank_says_how_it_ended_whatever_its_thread_was_at():
    assert run_ranks(_ends_in_mid_record, 2) == ["", ""]


def _asks_for_objects(world: World) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        if world.rank == 0:
            collectives.gather_objects("mine")
        else:
            time.sleep(BACKSTOP + 2.0)

    return _guarded(world, body)


def test_collectives_that_block_in_pytorch_end_with_the_process_groups_own_timeout():
    (kind, said), _ = run_ranks(_asks_for_objects, 2)
    assert kind == "CollectiveTimeout"
    assert said.startswith("gather objects: rank 1 did not come within ")
    assert "rank 0 waits" in said


def _is_stopped(world: World) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        pid = int(collectives.max_(torch.tensor(os.getpid() if world.rank == 1 else 0)))
        if world.rank == 0:
            os.kill(pid, signal.SIGSTOP)
            try:
                _wait_for(collectives, "bucket 1 of 1")
            finally:
                os.kill(pid, signal.SIGCONT)

    return _guarded(world, body)


def test_a_stopped_process_is_known_as_such():
    (kind, said), _ = run_ranks(_is_stopped, 2)
    assert kind == "CollectiveTimeout"
    assert "rank 1 did not come within 1.5 s" in said
    assert "its process is stopped (SIGSTOP, or a debugger); last heard of " in said
    assert "exchange.timeout_seconds" not in said


def _hangs_in_the_loader(world: World, folder: Path) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        if world.rank == 1:
            manifest = open_manifest(folder, check_shards=False)
            clip = ClipConfig(num_segments=2, crop_size=16, short_side=16)
            config = LoaderConfig(num_workers=0)
            loader = ClipLoader(manifest, clip=clip, loader=config, training=False, global_batch_clips=2)
            collectives.watch.activity.loader = loader.doing
            with contextlib.suppress(OSError):  # in the end the test opens the pipe that stands for the shard
                next(loader.evaluation_batches())
        else:
            try:
                _wait_for(collectives, "bucket 1 of 1")
            finally:
                os.close(os.open(folder / "shard-000000.tar", os.O_WRONLY))

    return _guarded(world, body)


def test_a_rank_that_hangs_in_its_loader_is_named_with_shard_and_key(tmp_path):
    make_split(tmp_path / "train", {"v_abc": b"video"})
    shard = tmp_path / "train" / "shard-000000.tar"
    shard.unlink()
    os.mkfifo(shard)  # opening it blocks, as a file server may
    (kind, said), _ = run_ranks(_hangs_in_the_loader, 2, tmp_path / "train")
    assert kind == "CollectiveTimeout"
    assert "rank 1 did not come within 1.5 s" in said
    assert "(reading shard-000000.tar:v_abc (sample 0) for " in said
    assert "s; at local.py:" in said


def _is_killed(world: World, victim: int, tcp: bool) -> tuple[str, str]:
    store = None
    if tcp:
        collectives = Collectives(world)
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world.is_first else None
        port = collectives.broadcast_object(server and server.port)
        store = server or dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)

    def body(collectives: Collectives) -> None:
        collectives.watch.activity.step = 7
        if world.rank == victim:
            time.sleep(3 * INTERVAL)
            os.kill(os.getpid(), signal.SIGKILL)
        _wait_for(collectives, "bucket 2 of 2")

    return _guarded(world, body, store=store)


@pytest.mark.parametrize(("victim", "tcp"), [(1, False), (0, True)], ids=["a rank", "the rank that keeps the store"])
def test_a_killed_process_is_named_at_once_with_what_it_did_last(victim, tcp):
    said = [result for result in run_ranks(_is_killed, 3, victim, tcp, may_die=victim) if result is not None]
    assert len(said) == 2
    assert {kind for kind, _ in said} == {"PeerLost"}
    for _, words in said:
        assert words.startswith(f"step 7, bucket 2 of 2: rank {victim} went away: rank {victim} (host ")
        assert "its process " in words
        assert "ago, in step 7 (at test_watchdog.py:" in words


def _raises(world: World) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        if world.rank == 1:
            raise ValueError("the model has no such layer")
        _wait_for(collectives, "bucket 1 of 1")

    return _guarded(world, body)


def test_an_error_of_another_rank_is_quoted():
    (kind, said), (own_kind, _) = run_ranks(_raises, 2)
    assert (kind, own_kind) == ("PeerLost", "ValueError")
    assert "rank 1 went away: " in said
    assert "it ended with ValueError: the model has no such layer (at test_watchdog.py:" in said
    assert "last heard of" not in said


def _is_told_to_end(world: World) -> list[str]:
    told: list[str] = []

    def body(collectives: Collectives) -> None:
        if world.rank == 1:
            _sleep_until(lambda: bool(told))
        else:
            _wait_for(collectives, "bucket 1 of 1")

    _guarded(world, body, end_process=lambda error: told.append(str(error)))
    return told


def test_a_rank_that_hangs_is_ended_by_its_own_thread_once_the_others_have_found_it():
    first, second = run_ranks(_is_told_to_end, 2)
    assert first == []
    assert "rank 1 did not come within 1.5 s" in second[0]


class _OnDevice:
    """A collective whose wait does not block the host, as NCCL's."""

    def __init__(self, work: Any) -> None:
        self.is_completed = work.is_completed

    def wait(self) -> None:
        """Returns at once."""


def _waits_on_the_device(world: World) -> list[str]:
    told: list[str] = []

    def body(collectives: Collectives) -> None:
        watch = collectives.watch
        assert isinstance(watch, Watchdog)
        watch._host_waits = False
        if world.rank == 0:
            work = dist.all_reduce(torch.ones(1), async_op=True)
            watch.wait(_OnDevice(work), watch.launched("bucket 1 of 1"))
        _sleep_until(lambda: bool(told))

    _guarded(world, body, end_process=lambda error: told.append(str(error)))
    return told


def test_where_the_host_does_not_wait_the_thread_sees_what_is_not_completed():
    for told in run_ranks(_waits_on_the_device, 2):
        assert "bucket 1 of 1: rank 1 did not come within 1.5 s" in told[0]


def _waits_for_host_tensors_beside_nccl(world: World) -> tuple[str, str]:
    def body(collectives: Collectives) -> None:
        collectives.watch._host_waits = False
        if world.rank == 1:
            time.sleep(BACKSTOP + 2.0)
        else:
            _wait_for(collectives, "parameters used")

    return _guarded(world, body)


@pytest.mark.thorough
def test_host_tensors_beside_nccl_end_with_the_process_groups_timeout_and_are_named():
    (kind, said), _ = run_ranks(_waits_for_host_tensors_beside_nccl, 2)
    assert kind == "CollectiveTimeout"
    assert said.startswith("parameters used: rank 1 did not come within ")


def _sleep_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- pure functions ------------------------------------------------------------------------------------------------


def _record(rank: int, started: int = 5, waiting: str = "", **fields: Any) -> Record:
    ticket = Ticket("", started, waiting) if waiting else None
    identity = {"host": f"n{rank}", "pid": 100 + rank, "node": f"node {rank}", "beat": 1, "unix_seconds": time.time()}
    return Record(**{**identity, "rank": rank, "started": {"": started}, "waiting": ticket, **fields})


def _diagnose(*records: Record, **options: Any) -> str:
    found = {record.rank: record for record in records}
    defaults = {"about": found[0], "faults": {}, "happened": "did not come within 60 s"}
    return diagnose(found, len(found), **{**defaults, **options}).message


def test_a_diagnosis_reads_as_one_sentence():
    stuck = _record(
        2,
        started=4,
        step=12,
        phase="main",
        stage="loader_wait",
        stage_seconds=71.2,
        loader="worker 1: reading train-000003.tar:v_abc for 70 s",
    )
    waits = [_record(rank, waiting="bucket 3 of 5", step=12, phase="main") for rank in (0, 1, 3)]
    assert _diagnose(*waits, stuck) == (
        "step 12, phase main, bucket 3 of 5: rank 2 did not come within 60 s: rank 2 (host n2, pid 102) has been in "
        "loader_wait of step 12, phase main (worker 1: reading train-000003.tar:v_abc for 70 s) for 71 s; "
        "ranks 0, 1, 3 wait"
    )


def test_a_rank_that_waits_for_the_culprit_itself_is_not_one():
    said = _diagnose(
        _record(0, started=6, waiting="bucket 3"), _record(1, started=5, waiting="barrier"), _record(2, started=4)
    )
    assert "bucket 3: rank 2 did not come" in said
    assert "; ranks 0, 1 wait" in said


def test_the_same_number_under_two_names_is_a_mismatch():
    said = _diagnose(_record(0, waiting="bucket 3"), _record(1, waiting="barrier"))
    assert "rank 0 in bucket 3 (number 5), rank 1 in barrier (number 5)" in said


def test_when_every_rank_has_come_the_network_is_to_blame():
    said = _diagnose(_record(0, waiting="bucket 3"), _record(1, waiting="bucket 3"), error="Timed out")
    assert "every rank has come, but it did not complete (Timed out): look at the network" in said


def test_where_the_collective_is_unknown_every_place_in_the_code_is_told():
    places = [{"stage": "backward"}, {"stage": "backward"}, {"stage": "forward", "code": "users.py:8 in forward"}]
    said = _diagnose(
        *(_record(rank, stage_seconds=66.0, **place) for rank, place in enumerate(places)), error="Timed out"
    )
    assert said == (
        "a collective did not complete (Timed out): rank 0 (host n0, pid 100) has been in backward for 66 s; "
        "rank 2 (host n2, pid 102) has been in forward (at users.py:8 in forward) for 66 s"
    )


def test_many_culprits_are_summed_up():
    waits = _record(0, waiting="barrier")
    late = [_record(rank, started=4, stage="startup") for rank in range(1, 1536)]
    said = _diagnose(waits, *late)
    assert said.startswith(
        "barrier: ranks 1-1535 did not come within 60 s: rank 1 (host n1, pid 101) has been in startup"
    )
    assert said.endswith("; likewise ranks 5-1535; rank 0 waits")
    assert len(said) < 600


def test_a_watchdog_speaks_before_the_process_group():
    assert all(backstop_seconds(seconds) > 1.05 * seconds + 4 for seconds in (1.0, 600.0))


def test_a_collective_of_some_ranks_is_missed_by_them_only():
    records = {rank: _record(rank, started=4) for rank in range(4)}
    assert missing_ranks(records, 5, Ticket("", 5, "all")) == [0, 1, 2, 3, 4]
    assert missing_ranks(records, 5, Ticket("", 4, "all")) == [4]
    assert missing_ranks(records, 5, Ticket("", 5, "some", members=(1, 3))) == [1, 3]


def test_a_silent_rank_of_another_host_is_found_by_its_beat():
    before = {rank: _record(rank) for rank in range(3)}
    after = {**before, 1: _record(1, beat=2), 2: _record(2, ended="ValueError: no")}
    assert find_faults(after, node="mine", earlier=before, patience_over=False) == {2: "it ended with ValueError: no"}
    assert set(find_faults(after, node="mine", earlier=before, patience_over=True)) == {0, 2}


def test_a_record_survives_the_store():
    record = _record(3, waiting="bucket 1", step=4, loader="worker 0", ended="")
    assert Record.from_json(record.to_json()) == record


def test_ranks_are_spelled_shortly():
    assert spell_ranks([2]) == "rank 2"
    assert spell_ranks([7, 0, 1, 2, 8]) == "ranks 0-2, 7, 8"


def test_the_line_of_the_main_thread_is_that_of_its_own_code_not_a_librarys():
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(main_thread_code()))
    thread.start()
    thread.join()
    assert found[0].startswith("test_watchdog.py:")
    assert found[0].endswith("in test_the_line_of_the_main_thread_is_that_of_its_own_code_not_a_librarys")


def test_collectives_are_counted_by_channel():
    activity = Activity()
    assert [activity.started(name).number for name in ("a", "b")] == [1, 2]
    assert activity.counts() == {"": 2}
