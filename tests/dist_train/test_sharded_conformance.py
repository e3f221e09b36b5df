"""FSDP2 and ZeRO train as one process with the whole batch does, and as `allreduce` does.

Where bits are equal: two ranks, one micro-batch, no clipping, against `allreduce` on two ranks (a sum of two numbers
has one order), with weights in the plain layout, which is the one these strategies need (convolutions of channels-last
weights round differently). Elsewhere sums have another order, and weights agree to 1e-5 after twelve steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.collectives import Collectives
from dist_train.loop import train
from dist_train.phases import Phase
from dist_train.run import TrainingConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from tests.dist_train.sharded import SHARDED, BlockModel, block_run, needs_deepspeed, weights_of, whole_state
from tests.ranks import run_ranks

SYNCHRONIZED = TrainingConfig(batch_clips=12, epochs=3, batch_norm="synchronized", ema_half_life_clips=24)
CASES = {
    "synchronized batch norm, weight average": (SYNCHRONIZED, "sgd"),
    "accumulation and clipping": (
        TrainingConfig(batch_clips=12, epochs=3, batch_norm="frozen", micro_batches=2, clip_gradient_norm=0.1),
        "sgd",
    ),
    "AdamW": (TrainingConfig(batch_clips=12, epochs=3, batch_norm="frozen"), "adamw"),
    "local batch norm": (TrainingConfig(batch_clips=12, epochs=1), "sgd"),
}


def _train_cases(world, folder, strategy, names):
    found = {}
    for name in names:
        training, optimizer = CASES[name]
        run = block_run(
            world, Path(folder) / strategy / f"{world.world_size}" / name, training, strategy, optimizer=optimizer
        )
        outcome = train(run)
        found[name] = (whole_state(run), outcome.evaluation)
        run.strategy.close()
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """One process with the whole batch, and `allreduce` on two ranks."""
    folder = tmp_path_factory.mktemp("expected")
    (alone,) = run_ranks(_train_cases, 1, folder, "allreduce", list(CASES))
    return alone, run_ranks(_train_cases, 2, folder, "allreduce", list(CASES))[0]


@pytest.mark.parametrize("strategy", SHARDED)
def test_two_ranks_equal_one_process_with_the_whole_batch(tmp_path, expected, strategy):
    alone, two = expected
    got, *_ = run_ranks(_train_cases, 2, tmp_path, strategy, list(CASES))
    for name, (state, evaluation) in got.items():
        reference, judged = (two if name == "local batch norm" else alone)[name]  # local statistics depend on the ranks
        _assert_close(state, reference, name)
        assert evaluation == pytest.approx(judged, abs=1e-5), name
    for name in ("synchronized batch norm, weight average", "local batch norm"):
        for key, value in weights_of(two[name][0]).items():
            assert torch.equal(weights_of(got[name][0])[key], value), (name, key)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_three_ranks_equal_one_process_with_the_whole_batch(tmp_path, expected, strategy):
    """No parameter's size is divisible by three, and the ranks evaluate different numbers of batches."""
    name = "synchronized batch norm, weight average"
    got, *_ = run_ranks(_train_cases, 3, tmp_path, strategy, [name])
    reference, judged = expected[0][name]
    _assert_close(got[name][0], reference, name)
    assert got[name][1] == pytest.approx(judged, abs=1e-5)


def _assert_close(state, reference, name):
    torch.testing.assert_close(
        weights_of(state), weights_of(reference), rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}"
    )
    ours, theirs = state["optimizers"]["classify"], reference["optimizers"]["classify"]
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=2e-5, msg=lambda m: f"{name}: {m}")


def _weights_after_a_forward_pass_alone(world):
    """What a rank holds before and after it has called the module without a backward pass, and after an update."""
    torch.manual_seed(1)
    module = BlockModel()
    phase = Phase(name="p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    strategy = make_strategy(ExchangeConfig(strategy="fsdp2"), Collectives(world))
    (phase,) = strategy.prepare([phase])
    clips = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    before = {name: part.clone() for name, part in strategy.weights(phase).items()}
    with torch.no_grad():
        phase.module(clips)
    after = {name: part.clone() for name, part in strategy.weights(phase).items()}
    whole = strategy.whole(phase, strategy.weights(phase))
    with strategy.evaluating([phase]), torch.no_grad():
        evaluated = phase.module(clips)
    return before, after, {name: value.shape for name, value in whole.items()}, evaluated


def test_a_forward_pass_alone_does_not_leave_whole_weights_behind_under_fsdp2():
    ranks = run_ranks(_weights_after_a_forward_pass_alone, 2)
    shapes = {name: parameter.shape for name, parameter in BlockModel().named_parameters()}
    assert ranks[0][2] == shapes
    for before, after, _, evaluated in ranks:
        assert any(part.shape != shapes[name] for name, part in before.items())
        for name, part in before.items():
            assert torch.equal(after[name], part), name
        assert torch.equal(evaluated, ranks[0][3])
