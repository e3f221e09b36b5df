"""LARS and LAMB against steps worked by hand from the papers, tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_train.optimizers import (
    LAMB,
    LARS,
    OptimizerConfig,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)

STEPS = 6
RATES = [0.1, 0.2, 0.4, 0.4, 0.3, 0.05]


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((3, 4), (5,))]


def _gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,))]


def _run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range = range(STEPS)) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, _gradients(step), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()


def _lars_by_hand(nesterov: bool, correction: bool, adapt_vector: bool) -> list[torch.Tensor]:
    weights, found = [p.detach().clone() for p in _parameters()], []
    for index, weight in enumerate(weights):
        velocity, last = torch.zeros_like(weight), None
        adapt, decay = (True, 0.01) if index == 0 or adapt_vector else (False, 0.0)
        for step in range(STEPS):
            gradient, rate = _gradients(step)[index], RATES[step]
            norm, slope = math.sqrt((weight**2).sum()), math.sqrt((gradient**2).sum())
            local = 0.02 * norm / (slope + decay * norm + 1e-7) if adapt else 1.0
            update = rate * local * (gradient + decay * weight)
            scale = rate / last if correction and last else 1.0
            velocity = 0.9 * scale * velocity + update
            weight = weight - (0.9 * velocity + update if nesterov else velocity)
            last = rate
        found.append(weight)
    return found


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("adapt_vector", [False, True])
def test_lars_takes_the_steps_worked_by_hand(nesterov, correction, adapt_vector):
    matrix, vector = _parameters()
    skipped = {} if adapt_vector else {"adapt": False, "weight_decay": 0.0}
    optimizer = LARS(
        [{"params": [matrix]}, {"params": [vector], **skipped}],
        lr=1.0,
        weight_decay=0.01,
        trust_coefficient=0.02,
        nesterov=nesterov,
        momentum_correction=correction,
    )
    _run(optimizer, [matrix, vector])
    for parameter, expected in zip((matrix, vector), _lars_by_hand(nesterov, correction, adapt_vector), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_lars_without_adaptation_and_with_momentum_correction_is_pytorchs_sgd():
    ours, theirs = _parameters(), _parameters()
    lars = LARS([{"params": ours, "adapt": False}], lr=1.0, weight_decay=0.01, momentum_correction=True)
    sgd = torch.optim.SGD(theirs, lr=1.0, momentum=0.9, weight_decay=0.01)
    _run(lars, ours)
    _run(sgd, theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-12, atol=1e-12)


def _lamb_by_hand(max_norm: float, adapt_vector: bool) -> list[torch.Tensor]:
    weights = [p.detach().clone() for p in _parameters()]
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    for step in range(STEPS):
        gradients = _gradients(step)
        total = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        clip = max(1.0, total / max_norm) if max_norm else 1.0
        for index, gradient in enumerate(gradients):
            adapt, decay = (True, 0.01) if index == 0 or adapt_vector else (False, 0.0)
            gradient = gradient / clip
            moments[index][0] = 0.9 * moments[index][0] + 0.1 * gradient
            moments[index][1] = 0.99 * moments[index][1] + 0.01 * gradient**2
            mean = moments[index][0] / (1 - 0.9 ** (step + 1))
            square = moments[index][1] / (1 - 0.99 ** (step + 1))
            update = mean / (square.sqrt() + 1e-6) + decay * weights[index]
            ratio = float(weights[index].norm() / update.norm()) if adapt else 1.0
            weights[index] = weights[index] - RATES[step] * ratio * update
    return weights


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("adapt_vector", [False, True])
def test_lamb_takes_the_steps_worked_by_hand(max_norm, adapt_vector):
    matrix, vector = _parameters()
    skipped = {} if adapt_vector else {"adapt": False, "weight_decay": 0.0}
    groups = [{"params": [matrix]}, {"params": [vector], **skipped}]
    optimizer = LAMB(groups, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01, max_gradient_norm=max_norm)
    _run(optimizer, [matrix, vector])
    for parameter, expected in zip((matrix, vector), _lamb_by_hand(max_norm, adapt_vector), strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_a_zero_weight_or_gradient_gives_a_finite_step(make):
    weight, still = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([weight, still], lr=0.1, weight_decay=0.0)
    weight.grad, still.grad = torch.ones(3, 3), torch.zeros(2, 2)
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert (weight < 0).all()
    assert torch.equal(still, torch.ones(2, 2))


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_a_parameter_without_gradient_stays_and_counts_its_own_steps(make):
    used, idle = _parameters()
    optimizer = make([used, idle], lr=0.1)
    used.grad = _gradients(0)[0]
    before = idle.detach().clone()
    optimizer.step()
    assert torch.equal(idle, before)
    late = _parameters()[1]
    fresh = make([late], lr=0.1)
    idle.grad, late.grad, used.grad = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64), None
    optimizer.step()
    fresh.step()
    torch.testing.assert_close(idle, late)


@pytest.mark.parametrize(
    "make", [lambda p: LARS(p, lr=1.0, momentum_correction=True, weight_decay=0.01), lambda p: LAMB(p, lr=1.0)]
)
def test_a_state_saved_and_loaded_continues_with_the_same_bits(make, tmp_path):
    undisturbed = _parameters()
    _run(make(undisturbed), undisturbed)
    first = _parameters()
    optimizer = make(first)
    _run(optimizer, first, range(3))
    torch.save({"p": [p.detach() for p in first], "o": optimizer.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = [nn.Parameter(p) for p in saved["p"]]
    resumed = make(second)
    resumed.load_state_dict(saved["o"])
    _run(resumed, second, range(3, STEPS))
    for one, other in zip(undisturbed, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda p: LARS(p, lr=-1), "lr is -1"),
        (lambda p: LARS(p, lr=1, momentum=1.0), "momentum is 1.0"),
        (lambda p: LARS(p, lr=1, momentum=0.0, nesterov=True), "nesterov needs"),
        (lambda p: LARS(p, lr=1, trust_coefficient=0), "trust_coefficient is 0"),
        (lambda p: LAMB(p, lr=1, betas=(0.9, 1.0)), "betas are"),
        (lambda p: LAMB(p, lr=1, eps=-1), "eps is -1"),
    ],
)
def test_a_value_out_of_range_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make(_parameters())


class _Net(nn.Module):
    """A convolution with a bias, batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)


def _settings(module: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float, bool | None]]:
    names = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, config, learning_rate=0.1)
    return {
        names[id(p)]: (g["weight_decay"], round(g["initial_lr"], 12), g.get("adapt"))
        for g in groups
        for p in g["params"]
    }


def test_norm_and_bias_are_neither_decayed_nor_adapted():
    assert _settings(_Net(), OptimizerConfig(name="lars", weight_decay=0.5)) == {
        "conv.weight": (0.5, 0.1, True),
        "fc.weight": (0.5, 0.1, True),
        "conv.bias": (0.0, 0.1, False),
        "norm.weight": (0.0, 0.1, False),
        "norm.bias": (0.0, 0.1, False),
        "fc.bias": (0.0, 0.1, False),
    }


def test_the_tsm_repositorys_groups():
    """Its opts: biases x2 without decay, batch norm x1 without decay, fc x5, its bias x10."""
    config = OptimizerConfig(weight_decay=0.5, bias_learning_rate_factor=2, head_learning_rate_factor=5)
    assert _settings(_Net(), config) == {
        "conv.weight": (0.5, 0.1, None),
        "conv.bias": (0.0, 0.2, None),
        "norm.weight": (0.0, 0.1, None),
        "norm.bias": (0.0, 0.1, None),
        "fc.weight": (0.5, 0.5, None),
        "fc.bias": (0.0, 1.0, None),
    }


def test_a_frozen_parameter_is_in_no_group_and_a_model_without_head_is_told():
    net = _Net()
    net.conv.weight.requires_grad_(False)
    assert "conv.weight" not in _settings(net, OptimizerConfig())
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        parameter_groups(nn.Conv2d(3, 4, 3), OptimizerConfig(head_learning_rate_factor=5), learning_rate=0.1)


@pytest.mark.parametrize("name,kind", [("sgd", torch.optim.SGD), ("lars", LARS), ("lamb", LAMB)])
def test_an_optimizer_is_made_by_name_and_its_rate_is_scaled_by_the_schedule(name, kind):
    net = _Net()
    optimizer = make_optimizer(OptimizerConfig(name=name, head_learning_rate_factor=5), net, learning_rate=0.4)
    assert type(optimizer) is kind
    set_learning_rate(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.2, 1.0])


@pytest.mark.parametrize(
    "config,words",
    [
        (OptimizerConfig(momentum_correction=True), "momentum_correction is for lars"),
        (OptimizerConfig(name="lamb", betas=(0.9, 1.0)), "betas are"),
        (OptimizerConfig(head_learning_rate_factor=0), "head_learning_rate_factor is 0"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_named(config, words):
    assert any(words in problem for problem in config.problems())
