"""Batch normalisation across processes: `local`, `synchronized` or `frozen`.

- `local`: each rank normalises by its own micro-batch, as in Goyal et al. 2017 (remark on BN: keep the per-worker batch
  fixed); running statistics are averaged over the ranks after each step.
- `synchronized`: one mean and variance over all ranks' micro-batches, so W ranks with batch B equal one rank with W*B.
  PyTorch's `SyncBatchNorm` refuses CPU tensors and has no double backward; this one runs on any device, and its
  backward is made of differentiable collectives.
- `frozen`: evaluation mode throughout (running statistics are used and not changed); scale and shift still train.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.collectives import Collectives

BatchNormMode = Literal["local", "synchronized", "frozen"]


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the ranks' gradients, and so on for every further derivative."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collectives: Collectives) -> torch.Tensor:
        ctx.collectives = collectives
        return collectives.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumOverRanks.apply(gradients[0], ctx.collectives), None


class SynchronizedBatchNorm(_BatchNorm):
    """BatchNorm with statistics over the micro-batches of all ranks (equal sizes on each rank).

    Takes `[B, C, ...]` of any rank of tensor. Parameters, buffers and `state_dict` keys are those of `nn.BatchNorm*d`.
    Two all-reduces of C values forward and two backward.
    """

    collectives: Collectives

    @classmethod
    def like(cls, layer: _BatchNorm, collectives: Collectives) -> SynchronizedBatchNorm:
        """A synchronised layer that shares the parameters and buffers of `layer`."""
        new = cls(
            layer.num_features,
            layer.eps,
            layer.momentum,
            layer.affine,
            layer.track_running_stats,
            device="meta",
        )
        new._parameters.update(layer._parameters)
        new._buffers.update(layer._buffers)
        new.collectives = collectives
        return new.train(layer.training)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, ...], got a tensor of shape {tuple(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises `input`, in float32 or better inside, and returns its dtype and memory layout."""
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        shape = [1, -1] + [1] * (input.ndim - 2)
        dims = [0, *range(2, input.ndim)]
        values = input if input.dtype == torch.float64 else input.float()
        world_size = self.collectives.world.world_size
        mean = _SumOverRanks.apply(values.mean(dims), self.collectives) / world_size
        values = values - mean.view(shape)  # before squaring: E[x^2] - E[x]^2 would cancel
        variance = _SumOverRanks.apply(values.square().mean(dims), self.collectives) / world_size
        self._track(mean, variance, input.numel() // input.shape[1] * world_size)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        normalized = values * scale.view(shape)
        return (normalized + self.bias.view(shape) if self.affine else normalized).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)


def apply_batch_norm_mode(module: nn.Module, mode: BatchNormMode, collectives: Collectives) -> nn.Module:
    """Sets the mode of every BatchNorm layer in `module`, in place; `state_dict` keys stay. Returns `module`."""
    if mode == "synchronized":
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm) and not isinstance(child, SynchronizedBatchNorm):
                    setattr(parent, name, SynchronizedBatchNorm.like(child, collectives))
    elif mode == "frozen":
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
    return module


def set_training(module: nn.Module, mode: BatchNormMode) -> None:
    """`module.train()`, except that frozen batch norm stays in evaluation mode."""
    module.train()
    if mode == "frozen":
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
