"""The collectives on real ranks: values, types, gradients, names, process sets, join, and what goes wrong."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train.horovod as hvd
from dist_train.horovod.context import required
from dist_train.horovod.engine.execution import reducescatter_rows
from tests.ranks import run_ranks

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def run(function: Callable[..., Any], size: int = 3, *args: Any) -> list[Any]:
    """`function(*args)` on `size` ranks between init and shutdown."""
    return run_ranks(_initialised, size, function, args)


def _initialised(world, function, args):
    hvd.init()
    try:
        assert (hvd.rank(), hvd.size()) == (world.rank, world.world_size)
        return function(*args)
    finally:
        hvd.shutdown()


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(hvd.HorovodInternalError) as raised:
        function(*args, **kwargs)
    return str(raised.value)


# Values


def _reductions():
    rank, size = hvd.rank(), hvd.size()
    for dtype in (*FLOATS, *INTEGERS):
        of_rank = [torch.tensor([[1, 2, 7], [r, r + 1, 5]]).to(dtype) for r in range(size)]
        mine, stacked = of_rank[rank], torch.stack(of_rank).double()
        for op, expected in (
            (hvd.Sum, stacked.sum(0)),
            (hvd.Min, stacked.amin(0)),
            (hvd.Max, stacked.amax(0)),
            (hvd.Product, stacked.prod(0)),
            (hvd.Average, stacked.mean(0) if dtype.is_floating_point else stacked.mean(0).trunc()),
        ):
            result = hvd.allreduce(mine, op=op)
            assert result.dtype == dtype
            assert torch.equal(result, expected.to(dtype)), (dtype, op)
        assert torch.equal(mine, of_rank[rank])
        scaled = hvd.allreduce(mine, op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0)
        halves = stacked * 0.5 if dtype.is_floating_point else (stacked * 0.5).trunc()
        assert torch.equal(scaled, (halves.sum(0) * 3).to(dtype)), dtype
    assert hvd.allreduce(torch.tensor([-5 - rank**2]), op=hvd.Average).item() == -6  # of -6.67
    assert hvd.allreduce(torch.tensor([rank == 1, False]), op=hvd.Sum).tolist() == [True, False]
    assert hvd.allreduce(torch.empty(0, 3)).shape == (0, 3)
    with pytest.warns(DeprecationWarning, match="replaced with `op`"):
        assert hvd.allreduce(torch.ones(1), average=False).item() == size
    in_place = torch.full((2,), float(rank))
    assert hvd.allreduce_(in_place, op=hvd.Sum) is not None
    assert in_place.tolist() == [3.0, 3.0]
    group = hvd.grouped_allreduce([torch.ones(2), torch.tensor([rank]), torch.ones(3)], op=hvd.Sum)
    assert [tensor.tolist() for tensor in group] == [[3.0, 3.0], [3], [3.0, 3.0, 3.0]]
    pair = [torch.ones(1), torch.ones(1) * rank]
    hvd.grouped_allreduce_(pair)
    assert [tensor.item() for tensor in pair] == [1.0, 1.0]
    combined = hvd.allreduce(torch.tensor([1.0, 0.0]), op=hvd.Adasum)
    torch.testing.assert_close(combined, torch.tensor([1.0, 0.0]))


def test_reductions_of_every_dtype_have_horovods_values():
    run(_reductions)


def _movements():
    rank, size = hvd.rank(), hvd.size()
    for dtype in (*FLOATS, *INTEGERS, torch.bool):
        gathered = hvd.allgather(torch.full((rank, 2), rank % 2, dtype=dtype))  # rank 0 has no row
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.tensor([[1, 1], [0, 0], [0, 0]], dtype=dtype))
        for root in range(size):
            assert torch.equal(
                hvd.broadcast(torch.tensor([rank == root], dtype=dtype), root), torch.ones(1, dtype=dtype)
            )
        sent = torch.arange(2 * size).reshape(size, 2).to(dtype)
        assert torch.equal(hvd.alltoall(sent), sent[rank].repeat(size, 1))
    equal, empty = hvd.grouped_allgather([torch.tensor([rank]), torch.empty(0, 2)])
    assert (equal.tolist(), empty.shape) == ([0, 1, 2], (0, 2))
    into = torch.tensor([float(rank)])
    hvd.broadcast_(into, 2)
    assert into.item() == 2.0
    rows, received = hvd.alltoall(torch.arange(3) + 10 * rank, splits=[0, rank, 1])
    expected = {0: [], 1: [10, 20, 21], 2: [0, 11, 22]}[rank]
    assert (rows.tolist(), received.tolist(), received.dtype) == (
        expected,
        [[0] * 3, [0, 1, 2], [1] * 3][rank],
        torch.int32,
    )


def test_gathering_broadcasting_and_alltoall_move_every_dtype():
    run(_movements)


def _scatters():
    rank = hvd.rank()
    assert reducescatter_rows(5, 3) == [2, 2, 1]
    for dtype in (*FLOATS, *INTEGERS):
        tensor = torch.arange(10).reshape(5, 2).to(dtype)
        part = tensor.split([2, 2, 1])[rank]
        assert torch.equal(hvd.reducescatter(tensor, op=hvd.Sum), part * 3)
        assert torch.equal(hvd.reducescatter(tensor), part)
        assert torch.equal(hvd.reducescatter(tensor, op=hvd.Sum, prescale_factor=2.0, postscale_factor=2.0), part * 12)
        assert torch.equal(tensor, torch.arange(10).reshape(5, 2).to(dtype))
    few, even = hvd.grouped_reducescatter([torch.ones(1), torch.ones(3)], op=hvd.Sum)
    assert (few.tolist(), even.tolist()) == ([3.0] if rank == 0 else [], [3.0])


def test_reducescatter_gives_the_first_ranks_the_larger_parts():
    run(_scatters)


# Gradients


def _gradients():
    rank, size = hvd.rank(), hvd.size()

    def gradient(function: Callable[[torch.Tensor], torch.Tensor], rows: int = 3) -> list[float]:
        leaf = torch.ones(rows, requires_grad=True)
        output = function(leaf)
        (output * (rank + 1)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.tolist()

    assert gradient(lambda x: hvd.allreduce(x, op=hvd.Sum)) == [6.0] * 3
    assert gradient(lambda x: hvd.allreduce(x, prescale_factor=3.0)) == [6.0] * 3
    assert gradient(lambda x: hvd.grouped_allreduce([x, x], op=hvd.Sum)[1]) == [6.0] * 3
    assert gradient(hvd.allgather, rank + 1) == [2.0] * (rank + 1)
    assert gradient(lambda x: hvd.grouped_allgather([x, x])[0], rank) == [2.0] * rank
    assert gradient(lambda x: hvd.broadcast(x, 1)) == [2.0 if rank == 1 else 0.0] * 3
    assert gradient(hvd.alltoall) == [1.0, 2.0, 3.0]
    assert gradient(lambda x: hvd.alltoall(x, splits=[1, 0, 1])[0]) == [1.0, 3.0, 0.0]
    assert gradient(lambda x: hvd.reducescatter(x, op=hvd.Sum)) == [3.0, 6.0, 9.0]
    assert gradient(lambda x: hvd.reducescatter(x, postscale_factor=2.0), 4) == [2.0, 2.0, 4.0, 6.0]
    assert size == 3
    with pytest.raises(NotImplementedError, match="op=Max has no gradient"):
        gradient(lambda x: hvd.allreduce(x, op=hvd.Max))


def test_gradients_are_horovods():
    run(_gradients)


# Names and handles


def _names():
    rank = hvd.rank()
    for _ in range(2):  # the second time by number
        order = [0, 1, 2, 3] if rank == 0 else [3, 1, 0, 2]
        tensors = {i: torch.full((i + 1,), float(i)) for i in order}
        handles = {i: hvd.allreduce_async_(tensors[i], name=f"t{i}", op=hvd.Sum) for i in order}
        for i in range(4):
            assert hvd.synchronize(handles[i]) is not None
            assert tensors[i].tolist() == [3.0 * i] * (i + 1)
            assert hvd.poll(hvd.allreduce_async(torch.ones(1), name="late")) in (True, False)
            hvd.barrier()
        assert hvd.synchronize(handles[0]) is None  # fetched before
    if rank == 0:
        hvd.allreduce_async(torch.ones(1), name="twice")
        with pytest.raises(ValueError, match="'twice' was asked for while another of that name is under way"):
            hvd.allreduce_async(torch.ones(1), name="twice")
    hvd.barrier()
    if rank > 0:
        hvd.allreduce_async(torch.ones(1), name="twice")
    hvd.barrier()
    handle = hvd.allreduce_async(torch.ones(1), name="twice", op=hvd.Sum)
    while not hvd.poll(handle):
        time.sleep(0.001)
    assert hvd.synchronize(handle).item() == 3.0


def test_named_collectives_match_in_any_order_and_a_name_is_under_way_once():
    run(_names)


def _sparse():
    rank = hvd.rank()
    mine = torch.sparse_coo_tensor([[rank, 3]], [1.0, 3.0], (5,))
    total = hvd.sparse_allreduce_async(mine, "s", hvd.Sum)().to_dense()
    mean = hvd.sparse_allreduce_async(mine, "s", hvd.Average)().to_dense()
    assert total.tolist() == [1.0, 1.0, 1.0, 9.0, 0.0]
    torch.testing.assert_close(mean, total / 3)


def test_sparse_tensors_are_summed():
    run(_sparse)


# Mistakes


def _mistakes():
    rank = hvd.rank()
    x = torch.ones(2)
    shapes = error_of(hvd.allreduce, torch.ones(2 + rank % 2), name="s")
    found = [
        shapes,
        error_of(hvd.allreduce, x.double() if rank == 2 else x, name="d"),
        error_of(hvd.allreduce, x, op=rank, name="o"),
        error_of(hvd.broadcast, x, root_rank=rank, name="r"),
        error_of(hvd.allreduce, x, prescale_factor=1.0 + rank, name="f"),
        error_of(hvd.allgather, torch.ones(1, 1 + rank), name="g"),
        error_of(hvd.grouped_allreduce, [x] * (1 + rank), name="n"),
    ]
    assert shapes == "Mismatched tensor shapes in allreduce 's': ranks 0, 2 sent [2]; rank 1 sent [3]."
    with pytest.raises(ValueError, match="required to be contiguous"):
        hvd.allreduce(torch.ones(2, 3).t())
    with pytest.raises(ValueError, match="is not supported"):
        hvd.allreduce(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="root rank 3 is not in the process set"):
        hvd.broadcast(x, 3)
    with pytest.raises(ValueError, match="even multiple of the number of workers: 4 rows, 3 ranks"):
        hvd.alltoall(torch.ones(4))
    with pytest.raises(ValueError, match="32-bit integer elements"):
        hvd.alltoall(x, splits=torch.ones(3))
    with pytest.raises(ValueError, match="Sum of splits entries is greater"):
        hvd.alltoall(x, splits=[1, 1, 1])
    with pytest.raises(ValueError, match="supersedes average"):
        hvd.allreduce(x, average=True, op=hvd.Sum)
    if rank == 1:  # one rank's own mistake does not leave the others waiting
        with pytest.raises(ValueError, match="greater than the first dimension"):
            hvd.alltoall(x, splits=[2, 2, 2], name="one")
        found.append("")
    else:
        found.append(error_of(hvd.alltoall, x, splits=[1, 1, 0], name="one"))
    assert hvd.allreduce(x).tolist() == [1.0, 1.0]  # all is well afterwards
    return found


def test_a_mismatch_raises_on_every_rank_in_the_same_words():
    first, second, third = run(_mistakes)
    assert first[:-1] == second[:-1] == third[:-1]
    assert first[-1] == third[-1]
    assert "rank 1: Sum of splits" in first[-1]


# Join


def _join():
    rank = hvd.rank()
    last = []
    for first in range(3):
        hvd.allreduce(torch.ones(2), name="known")
        if rank != first:
            assert hvd.allreduce(torch.full((2,), 3.0), name="known").tolist() == [2.0, 2.0]
            a = hvd.allreduce_async(torch.tensor([3, 3]), op=hvd.Sum, name="a")
            b = hvd.grouped_allreduce_async([torch.ones(3), torch.ones(1)], op=hvd.Sum, name="b")
            assert hvd.synchronize(a).tolist() == [6, 6]
            assert [tensor.tolist() for tensor in hvd.synchronize(b)] == [[2.0, 2.0, 2.0], [2.0]]
            assert f"rank {first} has joined" in error_of(hvd.allgather, torch.ones(1))
            assert f"rank {first} has joined" in error_of(hvd.broadcast, torch.ones(1), rank, "b")
        last.append(hvd.join())
        assert last[-1] != first
        assert hvd.allgather(torch.tensor([rank])).tolist() == [0, 1, 2]  # unnamed, after unequal numbers of calls
    return last


def test_joined_ranks_contribute_zeros_and_all_learn_who_was_last():
    first, second, third = run(_join)
    assert first == second == third


# Process sets


def _process_sets():
    rank = hvd.rank()
    pair = hvd.add_process_set([2, 0])
    assert (pair.ranks, pair.size(), pair.included()) == ([0, 2], 2, rank != 1)
    assert hvd.global_process_set.ranks == [0, 1, 2]
    with pytest.raises(ValueError, match="duplicate process set"):
        hvd.add_process_set([0, 2])
    if rank == 1:
        with pytest.raises(ValueError, match=r"Rank 1 is not a member of the provided process set \[0, 2\]"):
            hvd.allreduce(torch.ones(1), process_set=pair)
        with pytest.raises(ValueError, match="not part of"):
            pair.rank()
    else:
        x = torch.tensor([float(rank + 1)], requires_grad=True)
        total = hvd.allreduce(x, op=hvd.Sum, process_set=pair)
        total.backward()
        assert (pair.rank(), total.item(), x.grad.item()) == (rank // 2, 4.0, 2.0)
        assert hvd.broadcast(torch.tensor([rank]), 2, process_set=pair).item() == 2
        assert hvd.allgather(torch.tensor([rank]), process_set=pair).tolist() == [0, 2]
        assert hvd.alltoall(torch.tensor([rank, rank + 1]), process_set=pair).tolist() == [rank // 2, 2 + rank // 2]
        assert hvd.reducescatter(torch.ones(3), op=hvd.Sum, process_set=pair).tolist() == [2.0] * (2 - rank // 2)
        hvd.barrier(pair)
    overlapping = hvd.add_process_set(hvd.ProcessSet([1, 2]))
    handles = []
    if rank != 1:
        handles.append(hvd.allreduce_async(torch.ones(1), op=hvd.Sum, name="x", process_set=pair))
    handles.append(hvd.allreduce_async(torch.ones(1), op=hvd.Sum, name="x"))
    if rank != 0:
        handles.insert(0, hvd.allreduce_async(torch.ones(1), op=hvd.Sum, name="x", process_set=overlapping))
    assert sorted(hvd.synchronize(handle).item() for handle in handles) == [[2, 3], [2, 3], [2, 2, 3]][rank]
    assert "process sets" in error_of(hvd.add_process_set, [0, 1] if rank else [0])
    assert hvd.remove_process_set(pair)
    assert pair.process_set_id is None
    assert not hvd.remove_process_set(pair)
    with pytest.raises(ValueError, match="does not exist, or has not been registered"):
        hvd.allreduce(torch.ones(1), process_set=pair)
    again = hvd.add_process_set([0, 2])
    if rank != 1:
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=again).item() == 2.0


def test_process_sets_come_and_go():
    run(_process_sets)


def _static_sets_and_a_part_of_the_world(world):
    with pytest.raises(ValueError, match=r"Horovod has not been initialized; use hvd.init\(\)."):
        hvd.rank()
    with pytest.raises(ValueError, match=r"Horovod has not been initialized; use hvd.init\(\)."):
        hvd.allreduce(torch.ones(1))
    ends, middle = hvd.ProcessSet([0, 2]), hvd.ProcessSet([1])
    with pytest.raises(ValueError, match="process_sets entry number 1 is wrong: Attempted to add a duplicate"):
        hvd.init(process_sets=[ends, hvd.ProcessSet([2, 0])])
    assert not hvd.is_initialized()
    hvd.init(process_sets=[ends, middle])
    hvd.init()
    mine = middle if world.rank == 1 else ends
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=mine).item() == mine.size()
    assert (hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()) == (world.rank, 3, 0, 1)
    assert hvd.is_homogeneous()
    hvd.shutdown()
    assert not hvd.is_initialized()
    if world.rank == 0:
        with pytest.raises(ValueError, match="only the ranks in comm may call it"):
            hvd.init(comm=[2, 1])
    else:
        hvd.init(comm=[2, 1])
        assert (hvd.rank(), hvd.size(), hvd.local_rank()) == (2 - world.rank, 2, 2 - world.rank)
        assert hvd.broadcast(torch.tensor([world.rank]), 0).item() == 2
        hvd.shutdown()


def test_init_takes_process_sets_and_a_part_of_the_world_and_can_be_called_again():
    run_ranks(_static_sets_and_a_part_of_the_world, 3)


# Ends


def _leaving_at_different_times():
    rank = hvd.rank()
    pair = hvd.add_process_set([0, 1])
    if rank == 2:
        return ""
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=pair).item() == 2.0
    return error_of(hvd.allreduce, torch.ones(1))


def test_a_rank_may_leave_early_and_only_what_needs_it_fails():
    first, second, third = run(_leaving_at_different_times)
    assert third == ""
    assert "rank 2 has shut down." in first
    assert "rank 2 has shut down." in second


def _disappearing():
    if hvd.rank() == 2:
        required().engine._channel.socket.shutdown(socket.SHUT_RDWR)
        return ""
    message = error_of(hvd.allreduce, torch.ones(1))
    assert message == error_of(hvd.allreduce, torch.ones(1))
    return message


def test_a_rank_that_is_gone_is_named_on_every_other():
    first, second, _ = run(_disappearing)
    assert first == second
    assert "rank 2 is gone" in first


def _stalling(world):
    os.environ |= {"HOROVOD_STALL_CHECK_TIME_SECONDS": "0.1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "1.5"}
    hvd.init()
    message = "" if world.rank == 1 else error_of(hvd.allreduce, torch.ones(1), name="lonely")
    if world.rank == 1:
        while not required().engine.closed:
            time.sleep(0.01)
    hvd.shutdown()
    return message


def test_a_stalled_collective_ends_with_the_ranks_that_are_missing():
    first, second, third = run_ranks(_stalling, 3)
    assert first == third
    assert "allreduce.lonely waits for rank 1" in first
    assert second == ""


# Timeline, alone


def _timeline(world, folder):
    os.environ |= {"HOROVOD_TIMELINE": f"{folder}/0.json", "HOROVOD_TIMELINE_MARK_CYCLES": "1"}
    hvd.init()
    hvd.allreduce(torch.ones(1), name="first")
    written_so_far = "ALLREDUCE" in Path(folder, "0.json").read_text() if world.rank == 0 else None
    hvd.start_timeline(f"{folder}/1.json")
    hvd.barrier()  # rank 0 has begun
    hvd.allreduce(torch.ones(1), name="second")
    hvd.stop_timeline()
    hvd.allreduce(torch.ones(1), name="third")
    hvd.shutdown()
    return written_so_far


def test_the_timeline_is_a_chrome_trace_of_negotiation_and_exchange(tmp_path):
    assert run_ranks(_timeline, 2, str(tmp_path)) == [True, None]
    for number, name in enumerate(("first", "second")):
        events = json.loads((tmp_path / f"{number}.json").read_text())
        rows = {event["pid"]: event["args"].get("name") for event in events if event["name"] == "process_name"}
        spans = {event["name"]: event for event in events if event["ph"] == "X"}
        assert f"allreduce.{name}" in rows.values()
        others = {"allreduce.first", "allreduce.second", "allreduce.third"} - {f"allreduce.{name}"}
        assert not others & set(rows.values())
        assert rows[spans["ALLREDUCE"]["pid"]] == f"allreduce.{name}"
        negotiated = spans["NEGOTIATE_ALLREDUCE"]
        assert negotiated["ts"] + negotiated["dur"] == pytest.approx(spans["ALLREDUCE"]["ts"], abs=0.01)
        assert ("CYCLE_START" in {event["name"] for event in events}) == (number == 0)


def _alone(world):
    hvd.init()
    assert (hvd.rank(), hvd.size(), hvd.local_size(), hvd.cross_size()) == (0, 1, 1, 1)
    assert hvd.allreduce(torch.tensor([2.0])).item() == 2.0
    assert hvd.allgather(torch.ones(2, 1)).shape == (2, 1)
    assert hvd.alltoall(torch.ones(2), splits=[1])[1].tolist() == [1]
    assert hvd.reducescatter(torch.ones(2)).tolist() == [1.0, 1.0]
    assert hvd.join() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hvd.barrier()
    hvd.shutdown()
    assert (hvd.gloo_built(), hvd.ddl_built(), hvd.ccl_built()) == (True, False, False)


def test_one_process_without_a_launcher_is_a_world():
    run_ranks(_alone, 1)
