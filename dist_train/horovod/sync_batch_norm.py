"""BatchNorm over the batches of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.horovod.mpi_ops import Sum, allgather, allreduce, size


class SyncBatchNorm(_BatchNorm):
    """Normalises `[N, C, ...]` by the mean and variance over the batches of all ranks, which may differ in size.

    Takes the arguments of `nn.BatchNorm*d`; parameters, buffers and `state_dict` keys are the same. Horovod's takes
    CUDA tensors only, this one any. The gradients of weight and bias are this rank's share, for `DistributedOptimizer`
    to combine.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: expected at least 2D input, got {input.dim()}D {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `input`, in float32 or better inside, and returns its dtype."""
        self._check_input_dim(input)
        uses_batch = self.training or not self.track_running_stats
        if not uses_batch or size() == 1:
            return super().forward(input)
        output, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            self._track(mean, variance, count)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((variance * count / (count - 1).clamp(min=1)).to(self.running_var), momentum)


class _Normalize(torch.autograd.Function):
    """An all-gather of 2C + 1 values forward (count, mean, squares about the mean), an all-reduce of 2C backward."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape = [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
        values = input if input.dtype == torch.float64 else input.float()
        mine = torch.tensor([values.numel() / values.size(1)], dtype=values.dtype, device=values.device)
        mean = values.sum(dims) / mine.clamp(min=1)
        squares = (values - mean.view(shape)).square().sum(dims)
        gathered = allgather(torch.cat([mine, mean, squares])[None], name="sync_batch_norm.statistics")
        counts, means, squares = gathered.split([1, mean.numel(), mean.numel()], dim=1)
        # Chan, Golub and LeVeque 1983: moments of the whole from moments of the parts, without cancellation.
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = (squares + (means - mean).square() * counts).sum(0) / count
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(input, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        normalized = (values - mean.view(shape)) * scale.view(shape)
        if weight is not None and bias is not None:
            normalized = normalized * weight.view(shape) + bias.view(shape)
        return normalized.to(input.dtype), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        input, weight, mean, scale, count = ctx.saved_tensors
        dims, shape = [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
        gradient = gradients[0].to(mean.dtype)
        normalized = (input.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = gradient.sum(dims), (gradient * normalized).sum(dims)
        of_input = None
        if ctx.needs_input_grad[0]:
            sums = allreduce(torch.stack([of_bias, of_weight]), op=Sum, name="sync_batch_norm.gradients") / count
            of_input = gradient - sums[0].view(shape) - normalized * sums[1].view(shape)
            of_input = of_input * (scale if weight is None else scale * weight).view(shape)
            of_input = of_input.to(input.dtype)
        if weight is None:
            return of_input, None, None, None
        return of_input, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None
