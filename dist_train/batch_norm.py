"""Batch normalisation across processes: `local`, `ghost`, `synchronized`, `partial` or `frozen`.

- `local`: each rank normalises by its own micro-batch, as in Goyal et al. 2017 (remark on BN: keep the per-worker batch
  fixed); running statistics are averaged over the ranks after each step.
- `ghost`: as `local`, over groups of a given number of clips in the micro-batch (Hoffer et al. 2017, arXiv 1705.08741),
  so that the statistics are those of, say, 8 clips whatever a GPU holds: W ranks with B clips are one rank with W*B.
- `synchronized`: one mean and variance over all ranks' micro-batches, so W ranks with batch B equal one rank with W*B.
  PyTorch's `SyncBatchNorm` refuses CPU tensors and has no double backward; this one runs on any device, and its
  backward is made of differentiable collectives.
- `partial`: every layer but the first is frozen, scale and shift included (TSN's and the TSM repository's "partialBN").
- `frozen`: evaluation mode throughout (running statistics are used and not changed); scale and shift still train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.collectives import Collectives

BatchNormMode = Literal["local", "ghost", "synchronized", "partial", "frozen"]


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the ranks' gradients, and so on for every further derivative."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collectives: Collectives) -> torch.Tensor:
        ctx.collectives = collectives
        return collectives.sum_(tensor.clone(), name="batch norm statistics")

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _SumOverRanks.apply(gradients[0], ctx.collectives), None


class _InPlaceOf(_BatchNorm):
    """A BatchNorm of `[B, C, ...]` that takes the place of another layer and shares its parameters and buffers."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, ...], got a tensor of shape {tuple(input.shape)}")

    @classmethod
    def _sharing(cls, layer: _BatchNorm) -> Self:
        """With the parameters, buffers and mode of `layer`."""
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, device="meta")
        new._parameters.update(layer._parameters)
        new._buffers.update(layer._buffers)
        return new.train(layer.training)


class SynchronizedBatchNorm(_InPlaceOf):
    """BatchNorm with statistics over the micro-batches of all ranks (equal sizes on each rank).

    Takes `[B, C, ...]` of any rank of tensor. Parameters, buffers and `state_dict` keys are those of `nn.BatchNorm*d`.
    Two all-reduces of C values forward and two backward.
    """

    collectives: Collectives

    @classmethod
    def like(cls, layer: _BatchNorm, collectives: Collectives) -> SynchronizedBatchNorm:
        """A synchronised layer that shares the parameters and buffers of `layer`."""
        new = cls._sharing(layer)
        new.collectives = collectives
        return new

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


class GhostBatchNorm(_InPlaceOf):
    """BatchNorm of `num_groups` equal parts of the batch, each by its own mean and variance.

    Takes `[B, C, ...]` with B a multiple of `num_groups`; a part is a run of neighbouring samples (whole clips, where a
    clip's frames lie side by side). The running statistics move by the mean over the parts, as if each part had been a
    rank of its own. Parameters, buffers and `state_dict` keys are those of `nn.BatchNorm*d`.
    """

    num_groups: int

    @classmethod
    def like(cls, layer: _BatchNorm, num_groups: int) -> GhostBatchNorm:
        """A ghost layer that shares the parameters and buffers of `layer`."""
        new = cls._sharing(layer)
        new.num_groups = num_groups
        return new

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises each part of `input`; in evaluation mode all of it by the running statistics."""
        self._check_input_dim(input)
        if not self.training or self.num_groups == 1:
            return super().forward(input)
        if len(input) % self.num_groups:
            raise ValueError(
                f"ghost batch norm: a batch of {len(input)} does not divide into {self.num_groups} equal groups"
            )
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        outputs, means, variances = [], [], []
        for part in input.chunk(self.num_groups):
            if mean is not None and variance is not None:
                self.running_mean, self.running_var = mean.clone(), variance.clone()
                self.num_batches_tracked = None if count is None else count.clone()
                means.append(self.running_mean)
                variances.append(self.running_var)
            outputs.append(super().forward(part))
        if mean is not None and variance is not None:
            with torch.no_grad():
                mean.copy_(torch.stack(means).mean(0))
                variance.copy_(torch.stack(variances).mean(0))
                if count is not None:
                    count += 1
            self.running_mean, self.running_var, self.num_batches_tracked = mean, variance, count
        return torch.cat(outputs)


def apply_batch_norm_mode(
    module: nn.Module, mode: BatchNormMode, collectives: Collectives, *, num_ghost_groups: int = 1
) -> nn.Module:
    """Sets the mode of every BatchNorm layer in `module`, in place; `state_dict` keys stay. Returns `module`.

    Call it before the optimizer is made: `partial` takes parameters out of training. `num_ghost_groups` is the number
    of groups in a micro-batch, for `ghost`.
    """
    if mode in ("synchronized", "ghost"):
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm) and not isinstance(child, SynchronizedBatchNorm | GhostBatchNorm):
                    if mode == "ghost":
                        setattr(parent, name, GhostBatchNorm.like(child, num_ghost_groups))
                    else:
                        setattr(parent, name, SynchronizedBatchNorm.like(child, collectives))
    if mode == "partial":
        for layer in _frozen_layers(module, mode):
            layer.requires_grad_(False)
    _freeze(module, mode)
    return module


@contextmanager
def statistics_anew(module: nn.Module, collectives: Collectives) -> Iterator[None]:
    """Precise batch norm: running statistics become the plain means over the forward passes made in this block.

    `module` is in training mode inside; call it on training batches, without gradients. At the end the statistics are
    averaged over the ranks, which have made equally many passes. (Wu and Johnson 2021, arXiv 2105.07576, section 3: the
    moving average of training lags behind the weights; PySlowFast's Kinetics recipes take 200 batches.)
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m.training]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all passes
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            if statistic is not None:
                statistic.copy_(collectives.sum_(statistic.clone()) / collectives.world.world_size)


def set_training(module: nn.Module, mode: BatchNormMode) -> None:
    """`module.train()`, except that frozen batch norm stays in evaluation mode."""
    module.train()
    _freeze(module, mode)


def _freeze(module: nn.Module, mode: BatchNormMode) -> None:
    for layer in _frozen_layers(module, mode):
        layer.eval()


def _frozen_layers(module: nn.Module, mode: BatchNormMode) -> list[_BatchNorm]:
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    return {"frozen": layers, "partial": layers[1:]}.get(mode, [])
