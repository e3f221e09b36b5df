"""The table of the MPI tests: every collective of tensors, for every dtype and reduction, sync and async.

Each case calls one collective on a group of MPI's and on one of Gloo's in the same processes and compares the bits;
where Gloo has no such collective or dtype, the answer is worked out from all ranks' inputs. The inputs are small whole
numbers, whose sums and products no order of addition rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, *COMPLEX)
LENGTHS = (0, 1, 1031)
OPS = {name: getattr(dist.ReduceOp, name) for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")}

REDUCTIONS = (
    "all_reduce", "all_reduce_strided", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip
MOVES = (
    "broadcast", "all_gather", "all_gather_uneven", "all_gather_into_tensor", "gather", "scatter", "all_to_all",
    "all_to_all_single", "messages",
)  # fmt: skip


def values(rank: int, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """What `rank` gives: whole numbers from 1 to 3 (no order of multiplying them rounds or overflows)."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(
        0 if dtype == torch.bool else 1, 2 if dtype == torch.bool else 4, shape, generator=generator
    ).to(dtype)


def all_values(size: int, dtype: torch.dtype, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    """Every rank's values."""
    return [values(rank, dtype, *shape, seed=seed) for rank in range(size)]


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


class Table:
    """The cases, on the group under test and on Gloo's."""

    def __init__(self, mpi: Any, gloo: Any) -> None:
        self.mpi, self.gloo = mpi, gloo
        self.rank, self.size = mpi.rank(), mpi.size()

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
            expected = reduced(all_values(self.size, dtype, length), op)

            def run(group: Any, length: int = length) -> list[torch.Tensor]:
                tensor = values(self.rank, dtype, length)
                _finish(dist.all_reduce(tensor, OPS[op], group=group, async_op=is_async), is_async)
                return [tensor]

            self.compare(run, [expected], gloo=_gloo_reduces(dtype, op))

    def all_reduce_strided(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        expected = reduced([v.t() for v in all_values(self.size, dtype, 7, 5)], op)

        def run(group: Any) -> list[torch.Tensor]:
            tensor = values(self.rank, dtype, 7, 5).t()
            _finish(dist.all_reduce(tensor, OPS[op], group=group, async_op=is_async), is_async)
            assert not tensor.is_contiguous()
            return [tensor]

        self.compare(run, [expected], gloo=False)

    def all_reduce_coalesced(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        expected = [reduced(all_values(self.size, dtype, n, seed=n), op) for n in (3, 17)]

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

        expected = [reduced(all_values(self.size, dtype, 33), op)] if self.rank == root else []
        self.compare(run, expected, gloo=_gloo_reduces(dtype, op))

    def reduce_scatter(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        lengths = [3 + 2 * rank for rank in range(self.size)]  # uneven
        start = sum(lengths[: self.rank])
        whole = reduced(all_values(self.size, dtype, sum(lengths)), op)

        def run(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(lengths[self.rank], dtype=dtype)
            parts = list(values(self.rank, dtype, sum(lengths)).split(lengths))
            _finish(dist.reduce_scatter(output, parts, OPS[op], group=group, async_op=is_async), is_async)
            return [output]

        self.compare(run, [whole[start : start + lengths[self.rank]]], gloo=False)

    def reduce_scatter_tensor(self, dtype: torch.dtype, op: str, is_async: bool) -> None:
        whole = reduced(all_values(self.size, dtype, self.size * 5, 3), op)

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

            self.compare(run, all_values(self.size, dtype, length), gloo=_gloo_moves(dtype))

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

            self.compare(run, [torch.cat(all_values(self.size, dtype, 4, 3))], gloo=_gloo_moves(dtype))

    def gather(self, dtype: torch.dtype, is_async: bool) -> None:
        def run(group: Any) -> list[torch.Tensor]:
            parts = [torch.zeros(9, dtype=dtype) for _ in range(self.size)] if self.rank == 1 else None
            _finish(dist.gather(values(self.rank, dtype, 9), parts, 1, group, is_async), is_async)
            return parts or []

        self.compare(run, all_values(self.size, dtype, 9) if self.rank == 1 else [], gloo=_gloo_moves(dtype))

    def scatter(self, dtype: torch.dtype, is_async: bool) -> None:
        def run(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(9, dtype=dtype)
            parts = all_values(self.size, dtype, 9) if self.rank == 1 else None
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

        expected = torch.cat(
            [v[2 * self.rank : 2 * self.rank + 2] for v in all_values(self.size, dtype, self.size * 2, 3)]
        )
        self.compare(even, [expected], gloo=_gloo_moves(dtype))
        sent = list(range(self.size))  # `to` rows to each

        def split(group: Any) -> list[torch.Tensor]:
            output = torch.zeros(self.size * self.rank, 3, dtype=dtype)
            tensor = values(self.rank, dtype, sum(sent), 3)
            received = [self.rank] * self.size
            _finish(dist.all_to_all_single(output, tensor, received, sent, group, is_async), is_async)
            return [output]

        start = sum(sent[: self.rank])
        expected = torch.cat([v[start : start + self.rank] for v in all_values(self.size, dtype, sum(sent), 3)])
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


def _finish(work: Any, is_async: bool) -> None:
    if is_async:
        assert work is not None
        work.wait()


def _gloo_reduces(dtype: torch.dtype, op: str) -> bool:
    return op != "AVG" and dtype not in (torch.bool, torch.int16, *COMPLEX)


def _gloo_moves(dtype: torch.dtype) -> bool:
    return dtype not in (torch.int16, *COMPLEX)
