"""Synchronised batch norm is batch norm of the whole batch: forward, backward, and twice backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.batch_norm import SynchronizedBatchNorm, apply_batch_norm_mode, set_training, statistics_anew
from dist_train.collectives import Collectives
from dist_train.world import World
from tests.ranks import run_ranks


def _inputs():
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1


def _norm_and_penalty(world, synchronized):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Tanh()).double()
    if synchronized:
        apply_batch_norm_mode(model, "synchronized", Collectives(world))
    share = _inputs().chunk(world.world_size)[world.rank].clone().requires_grad_()
    out = model(share)
    (slope,) = torch.autograd.grad(out.square().sum(), share, create_graph=True)
    (out.sin().sum() + slope.square().sum()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return out.detach(), slope.detach(), share.grad, gradients, dict(model.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_synchronized_equals_the_whole_batch_through_double_backward(world_size):
    out, slope, gradient, parameters, state = run_ranks(_norm_and_penalty, 1, False)[0]
    ranks = run_ranks(_norm_and_penalty, world_size, True)
    for expected, part in ((out, 0), (slope, 1), (gradient, 2)):
        torch.testing.assert_close(torch.cat([rank[part] for rank in ranks]), expected, rtol=0, atol=1e-10)
    for number, expected in enumerate(parameters):
        total = sum(rank[3][number] for rank in ranks)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)
    for name, expected in state.items():
        for rank in ranks:
            torch.testing.assert_close(rank[4][name], expected, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("mean", [0.0, 50.7, 1000.7])
def test_synchronized_is_accurate_far_from_zero(mean):
    inputs = mean + 1e-3 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    layer = SynchronizedBatchNorm.like(nn.BatchNorm1d(2), Collectives(World()))
    torch.testing.assert_close(layer(inputs), nn.BatchNorm1d(2)(inputs), rtol=0, atol=0.1)


def test_synchronized_keeps_the_names_and_objects_of_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names, weight = list(model.state_dict()), model[1].weight
    apply_batch_norm_mode(model, "synchronized", Collectives(World()))
    assert isinstance(model[1], SynchronizedBatchNorm)
    assert list(model.state_dict()) == names
    assert model[1].weight is weight


def test_synchronized_keeps_channels_last_and_the_input_dtype():
    layer = SynchronizedBatchNorm.like(nn.BatchNorm2d(4), Collectives(World()))
    inputs = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = layer(inputs)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_synchronized_in_evaluation_is_plain_batch_norm():
    plain = nn.BatchNorm2d(4)
    plain(_inputs().float())
    layer = SynchronizedBatchNorm.like(plain.eval(), Collectives(World()))
    assert torch.equal(layer(_inputs().float()), plain(_inputs().float()))


def test_frozen_statistics_do_not_move_but_scale_and_shift_train():
    model = nn.Sequential(nn.BatchNorm2d(4))
    apply_batch_norm_mode(model, "frozen", Collectives(World()))
    set_training(model, "frozen")
    model(_inputs().float()).square().sum().backward()
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    assert model[0].weight.grad is not None
    set_training(model, "local")
    model(_inputs().float())
    assert not torch.equal(model[0].running_mean, torch.zeros(4))


def _norm_of_share(world, num_groups):
    """One training step's forward and backward of a norm on this rank's share, and the averaged running statistics."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Tanh()).double()
    collectives = Collectives(world)
    apply_batch_norm_mode(model, "ghost", collectives, num_ghost_groups=num_groups)
    share = _inputs().chunk(world.world_size)[world.rank].clone().requires_grad_()
    out = model(share)
    out.sin().sum().backward()
    running = [collectives.sum_(b.clone()) / world.world_size for b in (model[1].running_mean, model[1].running_var)]
    return out.detach(), share.grad, running, int(model[1].num_batches_tracked)


@pytest.mark.parametrize("world_size,groups", [(1, 6), (2, 3), (3, 1), (3, 2)])
def test_ghost_batch_norm_depends_on_the_group_and_not_on_the_number_of_ranks(world_size, groups):
    (alone,) = run_ranks(_norm_of_share, 1, world_size * groups)
    ranks = run_ranks(_norm_of_share, world_size, groups)
    for part in (0, 1):
        torch.testing.assert_close(torch.cat([rank[part] for rank in ranks]), alone[part], rtol=0, atol=1e-12)
    for rank in ranks:
        assert rank[3] == alone[3] == 1
        for found, expected in zip(rank[2], alone[2], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_ghost_batch_norm_evaluates_as_plain_batch_norm_and_refuses_a_batch_that_does_not_divide():
    model = nn.Sequential(nn.BatchNorm2d(4)).double()
    plain = nn.BatchNorm2d(4).double().eval()
    apply_batch_norm_mode(model, "ghost", Collectives(World()), num_ghost_groups=4)
    assert torch.equal(model.eval()(_inputs()), plain(_inputs()))
    with pytest.raises(ValueError, match="a batch of 6 does not divide into 4"):
        model.train()(_inputs())


def test_partial_freezes_every_layer_but_the_first():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double()
    apply_batch_norm_mode(model, "partial", Collectives(World()))
    set_training(model, "partial")
    assert [layer.training for layer in model] == [True, False, False]
    assert [layer.weight.requires_grad for layer in model] == [True, False, False]
    model(_inputs())
    assert model[0].running_mean.abs().sum() > 0
    assert all(layer.running_mean.abs().sum() == 0 for layer in list(model)[1:])


def _statistics_anew(world):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, momentum=0.3)).double()
    shares = _inputs().chunk(6)
    with torch.no_grad(), statistics_anew(model, Collectives(world)):
        for share in shares[world.rank :: world.world_size]:
            model(share)
    return model[1].running_mean, model[1].running_var, model[1].momentum, [model[0](share) for share in shares]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_precise_statistics_are_the_means_over_all_batches_of_all_ranks(world_size):
    for mean, variance, momentum, outputs in run_ranks(_statistics_anew, world_size):
        expected = torch.stack([output.mean((0, 2, 3)) for output in outputs]).mean(0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
        expected = torch.stack([output.transpose(0, 1).flatten(1).var(1) for output in outputs]).mean(0)
        torch.testing.assert_close(variance, expected, rtol=0, atol=1e-12)
        assert momentum == 0.3
