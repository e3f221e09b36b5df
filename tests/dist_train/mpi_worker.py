"""What the ranks of the MPI tests run: `mpirun -n N python -P -m tests.dist_train.mpi_worker OUT.json all`.

Each case calls one collective on a group of MPI's and on one of Gloo's in the same processes and compares the bits;
where Gloo has no such collective or dtype, the answer is worked out from all ranks' inputs. The inputs are small whole
numbers, whose sums and products no order of addition rounds. This file imports no MPI, so that a test may list cases.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, *COMPLEX)
LENGTHS = (0, 1, 1031)
OPS = {name: getattr(dist.ReduceOp, name) for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")}

Case = Callable[[Any, torch.dtype, bool], list[torch.Tensor]]


def values(rank: int, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """What `rank` gives: whole numbers from 1 to 3 (no order of multiplying them rounds or overflows)."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(
        0 if dtype == torch.bool else 1, 2 if dtype == torch.bool else 4, shape, generator=generator
    ).to(dtype)


def reduced(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction worked out in one process."""
    if parts[0].dtype == torch.bool:
        whole = torch.stack(parts).to(torch.uint8)
        answer = {"SUM": whole.amax, "MAX": whole.amax, "BOR": whole.amax}.get(op, whole.amin)(0)
        return (whole.sum(0) % 2 if op == "BXOR" else answer).bool()
    answer = parts[0].clone()
    for part in parts[1:]:
        if op in ("SUM", "AVG"):
            answer = answer + part
        elif op == "PRODUCT":
            answer = answer * part
        elif op in ("MIN", "MAX"):
            answer = (torch.minimum if op == "MIN" else torch.maximum)(answer, part)
        else:
            answer = {"BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor}[op](answer, part)
    if op == "AVG":
        answer.div_(len(parts), rounding_mode=None if answer.is_floating_point() or answer.is_complex() else "trunc")
    return answer


def fits(dtype: torch.dtype, op: str) -> bool:
    """Whether the backend has to reduce `dtype` by `op`."""
    if op in ("BAND", "BOR", "BXOR"):
        return dtype in INTEGERS or dtype == torch.bool
    if dtype in COMPLEX:
        return op == "SUM"
    return op != "AVG" or dtype != torch.bool


def _finish(work: Any, is_async: bool) -> None:
    if is_async:
        assert work is not None
        work.wait()


class Suite:
    """The cases, on the group under test and on Gloo's."""

    def __init__(self, mpi: Any, gloo: Any) -> None:
        self.mpi, self.gloo = mpi, gloo
        self.rank, self.size = mpi.rank(), mpi.size()

    def all(self, dtype: torch.dtype, *shape: int, seed: int = 0) -> list[torch.Tensor]:
        """Every rank's values."""
        return [values(rank, dtype, *shape, seed=seed) for rank in range(self.size)]

    def compare(self, run: Callable[[Any], list[torch.Tensor]], expected: list[torch.Tensor], *, gloo: bool) -> None:
        """Runs under MPI, and under Gloo where it can, and asserts that the bits are equal."""
        mine, answers = run(self.mpi), {"worked out": expected}
        if gloo:
            answers["Gloo"] = run(self.gloo)
        for name, answer in answers.items():
            for got, want in zip(mine, answer, strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got, want), f"got {got}, {name} {want}"

    # Reductions: (dtype, op, async)

    def all_reduce(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        for length in LENGTHS if op == "SUM" else LENGTHS[-1:]:
            expected = reduced(self.all(dtype, length), op)

            def run(group: Any, length: int = length) -> list[torch.Tensor]:
                tensor = values(self.rank, dtype, length)
                _finish(dist.all_reduce(tensor, OPS[op], group=group, async_op=is_async), is_async)
                return [tensor]

            self.compare(run, [expected], gloo=_gloo_reduces(dtype, op))

    def all_reduce_strided(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        expected = reduced([v.t() for v in self.all(dtype, 7, 5)], op)

        def run(group: Any) -> list[torch.Tensor]:
            tensor = values(self.rank, dtype, 7, 5).t()
            _finish(dist.all_reduce(tensor, OPS[op], group=group, async_op=is_async), is_async)
            assert not tensor.is_contiguous()
            return [tensor]

        self.compare(run, [expected], gloo=False)

    def all_reduce_coalesced(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        expected = [reduced(self.all(dtype, n, seed=n), op) for n in (3, 17)]

        def run(group: Any) -> list[torch.Tensor]:
            tensors = [values(self.rank, dtype, n, seed=n) for n in (3, 17)]
            options = dist.AllreduceCoalescedOptions()
            options.reduceOp = OPS[op]
            group.allreduce_coalesced(tensors, options).wait()
            return tensors

        self.compare(run, expected, gloo=False)

    def reduce(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        root = self.size - 1

        def run(group: Any) -> list[torch.Tensor]:
            tensor = values(self.rank, dtype, 33)
            _finish(dist.reduce(tensor, root, OPS[op], group=group, async_op=is_async), is_async)
            return [tensor] if self.rank == root else []

        expected = [reduced(self.all(dtype, 33), op)] if self.rank == root else []
        self.compare(run, expected, gloo=_gloo_reduces(dtype, op))

    def reduce_scatter(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        lengths = [3 + 2 * rank for rank in range(self.size)]  # uneven
        start = sum(lengths[: self.rank])
        whole = reduced(self.all(dtype, sum(lengths)), op)

        def run(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(lengths[self.rank], dtype=dtype)
            parts = list(values(self.rank, dtype, sum(lengths)).split(lengths))
            _finish(dist.reduce_scatter(output, parts, OPS[op], group=group, async_op=is_async), is_async)
            return [output]

        self.compare(run, [whole[start : start + lengths[self.rank]]], gloo=False)

    def reduce_scatter_tensor(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        whole = reduced(self.all(dtype, self.size * 5, 3), op)

        def run(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(5, 3, dtype=dtype)
            tensor = values(self.rank, dtype, self.size * 5, 3)
            _finish(dist.reduce_scatter_tensor(output, tensor, OPS[op], group=group, async_op=is_async), is_async)
            return [output]

        self.compare(run, [whole[self.rank * 5 : (self.rank + 1) * 5]], gloo=_gloo_reduces(dtype, op))

    # Moves: (dtype, async)

    def broadcast(self, dtype: torch.dtype, is_async: bool) -> None:
        for length in LENGTHS:

            def run(group: Any, length: int = length) -> list[torch.Tensor]:
                tensor = values(self.rank, dtype, length)
                _finish(dist.broadcast(tensor, self.size - 1, group=group, async_op=is_async), is_async)
                return [tensor]

            self.compare(run, [values(self.size - 1, dtype, length)], gloo=_gloo_moves(dtype))

    def all_gather(self, dtype: torch.dtype, is_async: bool) -> None:
        for length in LENGTHS:

            def run(group: Any, length: int = length) -> list[torch.Tensor]:
                parts = [torch.zeros(length, dtype=dtype) for _ in range(self.size)]
                _finish(dist.all_gather(parts, values(self.rank, dtype, length), group, is_async), is_async)
                return parts

            self.compare(run, self.all(dtype, length), gloo=_gloo_moves(dtype))

    def all_gather_uneven(self, dtype: torch.dtype, is_async: bool) -> None:
        def run(group: Any) -> list[torch.Tensor]:
            parts = [torch.zeros(rank + 1, dtype=dtype) for rank in range(self.size)]
            _finish(dist.all_gather(parts, values(self.rank, dtype, self.rank + 1), group, is_async), is_async)
            return parts

        self.compare(run, [values(rank, dtype, rank + 1) for rank in range(self.size)], gloo=False)

    def all_gather_into_tensor(self, dtype: torch.dtype, is_async: bool) -> None:
        for inside in (False, True):

            def run(group: Any, inside: bool = inside) -> list[torch.Tensor]:
                whole = torch.zeros(self.size * 4, 3, dtype=dtype)
                part = whole[self.rank * 4 : (self.rank + 1) * 4] if inside else torch.zeros(4, 3, dtype=dtype)
                part.copy_(values(self.rank, dtype, 4, 3))
                _finish(dist.all_gather_into_tensor(whole, part, group, is_async), is_async)
                return [whole]

            self.compare(run, [torch.cat(self.all(dtype, 4, 3))], gloo=_gloo_moves(dtype))

    def gather(self, dtype: torch.dtype, is_async: bool) -> None:
        def run(group: Any) -> list[torch.Tensor]:
            parts = [torch.zeros(9, dtype=dtype) for _ in range(self.size)] if self.rank == 1 else None
            _finish(dist.gather(values(self.rank, dtype, 9), parts, 1, group, is_async), is_async)
            return parts or []

        self.compare(run, self.all(dtype, 9) if self.rank == 1 else [], gloo=_gloo_moves(dtype))

    def scatter(self, dtype: torch.dtype, is_async: bool) -> None:
        def run(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(9, dtype=dtype)
            parts = self.all(dtype, 9) if self.rank == 1 else None
            _finish(dist.scatter(output, parts, 1, group, is_async), is_async)
            return [output]

        self.compare(run, [values(self.rank, dtype, 9)], gloo=_gloo_moves(dtype))

    def all_to_all(self, dtype: torch.dtype, is_async: bool) -> None:
        def run(group: Any) -> list[torch.Tensor]:
            outputs = [torch.zeros(2 * self.rank + 1, dtype=dtype) for _ in range(self.size)]
            inputs = [values(self.rank, dtype, 2 * to + 1, seed=to) for to in range(self.size)]
            _finish(dist.all_to_all(outputs, inputs, group, is_async), is_async)
            return outputs

        expected = [values(rank, dtype, 2 * self.rank + 1, seed=self.rank) for rank in range(self.size)]
        self.compare(run, expected, gloo=False)

    def all_to_all_single(self, dtype: torch.dtype, is_async: bool) -> None:
        def even(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(self.size * 2, 3, dtype=dtype)
            _finish(
                dist.all_to_all_single(
                    output, values(self.rank, dtype, self.size * 2, 3), group=group, async_op=is_async
                ),
                is_async,
            )
            return [output]

        expected = torch.cat([v[2 * self.rank : 2 * self.rank + 2] for v in self.all(dtype, self.size * 2, 3)])
        self.compare(even, [expected], gloo=_gloo_moves(dtype))
        sent = list(range(self.size))  # `to` rows to each

        def split(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(self.size * self.rank, 3, dtype=dtype)
            tensor = values(self.rank, dtype, sum(sent), 3)
            received = [self.rank] * self.size
            _finish(dist.all_to_all_single(output, tensor, received, sent, group, is_async), is_async)
            return [output]

        start = sum(sent[: self.rank])
        expected = torch.cat([v[start : start + self.rank] for v in self.all(dtype, sum(sent), 3)])
        self.compare(split, [expected], gloo=_gloo_moves(dtype))

    def messages(self, dtype: torch.dtype, is_async: bool) -> None:
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size

        def run(group: Any) -> list[torch.Tensor]:
            got = torch.zeros(50, dtype=dtype)
            mine = values(self.rank, dtype, 50)
            if is_async:
                operations = [
                    dist.P2POp(dist.isend, mine, after, group, 3),
                    dist.P2POp(dist.irecv, got, before, group, 3),
                ]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()
            elif self.rank % 2:
                dist.send(mine, after, group, 7)
                dist.recv(got, before, group, 7)
            else:
                dist.recv(got, before, group, 7) if before % 2 or before > self.rank else None
                dist.send(mine, after, group, 7)
                if not (before % 2 or before > self.rank):
                    dist.recv(got, before, group, 7)
            return [got]

        self.compare(run, [values(before, dtype, 50)], gloo=False)

    # Once each

    def any_source(self) -> None:
        """Rank 0 receives from whoever sends."""
        for group in (self.mpi, self.gloo):
            if self.rank:
                dist.send(torch.full((3,), float(self.rank)), 0, group)
                continue
            senders = set()
            for _ in range(self.size - 1):
                got = torch.zeros(3)
                sender = dist.recv(got, None, group)
                assert got.tolist() == [sender] * 3
                senders.add(sender)
            assert senders == set(range(1, self.size))

    def objects(self) -> None:
        """Pickled objects through every collective that takes them."""
        mine = {"rank": self.rank, "text": "x" * (100 + 37 * self.rank)}
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, self.mpi)
        assert [o["rank"] for o in everyone] == list(range(self.size))
        shared = [mine if self.rank == 0 else None]
        dist.broadcast_object_list(shared, 0, self.mpi)
        assert shared[0]["rank"] == 0
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, gathered, 0, self.mpi)
        assert gathered is None or gathered == everyone
        got: list[Any] = [None]
        dist.scatter_object_list(got, everyone if self.rank == 0 else None, 0, self.mpi)
        assert got[0] == mine

    def barrier(self) -> None:
        """Nobody leaves before all have come."""
        dist.barrier(self.mpi)
        work = dist.barrier(self.mpi, async_op=True)
        work.wait()

    def subgroups(self) -> None:
        """A group of some ranks, in another order, which the others do not take part in; two that overlap."""
        backwards = dist.new_group([self.size - 1, 0], backend="mpi4py", use_local_synchronization=False)
        everyone = dist.new_group(list(range(self.size)), backend="mpi4py")
        tensor = torch.tensor([float(self.rank)])
        if self.rank in (0, self.size - 1):
            work = dist.all_reduce(tensor, group=backwards, async_op=True)
            other = torch.ones(1)
            dist.all_reduce(other, group=everyone)
            work.wait()
            assert tensor.item() == self.size - 1
            assert other.item() == self.size
            gathered = [torch.zeros(1) for _ in range(2)]
            dist.all_gather(gathered, torch.tensor([float(self.rank)]), backwards)
            assert sorted(t.item() for t in gathered) == [0.0, self.size - 1.0]
            dist.destroy_process_group(backwards)
        else:
            dist.all_reduce(torch.ones(1), group=everyone)
        dist.destroy_process_group(everyone)

    def local_subgroups(self) -> None:
        """Groups that only their members make, at the same time."""
        half = [rank for rank in range(self.size) if rank % 2 == self.rank % 2]
        group = dist.new_group(half, backend="mpi4py", use_local_synchronization=True)
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == len(half)
        dist.destroy_process_group(group)

    def futures(self) -> None:
        """Futures of work under way and done, with callbacks that call collectives themselves."""
        tensor = torch.ones(1000)
        work = dist.all_reduce(tensor, group=self.mpi, async_op=True)
        doubled = work.get_future().then(lambda future: future.value()[0] * 2)
        assert torch.equal(doubled.wait(), torch.full((1000,), 2.0 * self.size))
        work.wait()
        assert work.get_future().value()[0] is tensor
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0] is tensor

        def again(future: Any) -> torch.Tensor:
            value = future.value()[0]
            dist.all_reduce(value, group=self.mpi)
            return value

        chained = dist.all_reduce(torch.ones(3), group=self.mpi, async_op=True).get_future().then(again)
        assert chained.wait().tolist() == [float(self.size) ** 2] * 3

    def threads(self) -> None:
        """Many operations outstanding at once, waited for in another order and by several threads."""
        import threading

        tensors = [torch.full((500 * (k + 1),), float(k)) for k in range(12)]
        works = [dist.all_reduce(tensor, group=self.mpi, async_op=True) for tensor in tensors]
        waiters = [threading.Thread(target=work.wait) for work in reversed(works)]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
        assert all(torch.equal(t, torch.full_like(t, float(k * self.size))) for k, t in enumerate(tensors))

    def pieces(self) -> None:
        """Tensors so large that one operation is several of MPI's, several at a time, with a small one after them."""
        length = self.size * (5 << 18) + 3  # of 4 bytes: a piece and a quarter a rank
        tensors = [values(self.rank, torch.int32, length, seed=seed) for seed in range(2)] + [torch.ones(1)]
        works = [dist.all_reduce(tensor, group=self.mpi, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()
        for seed in range(2):
            assert torch.equal(tensors[seed], reduced(self.all(torch.int32, length, seed=seed), "SUM"))
        dist.broadcast(tensors[0], 0, self.mpi)
        dist.reduce(tensors[1], 0, group=self.mpi)
        if self.rank == 0:
            assert torch.equal(tensors[1], reduced(self.all(torch.int32, length, seed=1), "SUM") * self.size)

    def progress(self) -> None:
        """A collective completes while the program never waits for it."""
        import time

        work = dist.all_reduce(torch.ones(1 << 20), group=self.mpi, async_op=True)
        for _ in range(3000):
            if work.is_completed():
                return
            time.sleep(0.01)
        raise AssertionError("not complete after 30 s without a wait")

    def rounding(self) -> None:
        """Half-precision sums of any numbers are as near as additions in that type can be; AVG and PREMUL_SUM."""
        everyone = [torch.randn(4001, generator=torch.Generator().manual_seed(rank)) for rank in range(self.size)]
        for dtype in (torch.float16, torch.bfloat16):
            exact = torch.stack([part.to(dtype).double() for part in everyone]).sum(0)
            scale = torch.stack([part.to(dtype).double().abs() for part in everyone]).sum(0)
            tensor = everyone[self.rank].to(dtype)
            dist.all_reduce(tensor, group=self.mpi)
            reference = everyone[self.rank].to(dtype)
            dist.all_reduce(reference, group=self.gloo)
            bound = self.size * torch.finfo(dtype).eps * scale
            assert ((tensor.double() - exact).abs() <= bound).all()
            if self.size == 2:
                assert torch.equal(tensor, reference)
        tensor = torch.ones(5)
        dist.all_reduce(tensor, dist._make_nccl_premul_sum(2.5), group=self.mpi)
        assert tensor.tolist() == [2.5 * self.size] * 5

    def ddp(self) -> None:
        """Steps of DistributedDataParallel, plain and with a hook that sends bfloat16, as over Gloo."""

        def compress(group, bucket):  # no annotations: DDP compares them with its own types
            work = dist.all_reduce(bucket.buffer().bfloat16().div_(self.size), group=group, async_op=True)
            return work.get_future().then(lambda future: future.value()[0].float())

        for hook in (None, compress):

            def run(group: Any, hook: Any = hook) -> list[torch.Tensor]:
                torch.manual_seed(1)
                model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
                wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.01)
                if hook is not None:
                    wrapped.register_comm_hook(group, hook)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                for step in range(3):
                    optimizer.zero_grad()
                    wrapped(values(self.rank, torch.float32, 4, 64, seed=step)).square().mean().backward()
                    optimizer.step()
                return [parameter.detach() for parameter in model.parameters()]

            for got, want in zip(run(self.mpi), run(self.gloo), strict=True):
                tolerance = 0 if self.size == 2 else (1e-6 if hook is None else 1e-3)
                assert torch.allclose(got, want, rtol=tolerance, atol=tolerance)

    def fsdp2_and_checkpoint(self) -> None:
        """Steps of fully_shard as over Gloo; its sharded state saved and loaded with DCP."""
        import tempfile

        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_model_state_dict
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        def build(group: Any) -> Any:
            torch.manual_seed(1)
            model = torch.nn.Sequential(torch.nn.Linear(64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 7))
            mesh = DeviceMesh.from_group(group, "cpu")
            for layer in model:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        def run(group: Any) -> Any:
            model = build(group)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                model(values(self.rank, torch.float32, 4, 64, seed=step)).square().mean().backward()
                optimizer.step()
            return model

        mpi, gloo = run(self.mpi), run(self.gloo)
        for got, want in zip(mpi.parameters(), gloo.parameters(), strict=True):
            assert torch.allclose(got.full_tensor(), want.full_tensor(), rtol=1e-6, atol=1e-6)
        folder = [tempfile.mkdtemp() if self.rank == 0 else None]
        dist.broadcast_object_list(folder, 0, self.mpi)
        dcp.save(get_model_state_dict(mpi), checkpoint_id=folder[0], process_group=self.mpi)
        fresh = build(self.mpi)
        for parameter in fresh.parameters():
            torch.nn.init.zeros_(parameter)
        state = get_model_state_dict(fresh)
        dcp.load(state, checkpoint_id=folder[0], process_group=self.mpi)
        for name, got in get_model_state_dict(mpi).items():
            assert torch.equal(state[name].full_tensor(), got.full_tensor()), name

    def functional(self) -> None:
        """The functional collectives, which come from C++."""
        from torch.distributed import _functional_collectives as functional

        whole = torch.arange(float(2 * self.size))
        total = functional.all_reduce(whole, "sum", self.mpi)
        assert torch.equal(total, whole * self.size)
        part = functional.reduce_scatter_tensor(whole, "sum", 0, self.mpi)
        assert torch.equal(functional.all_gather_tensor(part, 0, self.mpi), whole * self.size)
        moved = functional.all_to_all_single(whole, None, None, self.mpi)
        assert torch.equal(moved, whole[2 * self.rank : 2 * self.rank + 2].repeat(self.size))

    def misuse(self) -> None:
        """Errors that are known before anything is sent, with what was wrong."""
        for call, words in (
            (lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.BAND, group=self.mpi), "float32 by BAND"),
            (lambda: dist.all_reduce(torch.ones(2).to_sparse(), group=self.mpi), "to_dense"),
            (lambda: dist.all_gather_into_tensor(torch.ones(3), torch.ones(2), self.mpi), "do not fit"),
        ):
            try:
                call()
                said = "no error"
            except ValueError as error:
                said = str(error)
            assert words in said
        dist.barrier(self.mpi)


REDUCTIONS = (
    "all_reduce", "all_reduce_strided", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip
MOVES = (
    "broadcast", "all_gather", "all_gather_uneven", "all_gather_into_tensor", "gather", "scatter", "all_to_all",
    "all_to_all_single", "messages",
)  # fmt: skip
ONCE = (
    "any_source", "objects", "barrier", "subgroups", "local_subgroups", "futures", "threads", "pieces", "progress",
    "rounding", "ddp", "fsdp2_and_checkpoint", "functional", "misuse",
)  # fmt: skip


def case_names(dtypes: str) -> list[str]:
    """Every case: `collective-dtype` for all ops, sync and async, or the name of a scenario; `all` dtypes or `some`."""
    chosen = DTYPES if dtypes == "all" else (torch.float32, torch.bfloat16)
    table = [f"{name}-{str(dtype).removeprefix('torch.')}" for name in REDUCTIONS + MOVES for dtype in chosen]
    return table + list(ONCE)


def run_case(suite: Suite, name: str) -> None:
    """Runs one case; raises where it fails."""
    method, _, dtype_name = name.partition("-")
    run = getattr(suite, method)
    if method in ONCE:
        run()
        return
    dtype = getattr(torch, dtype_name)
    for is_async in (False, True):
        if method in MOVES:
            run(dtype, is_async)
            continue
        for op in OPS:
            if fits(dtype, op) and (op == "SUM" or not is_async):
                run(dtype, op, is_async)


def _gloo_reduces(dtype: torch.dtype, op: str) -> bool:
    return op != "AVG" and dtype not in (torch.bool, torch.int16, *COMPLEX)


def _gloo_moves(dtype: torch.dtype) -> bool:
    return dtype not in (torch.int16, *COMPLEX)


def main(output: Path, dtypes: str) -> None:
    """Runs every case; rank 0 writes what went wrong on which rank."""
    import dist_train.mpi_backend  # noqa: F401

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)  # a hang ends in a picture of it
    dist.init_process_group("mpi4py", timeout=timedelta(seconds=20))
    group = dist.group.WORLD
    assert group is not None
    suite = Suite(group, dist.new_group(backend="gloo"))
    results = {}
    for name in case_names(dtypes):
        problem = None
        try:
            run_case(suite, name)
        except Exception:
            problem = traceback.format_exc()
        if problem:
            sys.stderr.write(f"rank {suite.rank}, {name}: {problem}\n")
        results[name] = problem
    everyone: list[Any] = [None] * suite.size
    dist.all_gather_object(everyone, results, suite.gloo)
    if suite.rank == 0:
        output.write_text(json.dumps({name: [results[name] for results in everyone] for name in results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
