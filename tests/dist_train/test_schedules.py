"""Schedules and optimizer groups as pure functions, against values worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_train.optimizers import OptimizerConfig, make_optimizer, set_learning_rate
from dist_train.schedules import ScheduleConfig, learning_rate_factor


def _factor(config, clips_seen, *, total=10_000, start=0.25):
    return learning_rate_factor(
        config, clips_seen=clips_seen, clips_per_epoch=1_000, total_clips=total, start_factor=start
    )


@pytest.mark.parametrize(
    "clips_seen,expected",
    [(0, 0.25), (1_000, 0.625), (2_000, 1.0), (6_000, 0.5), (10_000, 0.0), (4_000, 0.5 * (1 + math.cos(math.pi / 4)))],
)
def test_cosine_after_a_linear_warm_up(clips_seen, expected):
    assert _factor(ScheduleConfig(kind="cosine", warmup_epochs=2), clips_seen) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("clips_seen,expected", [(0, 1.0), (2_999, 1.0), (3_000, 0.1), (7_000, 0.01)])
def test_steps_at_the_milestones(clips_seen, expected):
    config = ScheduleConfig(kind="step", warmup_epochs=0, milestones_epochs=(3, 7))
    assert _factor(config, clips_seen) == pytest.approx(expected)


def test_warm_up_moves_at_every_iteration_and_its_start_can_be_given():
    config = ScheduleConfig(kind="constant", warmup_epochs=1, warmup_start_factor=0.0)
    assert [_factor(config, clips) for clips in (0, 250, 500, 1_000)] == [0.0, 0.25, 0.5, 1.0]


def test_a_warm_up_longer_than_the_run_never_passes_the_peak():
    config = ScheduleConfig(kind="constant", warmup_epochs=50)
    assert _factor(config, 9_999, total=10_000) < 1.0


@pytest.mark.parametrize("clips_seen,expected", [(0, 1.0), (5_000, 0.1 + 0.9 * 0.25), (10_000, 0.1)])
def test_a_polynomial_ends_at_its_end_factor(clips_seen, expected):
    config = ScheduleConfig(kind="polynomial", warmup_epochs=0, power=2, end_factor=0.1)
    assert _factor(config, clips_seen) == pytest.approx(expected)


@pytest.mark.parametrize("rule,expected", [("linear", 3.2), ("sqrt", 0.1 * math.sqrt(32)), ("none", 0.1)])
def test_the_rate_follows_the_batch_by_its_rule(rule, expected):
    config = OptimizerConfig(base_learning_rate=0.1, base_batch_clips=256, learning_rate_rule=rule)
    assert config.peak_learning_rate(8192) == pytest.approx(expected)


def test_norm_and_bias_have_no_weight_decay_and_the_rest_has():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = make_optimizer(
        OptimizerConfig(weight_decay=0.5, momentum=0.0, nesterov=False), model, learning_rate=0.1
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if parameter.ndim > 1 else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_nesterov_step_worked_by_hand():
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 1.0)
    optimizer = make_optimizer(OptimizerConfig(momentum=0.5, weight_decay=0.0), weight, learning_rate=0.1)
    for gradient in (2.0, 1.0):
        weight.weight.grad = torch.full_like(weight.weight, gradient)
        optimizer.step()
    # v1 = 2, step 2 + .5*2 = 3; v2 = .5*2 + 1 = 2, step 1 + .5*2 = 2: 1 - .1*3 - .1*2
    assert weight.weight.item() == pytest.approx(0.5)


def test_the_schedule_moves_every_group():
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(OptimizerConfig(), model, learning_rate=0.4)
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]


@pytest.mark.parametrize(
    "config,words",
    [
        (OptimizerConfig(base_learning_rate=0), "base_learning_rate is 0"),
        (OptimizerConfig(momentum=0.0), "nesterov needs a momentum"),
        (OptimizerConfig(momentum=1.0), "momentum is 1.0"),
        (OptimizerConfig(weight_decay=-1), "weight_decay is -1"),
        (ScheduleConfig(warmup_epochs=-1), "warmup_epochs is -1"),
        (ScheduleConfig(milestones_epochs=(4, 2)), "must rise"),
        (ScheduleConfig(gamma=0), "gamma is 0"),
    ],
)
def test_a_wrong_value_is_named(config, words):
    assert any(words in problem for problem in config.problems())


def test_the_defaults_are_sound():
    assert OptimizerConfig().problems() == ScheduleConfig().problems() == []
