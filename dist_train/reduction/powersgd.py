"""PowerSGD: gradients as products of two thin matrices (Vogels et al. 2019, arXiv 1905.13727, algorithms 1 and 2).

A parameter's gradient G of shape `[n, ...]` is taken as a matrix `[n, m]`. With X = G / W + E on each rank, W ranks and
a matrix Q `[m, r]` that all share::

    P = orthogonal basis of  sum over ranks of X Q        [n, r], one all-reduce for all matrices of the bucket
    Q = sum over ranks of X' P                            [m, r], one all-reduce
    result = P Q',  E = X - result / W                    what was left out is added to the next gradient

Q starts from random numbers that are the same on all ranks and goes on from step to step (the paper's warm start), so
that the factors follow the gradient's subspace. Vectors, and matrices that would not get smaller, travel as they are.

The result depends on the ranks' errors E only through their sum. So a checkpoint holds the sum of the errors, and
every rank goes on with an equal share of it, those that saved too: a resumed run does what the undisturbed one does,
and the number of ranks may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dist_train.collectives import Collectives, Pending
from dist_train.reduction.lane import Lane

if TYPE_CHECKING:
    from dist_train.strategies.buckets import Bucket


class PowerSGDReducer:
    """Low-rank sums or means of a phase's gradients, with error feedback. See the module.

    Args:
        collectives: the ranks.
        channel: a process group that only this uses.
        lane: where the stages run.
        rank: of the factors.
        average: the mean of the gradients; else their sum.
    """

    multiple_of, sums_flags = 1, False

    def __init__(self, collectives: Collectives, channel: Any, lane: Lane, *, rank: int, average: bool) -> None:
        self._collectives, self._channel, self._lane = collectives, channel, lane
        self._rank, self._average = rank, average
        self._sent_scale = 1.0  # of what a bucket holds after the reduction, relative to the mean
        self._errors: dict[int, torch.Tensor] = {}
        self._queries: dict[int, torch.Tensor] = {}

    def scale(self, weight: float | None, total: float) -> float:
        """The rank's share of the mean."""
        return (1.0 if weight is None else weight) / total

    def start(self, bucket: Bucket, *, weight: float | None, total: float) -> Pending:  # noqa: ARG002
        """See `Reducer`."""
        matrices = {i: v for i, v in zip(bucket.indices, bucket.views, strict=True) if self._gets_smaller(v.shape)}
        whole = [view for index, view in zip(bucket.indices, bucket.views, strict=True) if index not in matrices]
        for index, view in matrices.items():
            self._prepare(index, view)

        def reduce() -> None:
            self._reduce_low_rank(matrices)
            _sum_in_one_(whole, self._channel)
            bucket.flat.mul_(self._sent_scale)

        self._sent_scale = 1.0 if self._average else total
        thin = sum(q.numel() + v.shape[0] * q.shape[1] for i, v in matrices.items() for q in (self._queries[i],))
        payload = (thin + sum(view.numel() for view in whole)) * bucket.flat.element_size()
        return self._collectives.started(
            self._lane.start(reduce), num_bytes=payload, name=bucket.name, on_host=bucket.flat.device.type == "cpu"
        )

    def forget(self, indices: Sequence[int]) -> None:
        """Starts these parameters' errors from zero: their bucket is reduced a second time in one step."""
        for index in indices:
            if index in self._errors:
                self._errors[index].zero_()

    def keep(self, index: int, sent: torch.Tensor) -> None:
        """Takes back what was `sent` for a parameter that no rank had a gradient of: it was leftover error only."""
        if index in self._errors:
            self._errors[index] += _as_matrix(sent) / (self._sent_scale * self._collectives.world.world_size)

    def state(self) -> dict[str, Any]:
        """Sums of the errors, and queries, by parameter index; a collective, and every rank goes on with the mean."""
        sums = {}
        for index in sorted(self._errors):
            dist.all_reduce(self._errors[index], group=self._channel)
            sums[index] = self._errors[index].clone()
            self._errors[index] /= self._collectives.world.world_size
        return {"errors": sums, "queries": dict(self._queries)}

    def load_state(self, state: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """Takes what `state` gave, under any number of ranks; another rank of the factors starts with new queries."""
        for index, error in state.get("errors", {}).items():
            self._errors[index] = error.to(parameters[index], copy=True) / self._collectives.world.world_size
        for index, query in state.get("queries", {}).items():
            if query.shape[1] == self._width(parameters[index].shape):
                self._queries[index] = query.to(parameters[index], copy=True)

    def _width(self, shape: torch.Size) -> int:
        return min(self._rank, shape[0], math.prod(shape[1:]))

    def _gets_smaller(self, shape: torch.Size) -> bool:
        if len(shape) < 2 or 0 in shape:
            return False
        rows, columns = shape[0], math.prod(shape[1:])
        return (rows + columns) * self._width(shape) < rows * columns

    def _prepare(self, index: int, view: torch.Tensor) -> None:
        rows, columns = view.shape[0], math.prod(view.shape[1:])
        if index not in self._errors:
            self._errors[index] = torch.zeros(rows, columns, dtype=view.dtype, device=view.device)
        if index not in self._queries:
            same_everywhere = torch.Generator().manual_seed(index)
            query = torch.randn(columns, self._width(view.shape), generator=same_everywhere)
            self._queries[index] = query.to(view)

    def _reduce_low_rank(self, views: Mapping[int, torch.Tensor]) -> None:
        """Adds the errors to `views`, and replaces them by the low-rank sum over the ranks."""
        inputs = {index: _as_matrix(view) + self._errors[index] for index, view in views.items()}
        left = [matrix @ self._queries[index] for index, matrix in inputs.items()]
        left = [_orthogonal(product) for product in _sum_in_one_(left, self._channel)]
        right = [matrix.t() @ basis for matrix, basis in zip(inputs.values(), left, strict=True)]
        right = _sum_in_one_(right, self._channel)
        world_size = self._collectives.world.world_size
        for (index, matrix), basis, query in zip(inputs.items(), left, right, strict=True):
            result = basis @ query.t()
            self._queries[index] = query
            self._errors[index] = matrix.sub_(result, alpha=1 / world_size)
            views[index].copy_(result.view(views[index].shape))


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0], -1)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of a space that holds the columns of `matrix`, in float32 or better inside."""
    precise = torch.promote_types(matrix.dtype, torch.float32)
    return torch.linalg.qr(matrix.to(precise)).Q.to(matrix.dtype)


def _sum_in_one_(tensors: list[torch.Tensor], group: Any) -> list[torch.Tensor]:
    """Sums tensors of one dtype over the ranks in one all-reduce; writes the sums to them and returns them."""
    if tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))
    return tensors
