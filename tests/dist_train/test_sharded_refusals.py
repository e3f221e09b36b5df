"""What the sharded strategies cannot do is an error that says so: never a wrong gradient, never a silent decay."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from torch import nn

from dist_train.collectives import Collectives
from dist_train.optimizers import LARS
from dist_train.phases import Phase
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.world import World
from tests.dist_train.sharded import SHARDED, BlockModel, needs_deepspeed
from tests.ranks import run_ranks


def _phase(module: nn.Module, **options) -> Phase:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(module.parameters(), lr=0.1)
    return Phase(**{"name": "p", "module": module, "optimizer": optimizer, **options})


def _strategy(name, world=None):
    return make_strategy(ExchangeConfig(strategy=name), Collectives(world or World()))


@pytest.fixture
def shared():
    module = nn.Linear(2, 2)
    return [_phase(module, name="d"), _phase(module, name="d_reg")]


def test_a_declared_double_backward_is_refused():
    with pytest.raises(ValueError, match=r"double_backward.*'fsdp2' cannot: use allreduce"):
        _strategy("fsdp2").prepare([_phase(nn.Linear(2, 2), double_backward=True)])


def test_phases_that_share_a_module_are_refused(shared):
    with pytest.raises(ValueError, match="'d' and 'd_reg' share parameters"):
        _strategy("fsdp2").prepare(shared)


@pytest.mark.parametrize("strategy", ["allreduce", "ddp", "fsdp2"])
def test_an_optimizer_of_another_module_is_refused(strategy):
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="not its module's"):
        _strategy(strategy).prepare([_phase(nn.Linear(2, 2), optimizer=stranger)])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_module_that_is_called_by_its_parts_is_refused(strategy):
    with pytest.raises(ValueError, match=r"phase 'p' calls parts of its module.*use allreduce"):
        _strategy(strategy).prepare([_phase(nn.Linear(2, 2), calls_parts=True)])


def test_a_scalar_parameter_is_refused_by_its_name():
    module = nn.Linear(2, 2)
    module.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="parameter scale of phase 'p' is a scalar"):
        _strategy("fsdp2").prepare([_phase(module)])


def test_a_missing_deepspeed_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"^exchange.strategy is 'zero2', which needs DeepSpeed: pip install"):
        _strategy("zero2")


def _refusals_of_zero(world):
    module = BlockModel()
    frozen = BlockModel()
    frozen.stem.requires_grad_(False)
    cases = {
        "double": [_phase(module, double_backward=True)],
        "two": [_phase(nn.Linear(2, 2), name="g"), _phase(nn.Linear(2, 2), name="d")],
        "lars": [_phase(module, optimizer=LARS(module.parameters(), lr=0.1))],
        "frozen": [_phase(frozen)],
    }
    found = {}
    for name, phases in cases.items():
        try:
            _strategy("zero1", world).prepare(phases)
        except ValueError as error:
            found[name] = str(error)
    return found


@needs_deepspeed
def test_zero_refuses_what_it_would_do_wrong():
    (found,) = run_ranks(_refusals_of_zero, 1)
    assert "double_backward" in found["double"]
    assert "one phase, and this task has 2 (g, d)" in found["two"]
    assert "which LARS cannot" in found["lars"]
    assert "frozen parameters" in found["frozen"]


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b, self.unused = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, inputs: torch.Tensor, heads: str) -> torch.Tensor:
        return sum(getattr(self, head)(self.body(inputs).tanh()) for head in heads).square().mean()


def _inputs(rank):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(rank))


def _unused_and_penalised(world, name):
    """A step in which ranks use different heads, and a gradient penalty that nobody declared."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(1)
    module = _TwoHeads()
    strategy = _strategy(name, world)
    (phase,) = strategy.prepare([_phase(module)])
    strategy_says = []
    phase.optimizer.zero_grad()
    with strategy.micro_batch(phase, synchronize=True):
        strategy.backward(phase, phase.module(_inputs(world.rank), "ab"[world.rank]))
    try:
        strategy.finish(phase)
        gradients = strategy.whole(
            phase,
            {n: _local(p.grad, p) for n, p in module.named_parameters() if p.grad is not None}
            | {n: torch.zeros_like(_local(p, p)) for n, p in module.named_parameters() if p.grad is None},
        )
        none = [n for n, p in module.named_parameters() if p.grad is None]
    except RuntimeError as error:
        strategy_says.append(str(error))
        gradients, none = {}, []
    strategy.close()

    strategy = _strategy(name, world)
    penalised = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    (phase,) = strategy.prepare([_phase(penalised)])
    inputs = _inputs(world.rank).requires_grad_()
    with strategy.micro_batch(phase, synchronize=True):
        try:
            (slope,) = torch.autograd.grad(phase.module(inputs).sum(), inputs, create_graph=True)
            strategy.backward(phase, slope.square().sum())
        except RuntimeError as error:
            strategy_says.append(str(error))
    return gradients, none, strategy_says


def _local(tensor, like):
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


@pytest.mark.parametrize("strategy", SHARDED)
def test_unused_parameters_are_exact_or_an_error_and_a_hidden_gradient_penalty_is_an_error(strategy):
    by_rank = run_ranks(_unused_and_penalised, 2, strategy)
    gradients, none, said = by_rank[0]
    if strategy == "fsdp2":
        torch.manual_seed(1)
        module = _TwoHeads()
        (sum(module(_inputs(rank), "ab"[rank]) for rank in range(2)) / 2).backward()
        assert (
            none
            == [name for name, p in module.named_parameters() if p.grad is None]
            == ["unused.weight", "unused.bias"]
        )
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-6)
    else:
        assert "some rank gave" in said[0]
        assert all(rank[2][0] == said[0] for rank in by_rank)
    assert "takes a gradient outside of Strategy.backward (a gradient penalty?)" in said[-1]
