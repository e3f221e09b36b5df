"""What the backend asks of MPI: the library itself, datatypes, reduce operations and buffers."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ReduceOp

try:
    import mpi4py

    if multiprocessing.parent_process() is not None:  # a rank's child, which imports the rank's program again
        mpi4py.rc.initialize = False
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # no mpi4py, or mpi4py without an MPI library that it can load
    raise ImportError(
        f"the backend mpi4py needs mpi4py and an MPI library: pip install 'reelscale[mpi]' ({error})"
    ) from error

Reduction: Any = ReduceOp.RedOpType

# What only moves is told to MPI by the size of its elements, so every dtype can.
_MOVED = {1: MPI.BYTE, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}

_REDUCED = {
    torch.float64: MPI.DOUBLE,
    torch.float32: MPI.FLOAT,
    torch.float16: MPI.UINT16_T,
    torch.bfloat16: MPI.UINT16_T,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.bool: MPI.UINT8_T,
}

_OPERATIONS = {
    Reduction.SUM: MPI.SUM,
    Reduction.AVG: MPI.SUM,
    Reduction.PREMUL_SUM: MPI.SUM,
    Reduction.PRODUCT: MPI.PROD,
    Reduction.MIN: MPI.MIN,
    Reduction.MAX: MPI.MAX,
    Reduction.BAND: MPI.BAND,
    Reduction.BOR: MPI.BOR,
    Reduction.BXOR: MPI.BXOR,
}
_LOGICAL = {  # a bool is one byte of 0 or 1, and must stay so
    Reduction.SUM: MPI.LOR,
    Reduction.PRODUCT: MPI.LAND,
    Reduction.MIN: MPI.LAND,
    Reduction.MAX: MPI.LOR,
    Reduction.BAND: MPI.LAND,
    Reduction.BOR: MPI.LOR,
    Reduction.BXOR: MPI.LXOR,
}
_HALF = {
    Reduction.SUM: torch.add,
    Reduction.AVG: torch.add,
    Reduction.PREMUL_SUM: torch.add,
    Reduction.PRODUCT: torch.mul,
    Reduction.MIN: torch.minimum,
    Reduction.MAX: torch.maximum,
}


LARGEST_COUNT = 2**63 - 1 if MPI.Get_version() >= (4, 0) else 2**31 - 1
"""Of elements, in one call. All-reduce, reduce and broadcast cut larger tensors up."""


def is_threaded() -> bool:
    """True when MPI may be called from several threads at a time, false when one at a time.

    Raises:
        RuntimeError: MPI was initialised by somebody else for one thread only.
    """
    level = MPI.Query_thread()
    if level < MPI.THREAD_SERIALIZED:
        raise RuntimeError(
            "MPI was initialised without threads: let mpi4py initialise it, or ask MPI_Init_thread for "
            "MPI_THREAD_MULTIPLE"
        )
    return bool(level == MPI.THREAD_MULTIPLE)


def buffer(tensor: torch.Tensor, datatype: Any = None) -> list[Any]:
    """The memory of a dense, contiguous tensor as mpi4py's message, without a copy.

    Raises:
        ValueError: it has more elements than this MPI can count in one call.
    """
    if tensor.numel() > LARGEST_COUNT:
        raise ValueError(
            f"{tensor.numel()} elements in one call: MPI {'.'.join(map(str, MPI.Get_version()))} counts to "
            f"{LARGEST_COUNT}; pass them in parts, or use an MPI of version 4"
        )
    datatype = datatype or _MOVED[tensor.element_size()]
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return [memory, tensor.numel(), datatype]


def vector(tensor: torch.Tensor, counts: list[int], datatype: Any = None) -> list[Any]:
    """The same for calls with a count for each rank; the parts follow each other in memory."""
    memory, _, datatype = buffer(tensor, datatype)
    return [memory, counts, datatype]


def reduced_as(dtype: torch.dtype) -> Any:
    """The MPI datatype in which tensors of `dtype` are reduced; ValueError where MPI has none."""
    if dtype not in _REDUCED:
        raise ValueError(f"mpi4py reduces no {dtype}; it reduces {', '.join(str(known) for known in _REDUCED)}")
    return _REDUCED[dtype]


def operation(reduction: Any, dtype: torch.dtype) -> Any:
    """The MPI operation for a c10d reduction of tensors of `dtype`; ValueError where the two do not go together."""
    kind = Reduction.SUM if reduction is None else reduction
    table = _LOGICAL if dtype == torch.bool else _OPERATIONS
    bitwise = kind in (Reduction.BAND, Reduction.BOR, Reduction.BXOR)
    ordered = kind in (Reduction.MIN, Reduction.MAX)
    if kind not in table or (bitwise and _is_inexact(dtype)) or (ordered and dtype.is_complex):
        raise ValueError(f"mpi4py cannot reduce {dtype} by {kind.name}")
    return _half_operation(_HALF[kind], dtype) if is_half(dtype) else table[kind]


def is_half(dtype: torch.dtype) -> bool:
    """True for the types that MPI does not know and an operation of ours reduces."""
    return dtype in (torch.float16, torch.bfloat16)


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@functools.cache
def _half_operation(combine: Callable[..., torch.Tensor], dtype: torch.dtype) -> Any:
    def reduce(source: Any, target: Any, datatype: Any) -> None:  # noqa: ARG001  MPI's signature
        accumulated = torch.frombuffer(target, dtype=dtype)
        combine(torch.frombuffer(source, dtype=dtype), accumulated, out=accumulated)

    return MPI.Op.Create(reduce, commute=True)
