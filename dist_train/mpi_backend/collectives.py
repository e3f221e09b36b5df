"""The collectives and messages of a process group, each as MPI's non-blocking one.

Every method has the signature with which torch.distributed and its C++ parts (the reducer of DDP, the functional
collectives) call it, and returns at once. Ranks are the group's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed import AllreduceOptions

from dist_train.mpi_backend.library import MPI, Reduction, buffer, is_half, operation, reduced_as, vector
from dist_train.mpi_backend.operation import Operation
from dist_train.mpi_backend.staging import Staging

Tensors = list[torch.Tensor]

PIECE_BYTES_PER_RANK = 1 << 20
"""Larger reductions and broadcasts are several of MPI's, one after the other, whose copies then stay in the caches:
64 MB in one took three times as long as in pieces of 2 MB (Open MPI 5, 2 ranks). Counts stay within 32 bits, too."""
ONCE = (None,)
"""`(call() for _ in ONCE)` makes one of MPI's calls, but not before it is asked to: an earlier operation may be due."""


class CollectivesOfMPI:
    """The part of `MPIGroup` that says what is sent where."""

    _launch: Callable[..., Operation]
    rank: Callable[[], int]
    size: Callable[[], int]

    # Reductions

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Operation:
        """Reduces each tensor over the ranks, in place."""
        return self._reduce_all("all_reduce", tensors, opts or AllreduceOptions())

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Operation:
        """The same; one operation for all."""
        return self._reduce_all("all_reduce_coalesced", tensors, opts or AllreduceOptions())

    def reduce(self, tensors: Tensors, opts: Any) -> Operation:
        """Reduces to the root; the tensors of the others stay as they are."""
        (tensor,) = tensors
        reduction = _Reduction(opts.reduceOp, tensor.dtype, self.size())
        staging = reduction.staging()
        root, is_root = opts.rootRank, self.rank() == opts.rootRank
        if is_root:
            memory = staging.both(reduction.scaled(tensor))
            reduction.finish(staging, tensor)
        else:
            memory = staging.source(reduction.scaled(tensor, copy=True))

        def post(comm: Any) -> Iterator[Any]:
            messages = [reduction.message(piece) for piece in self._pieces(memory)]
            pairs = [(MPI.IN_PLACE, message) if is_root else (message, None) for message in messages]
            return (comm.Ireduce(sent, received, op=reduction.op, root=root) for sent, received in pairs)

        return self._launch("reduce", post, staging=staging, options=opts, result=tensors)

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Operation:
        """Reduces a list with a tensor for each rank; the sizes may differ from rank to rank."""
        (output,), (parts,) = outputs, inputs
        reduction = _Reduction(opts.reduceOp, output.dtype, self.size())
        staging = reduction.staging()
        source = staging.sources([reduction.scaled(part, copy=True) for part in parts])
        target = staging.target(output)
        reduction.finish(staging, output)
        counts = [part.numel() for part in parts]

        def post(comm: Any) -> Iterator[Any]:
            yield comm.Ireduce_scatter(reduction.message(source), reduction.message(target), counts, op=reduction.op)

        return self._launch("reduce_scatter", post, staging=staging, options=opts, result=outputs)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any) -> Operation:
        """Reduces `input`, of which each rank keeps its equal part."""
        return self._reduce_scatter("reduce_scatter_tensor", [output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any) -> Operation:
        """The same for several tensors; one operation."""
        return self._reduce_scatter("reduce_scatter_tensor_coalesced", outputs, inputs, opts)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # Collectives that move

    def broadcast(self, tensors: Tensors, opts: Any) -> Operation:
        """The root's tensor to all."""
        (tensor,) = tensors
        staging = Staging()
        root = opts.rootRank
        memory = staging.source(tensor) if self.rank() == root else staging.target(tensor)
        return self._launch(
            "broadcast",
            lambda comm: (comm.Ibcast(buffer(piece), root=root) for piece in self._pieces(memory)),
            staging=staging,
            options=opts,
            result=tensors,
        )

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Operation:
        """Every rank's tensor to all; the sizes may differ from rank to rank."""
        (parts,), (tensor,) = outputs, inputs
        staging = Staging()
        source, target = staging.source(tensor), staging.targets(parts)
        counts = [part.numel() for part in parts]
        return self._launch(
            "all_gather",
            lambda comm: (comm.Iallgatherv(buffer(source), vector(target, counts)) for _ in ONCE),
            staging=staging,
            options=opts,
            result=parts,
        )

    def allgather_coalesced(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> Operation:
        """The same for several tensors; `outputs[i][rank]` is of the i-th."""
        staging = Staging()
        pairs = [
            (staging.source(t), staging.targets(parts), [p.numel() for p in parts])
            for parts, t in zip(_by_tensor(outputs, len(inputs)), inputs, strict=True)
        ]
        return self._launch(
            "all_gather_coalesced",
            lambda comm: (comm.Iallgatherv(buffer(s), vector(t, counts)) for s, t, counts in pairs),
            staging=staging,
            options=opts,
            result=list(itertools.chain(*outputs)),
        )

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Operation:
        """Every rank's tensor, of equal size, one after the other in `output`, of which `input` may be a part."""
        return self._gather_all("all_gather_into_tensor", [output], [input], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Operation:
        """The same for several tensors; one operation."""
        return self._gather_all("all_gather_into_tensor_coalesced", outputs, inputs, opts)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any) -> Operation:
        """Every rank's tensor to the root; the sizes may differ from rank to rank."""
        (tensor,) = inputs
        staging = Staging()
        source = staging.source(tensor)
        root, parts = opts.rootRank, []
        if self.rank() == root:
            (parts,) = outputs
            target = staging.targets(parts)
            counts = [part.numel() for part in parts]

        def post(comm: Any) -> Iterator[Any]:
            received = vector(target, counts) if self.rank() == root else None
            yield comm.Igatherv(buffer(source), received, root=root)

        return self._launch("gather", post, staging=staging, options=opts, result=parts)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any) -> Operation:
        """The root's tensors, one to each rank; the sizes may differ from rank to rank."""
        (tensor,) = outputs
        staging = Staging()
        target = staging.target(tensor)
        root = opts.rootRank
        if self.rank() == root:
            (parts,) = inputs
            source = staging.sources(parts)
            counts = [part.numel() for part in parts]

        def post(comm: Any) -> Iterator[Any]:
            sent = vector(source, counts) if self.rank() == root else None
            yield comm.Iscatterv(sent, buffer(target), root=root)

        return self._launch("scatter", post, staging=staging, options=opts, result=outputs)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> Operation:
        """A tensor from each rank to each; every size may differ."""
        staging = Staging()
        source, target = staging.sources(inputs), staging.targets(outputs)
        sent, received = [t.numel() for t in inputs], [t.numel() for t in outputs]
        return self._launch(
            "all_to_all",
            lambda comm: (comm.Ialltoallv(vector(source, sent), vector(target, received)) for _ in ONCE),
            staging=staging,
            options=opts,
            result=outputs,
        )

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> Operation:
        """The rows of `input` to the ranks, in equal parts or by sizes."""
        staging = Staging()
        source, target = staging.source(input), staging.target(output)
        sent = self._counts("input", input, input_split_sizes)
        received = self._counts("output", output, output_split_sizes)
        return self._launch(
            "all_to_all_single",
            lambda comm: (comm.Ialltoallv(vector(source, sent), vector(target, received)) for _ in ONCE),
            staging=staging,
            options=opts,
            result=[output],
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None) -> Operation:
        """Complete once every rank has called it."""
        return self._launch("barrier", lambda comm: (comm.Ibarrier() for _ in ONCE), staging=Staging(), options=opts)

    # Messages

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> Operation:
        """A tensor to another rank."""
        (tensor,) = tensors
        staging = Staging()
        memory = staging.source(tensor)
        return self._launch(
            f"send to rank {dst}",
            lambda comm: (comm.Isend(buffer(memory), dest=dst, tag=tag) for _ in ONCE),
            staging=staging,
            result=tensors,
            is_message=True,
        )

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> Operation:
        """A tensor of exactly this size from another rank."""
        return self._receive(f"recv from rank {src}", tensors, src, tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> Operation:
        """The same from whichever rank; the operation's `source_rank()` says from which."""
        return self._receive("recv from any rank", tensors, MPI.ANY_SOURCE, tag)

    def _receive(self, name: str, tensors: Tensors, source: int, tag: int) -> Operation:
        (tensor,) = tensors
        staging = Staging()
        memory = staging.target(tensor)
        expected = tensor.numel() * tensor.element_size()

        def check(status: Any) -> None:
            received = status.Get_count(MPI.BYTE)
            if received != expected:
                raise RuntimeError(f"{name}: the message has {received} bytes and the tensor {expected}")

        return self._launch(
            name,
            lambda comm: (comm.Irecv(buffer(memory), source=source, tag=tag) for _ in ONCE),
            staging=staging,
            result=tensors,
            check=check,
            is_message=True,
        )

    # What several of the above do

    def _reduce_all(self, name: str, tensors: Tensors, opts: Any) -> Operation:
        reductions = [_Reduction(opts.reduceOp, tensor.dtype, self.size()) for tensor in tensors]
        staging = Staging(through_host=any(reduction.on_host for reduction in reductions))
        memories = []
        for reduction, tensor in zip(reductions, tensors, strict=True):
            memories.append(staging.both(reduction.scaled(tensor)))
            reduction.finish(staging, tensor)

        def post(comm: Any) -> Iterator[Any]:
            return (
                comm.Iallreduce(MPI.IN_PLACE, reduction.message(piece), op=reduction.op)
                for reduction, memory in zip(reductions, memories, strict=True)
                for piece in self._pieces(memory)
            )

        return self._launch(name, post, staging=staging, options=opts, result=tensors)

    def _reduce_scatter(self, name: str, outputs: Tensors, inputs: Tensors, opts: Any) -> Operation:
        reductions = [_Reduction(opts.reduceOp, tensor.dtype, self.size()) for tensor in outputs]
        staging = Staging(through_host=any(reduction.on_host for reduction in reductions))
        pairs = []
        for reduction, output, whole in zip(reductions, outputs, inputs, strict=True):
            self._check_parts(name, output, whole)
            apart = whole.clone() if _overlap(output, whole) else whole
            pairs.append((staging.source(reduction.scaled(apart, copy=True)), staging.target(output)))
            reduction.finish(staging, output)

        def post(comm: Any) -> Iterator[Any]:
            return (
                comm.Ireduce_scatter_block(
                    _parts(reduction.message(source), self.size()), reduction.message(target), op=reduction.op
                )
                for reduction, (source, target) in zip(reductions, pairs, strict=True)
            )

        return self._launch(name, post, staging=staging, options=opts, result=outputs)

    def _gather_all(self, name: str, outputs: Tensors, inputs: Tensors, opts: Any) -> Operation:
        staging = Staging()
        pairs: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        for whole, tensor in zip(outputs, inputs, strict=True):
            self._check_parts(name, tensor, whole)
            target = staging.target(whole)
            mine = target.data_ptr() + self.rank() * tensor.numel() * tensor.element_size()
            if tensor.is_contiguous() and tensor.data_ptr() == mine:
                pairs.append((None, target))
            else:
                pairs.append((staging.source(tensor.clone() if _overlap(tensor, whole) else tensor), target))

        def post(comm: Any) -> Iterator[Any]:
            return (
                comm.Iallgather(MPI.IN_PLACE if source is None else buffer(source), _parts(buffer(target), self.size()))
                for source, target in pairs
            )

        return self._launch(name, post, staging=staging, options=opts, result=outputs)

    def _pieces(self, memory: torch.Tensor) -> Sequence[torch.Tensor]:
        return memory.view(-1).split(self.size() * PIECE_BYTES_PER_RANK // memory.element_size())

    def _check_parts(self, name: str, part: torch.Tensor, whole: torch.Tensor) -> None:
        if part.numel() * self.size() != whole.numel() or part.dtype != whole.dtype:
            raise ValueError(
                f"{name}: a tensor of {part.numel()} {part.dtype} and one of {whole.numel()} {whole.dtype} do not fit "
                f"{self.size()} ranks: the second needs {part.numel() * self.size()} elements of the same dtype"
            )

    def _counts(self, what: str, tensor: torch.Tensor, sizes: Sequence[int]) -> list[int]:
        rows = tensor.shape[0] if tensor.dim() else 1
        if not sizes:
            if rows % self.size():
                raise ValueError(f"all_to_all_single: {what} has {rows} rows, which {self.size()} ranks do not divide")
            sizes = [rows // self.size()] * self.size()
        if len(sizes) != self.size() or sum(sizes) != rows:
            raise ValueError(f"all_to_all_single: {what} has {rows} rows and split sizes {list(sizes)}")
        row = tensor.numel() // rows if rows else 0
        return [size * row for size in sizes]


class _Reduction:
    """A c10d reduction of one dtype in MPI's terms, with what is to do before and after it."""

    def __init__(self, reduction: Any, dtype: torch.dtype, size: int) -> None:
        self._factor: Any = None  # of PREMUL_SUM
        kind = reduction
        if not isinstance(reduction, Reduction):
            state, self._factor = reduction.__getstate__()
            kind = Reduction(state)
        self.op = operation(kind, dtype)
        self._datatype = reduced_as(dtype)
        self._divisor = size if kind == Reduction.AVG else None
        self.on_host = is_half(dtype)  # where our own operation runs
        if self._divisor and dtype == torch.bool:
            raise ValueError("mpi4py cannot reduce torch.bool by AVG")

    def staging(self) -> Staging:
        """The memory for it."""
        return Staging(through_host=self.on_host)

    def message(self, memory: torch.Tensor) -> list[Any]:
        """The memory as MPI reduces it."""
        return buffer(memory, self._datatype)

    def scaled(self, tensor: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
        """The tensor times the factor of PREMUL_SUM: in place, or in a copy."""
        if self._factor is None:
            return tensor
        with torch.no_grad():
            return tensor * self._factor if copy else tensor.mul_(self._factor)

    def finish(self, staging: Staging, tensor: torch.Tensor) -> None:
        """The division of AVG."""
        divisor = self._divisor
        if divisor is not None:
            rounding = None if tensor.is_floating_point() or tensor.is_complex() else "trunc"
            staging.afterwards(lambda: tensor.div_(divisor, rounding_mode=rounding))


def _parts(message: list[Any], size: int) -> list[Any]:
    """The same memory as `size` equal parts, of which mpi4py wants the count of one."""
    memory, count, datatype = message
    return [memory, count // size, datatype]


def _by_tensor(outputs: list[Tensors], num_inputs: int) -> list[Tensors]:
    """Lists by rank, `outputs[rank][i]`, as lists by tensor."""
    return [[parts[i] for parts in outputs] for i in range(num_inputs)]


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """True when the two may share memory."""
    return first.numel() > 0 and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
