"""SyncBatchNorm over ranks equals BatchNorm over the whole batch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dist_train.horovod as hvd
from dist_train.horovod.basics import leave_world
from tests.dist_train.horovod.test_optimizer import ranks

SIZES = {2: [3, 5], 3: [0, 1, 6]}


def compare(dtype: torch.dtype, affine: bool, momentum: float | None) -> None:
    torch.manual_seed(0)
    sizes = SIZES[hvd.size()]
    whole = (torch.randn(sum(sizes), 4, 3, 2) * 3 + 100).to(dtype)
    parts = whole.split(sizes)
    part = parts[hvd.rank()].clone().requires_grad_()
    whole.requires_grad_()
    weights = torch.randn(whole.shape, dtype=dtype)
    synchronized = hvd.SyncBatchNorm(4, affine=affine, momentum=momentum).to(dtype)
    plain = nn.BatchNorm2d(4, affine=affine, momentum=momentum).to(dtype)
    if affine:
        for layer in (synchronized, plain):
            nn.init.constant_(layer.weight, 1.5)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for _ in range(2):
        got, expected = synchronized(part), plain(whole)
    torch.testing.assert_close(got, expected.split(sizes)[hvd.rank()], **tolerance)
    torch.testing.assert_close(synchronized.state_dict(), plain.state_dict(), **tolerance)
    (got * weights.split(sizes)[hvd.rank()]).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(part.grad, whole.grad.split(sizes)[hvd.rank()], **tolerance)
    if affine:
        for name in ("weight", "bias"):
            mine = hvd.allreduce(getattr(synchronized, name).grad, op=hvd.Sum)
            torch.testing.assert_close(mine, getattr(plain, name).grad, rtol=1e-3, atol=1e-3)
    synchronized.eval(), plain.eval()
    torch.testing.assert_close(synchronized(part), plain(whole).split(sizes)[hvd.rank()], **tolerance)


@pytest.mark.parametrize(
    "world_size, dtype, affine, momentum",
    [(2, torch.float32, True, 0.1), (3, torch.float64, True, None), (2, torch.float64, False, 0.3)],
)
def test_unequal_batches_are_normalised_as_one(world_size, dtype, affine, momentum):
    ranks(compare, world_size, dtype, affine, momentum)


def test_one_rank_normalises_alone_and_bad_input_raises():
    hvd.init()
    layer = hvd.SyncBatchNorm(3)
    batch = torch.randn(4, 3)
    torch.testing.assert_close(layer(batch), nn.BatchNorm1d(3)(batch))
    with pytest.raises(ValueError, match="at least 2D"):
        layer(torch.randn(3))
    leave_world()
