"""Every GAN takes the steps of one process with the whole batch, in all its phases, and resumes with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.checkpoint import CheckpointConfig, load_latest
from dist_train.collectives import Collectives
from dist_train.gan.draws import normal_draws, uniform_draws
from dist_train.loop import train
from dist_train.run import TrainingConfig
from dist_train.strategies import ExchangeConfig
from dist_train.tasks.gan import GANConfig
from dist_train.world import World
from models.gan import ProjectionDiscriminator, ProjectionGenerator, StyleGAN2Discriminator, StyleGAN2Generator
from tests.dist_train.gan.toy import gan_run, image_batch
from tests.ranks import run_ranks

STYLEGAN = GANConfig(
    r1_gamma=1.0,
    r1_interval=2,
    path_length_weight=2.0,
    path_length_interval=3,
    style_mixing=0.5,
    augmentation=("translation", "cutout"),
)
TRAINING = TrainingConfig(batch_clips=12, epochs=3, evaluate_every_epochs=0, log_every_steps=2, seed=4)


class _Frozen(nn.BatchNorm2d):
    """Batch norm that never looks at the batch, so that the ranks' shares do not matter."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def _players(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    if kind == "stylegan2":
        options = {"size": 8, "channels": 1, "channel_base": 64, "max_channels": 8}
        generator, discriminator = (
            StyleGAN2Generator(latent_size=8, **options),
            StyleGAN2Discriminator(stddev_group=2, **options),
        )
    elif kind == "conditional":
        generator = ProjectionGenerator(size=16, num_classes=2, channels=1, latent_size=8, width=8)
        discriminator = ProjectionDiscriminator(size=16, num_classes=2, channels=1, width=8)
        generator.blocks = generator.blocks[:1]  # 8 pixels
    else:
        generator = _Latent(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))))
        discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Flatten(0)
        )
    for module in (generator, discriminator):
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = _Frozen
    return generator.double(), discriminator.double()


class _Latent(nn.Module):
    """Gives a network the latent's size."""

    latent_size = 8

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.layers(latents)


KINDS = {
    "stylegan2": STYLEGAN,
    "conditional": GANConfig(loss="hinge", r1_gamma=1.0, r1_interval=2, augmentation=("cutout",)),
    "plain": GANConfig(loss="least_squares", augmentation=("color",)),
}


def _train(world, folder, kind, stop_at=None, resume=False):
    found = []
    run = gan_run(
        world,
        Path(folder),
        TRAINING,
        players=_players(kind),
        gan=KINDS[kind],
        conditional=kind == "conditional",
        checkpoint=CheckpointConfig(every_epochs=0),
        on_step=found.append,
        stop_requested=lambda: stop_at is not None and found[-1] >= stop_at,
    )
    start = load_latest(Path(folder), collectives=Collectives(world)) if resume else None
    outcome = train(run, start)
    state = {
        f"{phase.name}/{name}": value.clone()
        for phase in run.task.phases
        for name, value in phase.module.state_dict().items()
    }
    return state, outcome.evaluation, outcome.step


@pytest.mark.parametrize("kind", KINDS)
def test_two_and_three_processes_take_the_steps_of_one(tmp_path, kind):
    (alone,) = run_ranks(_train, 1, tmp_path / "1", kind)
    start = _players(kind)[0].state_dict()
    assert any(not torch.equal(alone[0][f"g/{name}"], value) for name, value in start.items())
    for world_size in (2, 3):
        ranks = run_ranks(_train, world_size, tmp_path / str(world_size), kind)
        for name, expected in alone[0].items():
            torch.testing.assert_close(ranks[0][0][name], expected, rtol=0, atol=1e-5, msg=name)
            for other in ranks[1:]:
                assert torch.equal(other[0][name], ranks[0][0][name]), f"ranks differ in {name}"
        for name, expected in alone[1].items():
            assert ranks[0][1][name] == pytest.approx(expected, rel=1e-3, abs=1e-4), name


def _train_with(world, folder, strategy):
    """The conditional players without penalties: their whole state, on rank 0."""
    players, gan = _players("conditional"), GANConfig(loss="hinge")
    exchange = ExchangeConfig(strategy=strategy)
    run = gan_run(world, Path(folder), TRAINING, players=players, gan=gan, conditional=True, exchange=exchange)
    train(run)
    state = run.strategy.state(run.task.phases)
    run.strategy.close()
    return {f"{name}/{key}": v.clone() for name, part in state.get("modules", {}).items() for key, v in part.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_wrapped_and_sharded_players_take_the_steps_of_one_process(tmp_path, strategy):
    """The generator's gradient passes through the discriminator's module, which is another phase's and frozen then."""
    (alone,) = run_ranks(_train_with, 1, tmp_path / "1", "allreduce")
    many, *_ = run_ranks(_train_with, 2, tmp_path / "2", strategy)
    for name, expected in alone.items():
        torch.testing.assert_close(many[name], expected, rtol=0, atol=1e-8, msg=name)


def _path_length(world, folder):
    """The gradient of the path-length penalty on 6 samples, and the mean path length."""
    run = gan_run(world, Path(folder), TRAINING, players=_players("stylegan2"), gan=STYLEGAN)
    phase = next(phase for phase in run.task.phases if phase.name == "g_reg")
    share = 6 // world.world_size
    positions = torch.arange(world.rank * share, (world.rank + 1) * share)
    sum(run.task.losses(phase, image_batch(positions, positions)).values()).backward()
    gradients = [p.grad for p in phase.parameters() if p.grad is not None]
    for gradient in gradients:
        run.collectives.sum_(gradient).div_(world.world_size)
    return gradients, phase.module.mean_path_length


def test_the_path_length_penalty_is_exact_where_ranks_have_odd_shares(tmp_path):
    ((expected, mean),) = run_ranks(_path_length, 1, tmp_path)
    for gradients, own_mean in run_ranks(_path_length, 2, tmp_path):
        torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-8)
        torch.testing.assert_close(own_mean, mean)


def test_a_layer_that_came_frozen_stays_as_it_is(tmp_path):
    players = _players("plain")
    layer = players[1][1].requires_grad_(False)
    before = layer.weight.clone()
    train(gan_run(World(), tmp_path, TRAINING, players=players, gan=KINDS["plain"]))
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None


def test_phases_of_one_module_share_its_weight_average(tmp_path):
    training = replace(TRAINING, ema_half_life_clips=24)
    run = gan_run(World(), tmp_path, training, players=_players("stylegan2"), gan=STYLEGAN)
    train(run)
    saved = load_latest(tmp_path, collectives=run.collectives)
    assert set(saved.state["modules"]) == {"d", "d_reg", "g", "g_reg"}
    assert set(saved.state["averages"]) == {"d", "g"}


def test_a_resumed_gan_ends_in_the_same_bits(tmp_path):
    whole, evaluation, steps = _train(World(), tmp_path / "whole", "stylegan2")
    *_, stopped = _train(World(), tmp_path / "parts", "stylegan2", stop_at=4)
    assert stopped == 4 < steps
    resumed, again, _ = _train(World(), tmp_path / "parts", "stylegan2", resume=True)
    for name, expected in whole.items():
        assert torch.equal(resumed[name], expected), name
    assert again == evaluation


def test_draws_belong_to_a_position_and_look_normal_and_uniform():
    positions = torch.arange(2_000)
    normal = normal_draws(positions, 8, seed=1, stream="d")
    assert torch.equal(normal_draws(positions[7:9], 8, seed=1, stream="d"), normal[7:9])
    assert not torch.equal(normal_draws(positions, 8, seed=1, stream="g"), normal)
    assert not torch.equal(normal_draws(positions, 8, seed=2, stream="d"), normal)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert abs(torch.corrcoef(normal.T) - torch.eye(8)).max() < 0.1
    uniform = uniform_draws(positions, 3, seed=1, stream="d")
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert normal_draws(positions[:0], 4, seed=1, stream="d").shape == (0, 4)


@pytest.mark.parametrize(
    "config,words",
    [
        (GANConfig(r1_gamma=-1), "r1_gamma is -1"),
        (GANConfig(path_length_interval=0), "path_length_interval is 0"),
        (GANConfig(style_mixing=0.9), "need a style-based generator"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_named(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        gan_run(World(), tmp_path, TRAINING, players=_players("plain"), gan=config)
