"""Gradients of the collectives, as Horovod defines them.

A gradient crosses the ranks by the mirror image of the forward collective. Where every rank's loss is the same function
of the gathered or broadcast result, Horovod averages the ranks' gradients instead of adding them; so do these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_train.horovod.engine.messages import REDUCE_OPS
from dist_train.horovod.handles import submit, synchronize
from dist_train.horovod.process_sets import ProcessSet

_AVERAGE, _SUM = REDUCE_OPS.index("Average"), REDUCE_OPS.index("Sum")
Factors = tuple[float, float]


class Allreduce(torch.autograd.Function):
    """Of one tensor or several; the gradient is reduced with the same op and factors."""

    @staticmethod
    def forward(
        ctx: Any, name: str | None, op: int, factors: Factors, process_set: ProcessSet, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.op, ctx.factors, ctx.process_set = op, factors, process_set
        return synchronize(submit("allreduce", tensors, name, process_set, op=op, factors=factors, grouped=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.op not in (_AVERAGE, _SUM):
            raise NotImplementedError(f"allreduce with op={REDUCE_OPS[ctx.op]} has no gradient: use Sum or Average")
        return None, None, None, None, *_reduced_gradients(gradients, ctx.op, ctx.factors, ctx.process_set)


class Allgather(torch.autograd.Function):
    """Of one tensor or several; the gradient is this rank's rows of the mean gradient."""

    @staticmethod
    def forward(ctx: Any, name: str | None, process_set: ProcessSet, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rows = [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors]
        ctx.process_set = process_set
        return synchronize(submit("allgather", tensors, name, process_set, grouped=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        reduced = _reduced_gradients(gradients, _AVERAGE, (1.0, 1.0), ctx.process_set)
        mine = torch.tensor([ctx.rows], dtype=torch.int64)
        rows_of_ranks = synchronize(submit("allgather", [mine], None, ctx.process_set))
        starts = rows_of_ranks[: ctx.process_set.rank()].sum(0).tolist()
        parts = zip(reduced, starts, ctx.rows, strict=True)
        return None, None, *(gradient.narrow(0, start, rows) for gradient, start, rows in parts)


class Broadcast(torch.autograd.Function):
    """The gradient is the mean gradient on the root, and zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, root: int, name: str | None, process_set: ProcessSet, tensor: Tensor) -> Tensor:
        ctx.root, ctx.process_set = root, process_set
        return synchronize(submit("broadcast", [tensor], name, process_set, root=root))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (reduced,) = _reduced_gradients((gradient,), _AVERAGE, (1.0, 1.0), ctx.process_set)
        is_root = ctx.process_set.ranks[ctx.process_set.rank()] == ctx.root
        return None, None, None, reduced if is_root else torch.zeros_like(reduced)


class Alltoall(torch.autograd.Function):
    """The gradient goes back the way the rows came."""

    @staticmethod
    def forward(ctx: Any, splits: Any, name: str | None, process_set: ProcessSet, tensor: Tensor) -> Any:
        output, received_splits = synchronize(submit("alltoall", [tensor], name, process_set, splits=splits))
        ctx.received_splits, ctx.shape, ctx.process_set = received_splits, tensor.shape, process_set
        ctx.mark_non_differentiable(received_splits)
        return output, received_splits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        splits = ctx.received_splits
        returned, _ = synchronize(submit("alltoall", [gradient.contiguous()], None, ctx.process_set, splits=splits))
        unsent = ctx.shape[0] - returned.shape[0]  # rows beyond the sum of splits reached nobody
        if unsent:
            returned = torch.cat([returned, returned.new_zeros(unsent, *ctx.shape[1:])])
        return None, None, None, returned


class Reducescatter(torch.autograd.Function):
    """Of one tensor or several; the gradient is gathered, and multiplied by the number of ranks after a Sum."""

    @staticmethod
    def forward(
        ctx: Any, name: str | None, op: int, factors: Factors, process_set: ProcessSet, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.op, ctx.factors, ctx.process_set = op, factors, process_set
        return synchronize(submit("reducescatter", tensors, name, process_set, op=op, factors=factors, grouped=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.op not in (_AVERAGE, _SUM):
            raise NotImplementedError(f"reducescatter with op={REDUCE_OPS[ctx.op]} has no gradient: use Sum or Average")
        factor = ctx.factors[0] * ctx.factors[1] * (ctx.process_set.size() if ctx.op == _SUM else 1)
        scaled = [gradient.contiguous() * factor for gradient in gradients]
        gathered = synchronize(submit("allgather", scaled, None, ctx.process_set, grouped=True))
        return None, None, None, None, *gathered


def _reduced_gradients(gradients: tuple[Tensor, ...], op: int, factors: Factors, process_set: ProcessSet) -> Any:
    contiguous = [gradient.contiguous() for gradient in gradients]
    return synchronize(submit("allreduce", contiguous, None, process_set, op=op, factors=factors, grouped=True))
