"""Activation checkpointing gives the same bits in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from dist_train.batch_norm import apply_batch_norm_mode
from dist_train.blocks import repeated_blocks
from dist_train.collectives import Collectives
from dist_train.recompute import apply_recomputation
from dist_train.strategies import ExchangeConfig
from dist_train.world import World
from models.video import build
from tests.dist_train.sharded import Block, BlockModel
from tests.ranks import run_ranks


class _Noisy(nn.Module):
    """A block with everything that a second computation could get wrong."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.BatchNorm2d(width, momentum=None)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.dropout(self.norm(self.conv(images)).relu())


def _model(block: type[nn.Module] = _Noisy) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(block(6), block(6)), nn.Flatten(), nn.Linear(6 * 36, 2))


def _two_steps(model: nn.Module, *, forwards: int = 2) -> dict[str, torch.Tensor]:
    """State and gradients after two steps of several forwards each."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(torch.randn(4, 3, 8, 8)).square().mean() for _ in range(forwards)).backward()
        optimizer.step()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
    return {**{name: value.clone() for name, value in model.state_dict().items()}, **gradients}


@pytest.mark.parametrize("mode", ["local", "synchronized", "frozen"])
def test_weights_gradients_buffers_and_dropout_are_the_same_bits(mode):
    plain = apply_batch_norm_mode(_model(), mode, Collectives(World()))
    recomputed = apply_recomputation(copy.deepcopy(plain), "blocks")
    expected, found = _two_steps(plain), _two_steps(recomputed)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_running_statistics_move_once_a_forward_and_not_again_in_backward():
    model = apply_recomputation(_model(Block), "blocks")
    loss = model(torch.randn(4, 3, 8, 8)).sum()
    layer = model[1][0].norm
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    identities = [id(buffer) for buffer in layer.buffers()]
    loss.backward()
    assert layer.num_batches_tracked == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert [id(buffer) for buffer in layer.buffers()] == identities


def test_a_gradient_penalty_through_recomputed_blocks_is_exact():
    results = []
    for mode in ("off", "blocks"):
        model = apply_recomputation(_model(Block), mode).double()
        inputs = torch.randn(
            4, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        ).requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_blocks_are_the_models_own_or_those_of_its_containers():
    network = build("tsn_resnet18", num_classes=4, num_segments=2, width=8)
    assert repeated_blocks(network) == list(network.blocks())
    assert len(repeated_blocks(BlockModel())) == 2
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    with pytest.raises(ValueError, match="has no repeated blocks"):
        apply_recomputation(nn.Linear(2, 2), "blocks")
    liar = nn.Linear(2, 2)
    liar.blocks = 3
    with pytest.raises(ValueError, match=r"Linear\.blocks has to give"):
        repeated_blocks(liar)


def _train(world, strategy, mode):
    from dist_train.phases import Phase
    from dist_train.strategies import make_strategy

    torch.manual_seed(0)
    model = apply_recomputation(BlockModel(), mode)
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(strategy=strategy), Collectives(world))
    (phase,) = strategy.prepare([phase])
    for step in range(3):
        phase.optimizer.zero_grad()
        torch.manual_seed(10 * step + world.rank)
        with strategy.micro_batch(phase, synchronize=True):
            strategy.backward(phase, phase.module(torch.randn(2, 2, 3, 8, 8)).square().mean())
        strategy.finish(phase)
        strategy.optimizer_step(phase)
    return {name: value.clone() for name, value in strategy.whole(phase, strategy.weights(phase)).items()}


@pytest.mark.parametrize("strategy", ["allreduce", "ddp", "fsdp2"])
def test_under_a_strategy_the_bits_are_the_same_too(strategy):
    plain, recomputed = (run_ranks(_train, 2, strategy, mode)[0] for mode in ("off", "blocks"))
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name
