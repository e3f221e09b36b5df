"""A checkpoint has one form: what one strategy saved, any other continues, at another world size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dist_train.checkpoint import load_latest, read_checkpoint
from dist_train.loop import train
from dist_train.run import TrainingConfig
from tests.dist_train.sharded import block_run, weights_of, whole_state
from tests.ranks import run_ranks

TRAINING = TrainingConfig(
    batch_clips=12,
    epochs=2,
    batch_norm="synchronized",
    ema_half_life_clips=24,
    evaluate_every_epochs=0,
    log_every_steps=1,
)
DEEPSPEED = ["zero1", "zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
STRATEGIES = ["allreduce", "ddp", "fsdp2", *DEEPSPEED]


def _save(world, folder, strategies):
    """Stops after half of the steps; then, in another folder, does not stop."""
    whole = {}
    for strategy in strategies:
        for name, stop in (("stopped", 4), ("whole", 99)):
            steps = []
            run = block_run(
                world,
                Path(folder) / strategy / name,
                TRAINING,
                strategy,
                channels_last=True,
                on_step=steps.append,
                stop_requested=lambda steps=steps, stop=stop: len(steps) >= stop,
            )
            train(run)
            whole[strategy] = whole_state(run)
            run.strategy.close()
    return whole


def _resume(world, folder, pairs):
    """Continues under the second strategy what the first has saved."""
    found = []
    for number, (saved_by, strategy) in enumerate(pairs):
        run = block_run(
            world, Path(folder) / f"resumed_{world.world_size}_{number}", TRAINING, strategy, channels_last=True
        )
        start = load_latest(Path(folder) / saved_by / "stopped", collectives=run.collectives)
        assert start is not None
        assert start.step == 4
        train(run, start)
        found.append(whole_state(run))
        run.strategy.close()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two ranks under each strategy: the folder, and the whole state after the undisturbed run."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(_save, 2, folder, STRATEGIES, timeout=240)[0]


def _state_in(folder, strategy):
    latest = (folder / strategy / "stopped" / "checkpoints" / "latest").read_text().strip()
    return read_checkpoint(folder / strategy / "stopped" / "checkpoints" / latest).state


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_what_lies_in_a_checkpoint_does_not_depend_on_the_strategy(saved, strategy):
    folder, _ = saved
    expected, state = _state_in(folder, "allreduce"), _state_in(folder, strategy)
    assert list(weights_of(state)) == list(weights_of(expected))
    groups, expected_groups = (each["optimizers"]["classify"]["param_groups"] for each in (state, expected))
    assert groups == expected_groups
    for part in ("modules", "averages", "optimizers"):
        torch.testing.assert_close(
            state[part]["classify"],
            expected[part]["classify"],
            rtol=0,
            atol=1e-5,
            msg=lambda m, part=part: f"{part}: {m}",
        )


def test_a_run_continues_bit_for_bit_under_its_own_strategy(saved):
    folder, whole = saved
    for strategy, state in zip(
        STRATEGIES, run_ranks(_resume, 2, folder, [(name, name) for name in STRATEGIES], timeout=240)[0], strict=True
    ):
        for key, value in weights_of(whole[strategy]).items():
            assert torch.equal(weights_of(state)[key], value), (strategy, key)


@pytest.mark.thorough
def test_a_run_continues_under_every_other_strategy_on_three_ranks(saved):
    """Each strategy saves for one that works otherwise, and each continues; to 1e-5: sums have another order."""
    folder, whole = saved
    pairs = [(saved_by, STRATEGIES[(number + 2) % len(STRATEGIES)]) for number, saved_by in enumerate(STRATEGIES)]
    for (saved_by, strategy), state in zip(pairs, run_ranks(_resume, 3, folder, pairs, timeout=240)[0], strict=True):
        torch.testing.assert_close(
            weights_of(state),
            weights_of(whole["allreduce"]),
            rtol=0,
            atol=1e-5,
            msg=lambda m, pair=(saved_by, strategy): f"{pair}: {m}",
        )


def test_one_process_continues_what_two_have_sharded(saved):
    folder, whole = saved
    sharded = [name for name in STRATEGIES if name not in ("allreduce", "ddp")]
    for state in run_ranks(_resume, 1, folder, [(name, "allreduce") for name in sharded])[0]:
        torch.testing.assert_close(weights_of(state), weights_of(whole["allreduce"]), rtol=0, atol=1e-5)
