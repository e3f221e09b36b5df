"""The weight average has the half-life it says, at any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.ema import WeightAverage


@pytest.mark.parametrize("batch_clips", [5, 20, 100])
def test_the_first_weights_have_half_their_influence_after_the_half_life(batch_clips):
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(dict(model.named_parameters()), half_life_clips=100)
    nn.init.constant_(model.weight, 0.0)
    for _ in range(100 // batch_clips):
        average.update(batch_clips)
    assert average.averages["weight"].item() == pytest.approx(0.5, abs=1e-6)


def test_the_model_holds_the_average_inside_the_block_only():
    model = nn.Linear(2, 2)
    average = WeightAverage(dict(model.named_parameters()), half_life_clips=10)
    own = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    with average.in_place():
        assert torch.equal(model.weight, own)
    assert torch.equal(model.weight, own + 1.0)


def test_averages_of_another_model_are_refused():
    average = WeightAverage(dict(nn.Linear(2, 2).named_parameters()), half_life_clips=10)
    with pytest.raises(ValueError, match="another model"):
        average.load_state_dict({"other": torch.zeros(1)})
