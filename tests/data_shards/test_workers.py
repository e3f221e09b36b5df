"""The parts of the worker pool: requests, the board under deaths at every line, slabs and their return, its size."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.batch import Batch, BatchShape
from data_shards.order import evaluation_positions, rank_positions
from data_shards.workers.board import MAX_REFUSED, Board, Claim
from data_shards.workers.memory import SharedMemory, _cgroup_available, available_bytes, private_bytes
from data_shards.workers.requests import RequestPlan, Span
from data_shards.workers.slabs import LentSlabs
from data_shards.workers.tuning import Size, Tuner, Window, better_size


@given(
    world_size=st.integers(1, 5),
    micro_batches=st.integers(1, 3),
    clips=st.integers(1, 4),
    steps=st.integers(0, 4),
    start=st.integers(0, 100),
)
def test_requests_of_all_ranks_are_the_positions_of_the_stream(world_size, micro_batches, clips, steps, start):
    batch = world_size * micro_batches * clips
    span = Span(start, start + steps * batch)
    seen = []
    for rank in range(world_size):
        plan = RequestPlan(
            training=True, batch_clips=clips, rank=rank, world_size=world_size, micro_batches=micro_batches
        )
        requests = [plan.request(span, number) for number in range(plan.num_requests(span))]
        assert len(requests) == steps * micro_batches
        for step in range(steps):
            expected = rank_positions(start + step * batch, batch, rank, world_size, micro_batches)
            own = requests[step * micro_batches : (step + 1) * micro_batches]
            assert [list(range(one.start, one.start + one.num_clips)) for one in own] == expected.tolist()
        seen += [position for one in requests for position in range(one.start, one.start + one.num_clips)]
    assert sorted(seen) == list(range(start, start + steps * batch))


@given(num_samples=st.integers(0, 30), world_size=st.integers(1, 5), clips=st.integers(1, 7))
def test_requests_of_an_evaluation_are_the_rank_s_part(num_samples, world_size, clips):
    for rank in range(world_size):
        part = evaluation_positions(num_samples, rank, world_size)
        plan = RequestPlan(training=False, batch_clips=clips, rank=rank, world_size=world_size, micro_batches=1)
        span = Span(part.start, part.stop)
        requests = [plan.request(span, number) for number in range(plan.num_requests(span))]
        assert [position for one in requests for position in range(one.start, one.start + one.num_clips)] == list(part)
        assert all(1 <= one.num_clips <= clips for one in requests)


# The board


def new_board(num_requests: int, *, num_slabs: int = 3) -> Board:
    board = Board(num_slabs, 2)
    board.open_slabs(num_slabs)
    board.start_stream(Span(0, num_requests), num_requests)
    return board


def finish(board: Board, worker: int) -> list[int]:
    """What a worker makes until nothing is left, each slab handed over and returned at once."""
    made = []
    while (claim := board.take(worker)) is not None:
        made.append(claim.number)
        board.hold(claim.slab)
        board.free(claim.slab)
    return made


class Death(BaseException):
    """Stands for SIGKILL: nothing of the rest of the function happens, and the lock is released."""


def take_and_die(board: Board, worker: int, lines: int) -> Claim | None:
    """`board.take`, ended after `lines` lines of it; Death where it was."""
    left = lines

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if frame.f_code is not Board.take.__code__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Death
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return board.take(worker)
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("again", [False, True])
def test_a_worker_may_die_at_any_line_of_taking_a_request(again):
    for lines in range(60):
        board = new_board(5)
        taken = [board.take(1)]
        if again:  # what a dead worker had taken is what is taken next
            assert board.give_back(1) == [0]
            taken = []
        try:
            claim = take_and_die(board, 0, lines)
        except Death:
            board.give_back(0)
        else:
            assert claim is not None
            assert lines > 8
            break
        for other in taken:
            assert other is not None
            board.hold(other.slab)
            board.free(other.slab)
        made = [one.number for one in taken if one is not None] + finish(board, 1)
        assert sorted(made) == [0, 1, 2, 3, 4], lines
        assert sum(board._slabs[:, 0] == 1) == 3, lines  # every slab is free in the end
    else:
        pytest.fail("the function never came to its end")


def test_requests_are_taken_in_order_and_those_to_be_made_again_first():
    board = new_board(6)
    first, second = board.take(0), board.take(1)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    assert board.give_back(0) == [0]
    third = board.take(1)
    assert third is not None
    assert (third.number, third.slab) == (0, first.slab)
    assert board.take(1).number == 2
    assert board.take(1) is None  # no slab
    board.hold(second.slab)
    assert board.take(1) is None
    board.free(second.slab)
    assert board.take(1).number == 3


def test_a_new_stream_drops_what_is_not_under_way():
    board = new_board(6)
    old = board.take(0)
    assert board.take(1) is not None
    board.give_back(1)
    stream = board.start_stream(Span(10, 12), 2)
    assert not board.is_current(old.stream)
    assert board.is_current(stream)
    assert board.give_back(0) == []  # of the old stream: not wanted
    assert finish(board, 1) == [0, 1]


def test_the_board_is_shared_with_a_process_that_it_is_sent_to():
    board = new_board(4)
    child = os.fork()
    if child == 0:
        claim = board.take(1)
        os._exit(7 if claim is not None and claim.number == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert board.give_back(1) == [0]


def test_samples_are_refused_up_to_a_number():
    board = new_board(1)
    for sample_id in range(MAX_REFUSED):
        assert board.refuse(sample_id)
    assert not board.refuse(1000)
    assert board.refused() == frozenset(range(MAX_REFUSED))


# Memory and slabs


def test_shared_memory_is_zero_and_no_file():
    memory = SharedMemory(10_000)
    assert memory.num_bytes == 12_288
    assert bytes(memory.buffer) == bytes(12_288)
    descriptor = memory.descriptor
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_cgroups_leave_of_their_limits_counts(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    step = tmp_path / "root" / "job" / "step"
    step.mkdir(parents=True)
    assert _cgroup_available(tmp_path / "root", own) is None
    for folder, limit, used, file_pages in ((step, "max", 10, 0), (step.parent, "1000", 700, 100)):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {file_pages}\n")
    assert _cgroup_available(tmp_path / "root", own) == 400
    assert available_bytes() > 0
    held = private_bytes()
    more = bytearray(os.urandom(1) * (64 << 20))
    assert private_bytes() - held > 50 << 20
    assert len(more)


SHAPE = BatchShape(num_clips=3, sample_shape=(2, 4, 5, 5, 3))


def test_tensors_of_a_batch_do_not_overlap_and_lie_on_pages():
    memory = torch.zeros(SHAPE.num_bytes, dtype=torch.uint8)
    for number, tensor in enumerate(SHAPE.arrays(memory, 3), start=1):
        assert (tensor.data_ptr() - memory.data_ptr()) % 4096 == 0
        assert int((tensor != 0).sum()) == 0
        tensor.fill_(number)
    smaller = SHAPE.arrays(memory, 2)
    assert [tuple(tensor.shape) for tensor in smaller] == [(4, 4, 5, 5, 3), (2,), (2,), (2,), (2,)]
    for number, tensor in enumerate(smaller, start=1):
        assert bool((tensor == number).all())


@pytest.fixture
def returned() -> list[int]:
    return []


@pytest.fixture
def slabs(returned: list[int]) -> LentSlabs:
    return LentSlabs(SHAPE, 2, give_back=returned.append, pin=False)


def test_a_slab_comes_back_with_the_last_tensor_on_it(slabs, returned):
    arrays, _ = slabs.lend(1, 3)
    view = arrays.clips[0].permute(3, 0, 1, 2)
    labels = arrays.labels
    del arrays
    assert returned == []
    assert slabs.lent == {1}
    del view
    assert returned == []
    del labels
    assert returned == [1]
    assert slabs.lent == set()


class FakeEvent:
    """A CUDA event, done when we say so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


def test_a_slab_is_not_used_again_before_the_device_has_copied_it(slabs, returned, monkeypatch):
    events = []

    class Event(FakeEvent):
        def record(self, _stream: object) -> None:
            events.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    arrays, lease = slabs.lend(0, 3)
    lease.used_by(torch.device("cpu"))
    assert events == []
    lease.used_by(torch.device("cuda"))
    assert len(events) == 1
    del arrays, lease
    slabs.collect()
    assert returned == []
    assert slabs.lent == {0}
    assert slabs.cool_down()  # waits for the event
    assert returned == [0]
    assert not slabs.cool_down()


def test_a_batch_that_is_moved_lets_go_of_its_slab(slabs, returned):
    arrays, lease = slabs.lend(0, 3)
    batch = Batch(**arrays._asdict(), costs={}, lease=lease)
    moved = batch.to("meta", non_blocking=True)
    del arrays, batch
    assert moved.lease is None
    assert returned == [0]


def test_pinned_slabs_are_unpinned_when_the_last_is_back(monkeypatch, returned):
    pinned: set[int] = set()

    class Runtime:
        def cudaHostRegister(self, address: int, _num_bytes: int, _flags: int) -> int:
            assert address not in pinned
            pinned.add(address)
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            pinned.remove(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    slabs = LentSlabs(SHAPE, 3, give_back=returned.append, pin=True)
    for slab in (0, 2, 0):
        arrays, lease = slabs.lend(slab, 3)
        assert arrays.clips.data_ptr() in pinned
    assert len(pinned) == 2
    lease.events.append(FakeEvent())
    del slabs
    gc.collect()
    assert len(pinned) == 2
    del arrays
    gc.collect()
    assert pinned == set()
    assert lease.events[0].done


def test_memory_that_cannot_be_pinned_is_said_once(monkeypatch, caplog, returned):
    class Runtime:
        calls = 0

        def cudaHostRegister(self, address: int, num_bytes: int, _flags: int) -> int:
            Runtime.calls += 1
            assert address % 4096 == 0
            assert num_bytes == SHAPE.num_bytes
            ctypes.memset(address, 5, num_bytes)
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    slabs = LentSlabs(SHAPE, 2, give_back=returned.append, pin=True)
    arrays, _ = slabs.lend(0, 3)
    assert bool((arrays.clips == 5).all())
    slabs.lend(1, 3)
    assert Runtime.calls == 1
    assert caplog.text.count("error 2 (see ulimit -l)") == 1


# How many


def window(wait: float, idle: float, *, rate: float = 10.0, workers: int = 2) -> Window:
    return Window(
        seconds=4.0,
        waited_seconds=4.0 * wait,
        worker_seconds=4.0 * workers,
        idle_seconds=4.0 * workers * idle,
        num_batches=round(4 * rate),
    )


MOST = Size(8, 8)


@pytest.mark.parametrize(
    ("wait", "idle", "before", "after"),
    [
        (0.5, 0.0, (2, 2), (4, 2)),  # twice as many would just do
        (0.1, 0.0, (2, 2), (3, 2)),
        (0.9, 0.0, (2, 2), (4, 2)),  # at most doubled
        (0.9, 0.0, (6, 2), (8, 2)),
        (0.9, 0.0, (8, 2), (8, 2)),
        (0.2, 0.5, (2, 2), (2, 4)),  # both wait: batches take unevenly long
        (0.2, 0.5, (2, 8), (3, 8)),
        (0.0, 0.9, (8, 2), (1, 2)),
        (0.0, 0.5, (4, 2), (3, 2)),
        (0.0, 0.1, (4, 2), (4, 2)),
        (0.0, 1.0, (1, 2), (1, 2)),
        (0.03, 0.9, (4, 2), (4, 2)),  # between the two thresholds nothing moves
    ],
)
def test_the_size_goes_with_who_waits(wait, idle, before, after):
    assert better_size(window(wait, idle, workers=before[0]), Size(*before), MOST) == Size(*after)


@given(wait=st.floats(0, 1), idle=st.floats(0, 1), workers=st.integers(1, 8), prefetch=st.integers(1, 8))
@settings(max_examples=200)
def test_the_size_stays_within_its_bounds(wait, idle, workers, prefetch):
    size = better_size(window(wait, idle, workers=workers), Size(workers, prefetch), MOST)
    assert 1 <= size.num_workers <= 8
    assert prefetch <= size.prefetch <= 8


def test_workers_that_did_not_help_are_taken_back_and_not_tried_at_once(caplog):
    tuner = Tuner(num_workers=None, prefetch=2, most=MOST)
    with caplog.at_level(logging.INFO):
        assert tuner.judge(window(0.4, 0.0, rate=10)) == Size(4, 2)
        assert tuner.judge(window(0.4, 0.0, rate=10.1)) == Size(2, 2)
        for _ in range(30):
            assert tuner.judge(window(0.4, 0.0, rate=10)) is None
        assert tuner.judge(window(0.4, 0.0, rate=10)) == Size(4, 2)
        assert tuner.judge(window(0.4, 0.0, rate=18)) == Size(7, 2)
    lines = caplog.text.strip().splitlines()
    assert len(lines) == 4
    assert (
        "loader: 2 -> 4 workers, 2 -> 2 batches ahead each: waited 40% of the last 4.0 s, workers idle 0%" in lines[0]
    )
    assert lines[1].endswith("; 4 gave no more")


def test_what_is_fixed_stays():
    assert Tuner(num_workers=3, prefetch=2, most=MOST).judge(window(0.9, 0.0)) is None
    assert Tuner(num_workers=3, prefetch=None, most=MOST).judge(window(0.9, 0.5)) == Size(3, 4)
    assert Tuner(num_workers=None, prefetch=1, most=MOST).judge(window(0.9, 0.5)) is None


def test_observing_sums_a_window_and_leaves_out_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("data_shards.workers.tuning.perf_counter", lambda: now[0])
    tuner = Tuner(num_workers=None, prefetch=2, most=MOST)
    costs = {"wait_seconds": 0.15, "wall_seconds": 0.4, "idle_seconds": 0.0}
    found = []
    for number in range(100):
        now[0] += 0.2 if number != 30 else 50.0  # an evaluation in between
        found.append(tuner.observe(costs))
    sizes = [(number, size) for number, size in enumerate(found) if size is not None]
    assert sizes[0] == (23, Size(4, 2))  # a second to settle, then 4 s
    assert len(sizes) == 2
    assert sizes[1][0] > 50
    assert math.isclose(now[0], 100 + 99 * 0.2 + 50)
