"""GANs as phases: discriminator, its R1 penalty, generator, its path-length penalty, each at its own interval.

    phase    trains          loss                                            at steps divisible by
    d        discriminator   how well it tells reals from fakes              1
    d_reg    discriminator   r1_gamma / 2 x R1 x interval                    r1_interval          where r1_gamma > 0
    g        generator       how well it fools the discriminator             1
    g_reg    generator       path_length_weight x deviation² x interval      path_length_interval where the weight > 0

Every random number belongs to (seed, phase, position in the stream of samples), none to a rank: W processes take the
steps of one process with the whole batch wherever batch norm is not local. Exceptions, all stated: spectral norm's
vectors move once a forward pass, so accumulation moves them more often; the mean path length and the mean style are
averaged over the ranks; noise inputs may be drawn on the device instead (`noise`), where they belong to a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from dist_train.collectives import Collectives
from dist_train.gan.augment import NUM_DRAWS, Augmentation, augment
from dist_train.gan.draws import normal_draws, uniform_draws
from dist_train.gan.losses import GANLoss, discriminator_loss, generator_loss, path_lengths, r1_penalty
from dist_train.gan.metrics import Moments, frechet_distance
from dist_train.phases import Phase, Prediction


@dataclass(frozen=True, kw_only=True)
class GANConfig:
    """What the two players minimise."""

    loss: GANLoss = "non_saturating"
    """`saturating`, `non_saturating`, `hinge` or `least_squares`."""
    r1_gamma: float = 0.0
    """Weight of the R1 penalty on the discriminator (10 in StyleGAN2 at 256 pixels); 0: none."""
    r1_interval: int = 16
    """Apply R1 at every so many steps, times as much (lazy regularisation)."""
    path_length_weight: float = 0.0
    """Weight of the path-length penalty on a style-based generator (2 in StyleGAN2); 0: none."""
    path_length_interval: int = 4
    """Apply the path-length penalty at every so many steps, times as much."""
    path_length_decay: float = 0.01
    """How fast the mean path length follows."""
    style_mixing: float = 0.0
    """Share of samples whose later layers get the style of a second latent (0.9 in StyleGAN2)."""
    augmentation: tuple[Augmentation, ...] = ()
    """DiffAugment's policy for what the discriminator sees."""
    noise: Literal["position", "device"] = "position"
    """Noise inputs of a style-based generator: each sample's own (exact at any world size), or the device's generator
    (faster for large images, other numbers on another number of processes)."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        for name in ("r1_gamma", "path_length_weight"):
            if getattr(self, name) < 0:
                found.append(f"gan.{name} is {getattr(self, name)}: use 0 or more")
        for name in ("r1_interval", "path_length_interval"):
            if getattr(self, name) < 1:
                found.append(f"gan.{name} is {getattr(self, name)}: use 1 or more")
        for name in ("path_length_decay", "style_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"gan.{name} is {getattr(self, name)}: use a number from 0 to 1")
        return found


class Features(Protocol):
    """A network that judges: images `[B, C, H, W]` in [-1, 1] to features `[B, D]`."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


class ImageGAN:
    """A generator and a discriminator on batches with `images` (uint8 `[B, C, H, W]`), `labels` and `positions`.

    A style-based generator has `mapping`, `synthesize`, `num_styles` and `noise_shapes` (StyleGAN2's); any other takes
    latents `[B, latent_size]`. With `conditional` both players take the labels too.

    Args:
        generator: has `latent_size`.
        discriminator: gives logits, positive for real.
        generator_optimizer: holds the generator's parameters; shared by its phases.
        discriminator_optimizer: the same for the discriminator.
        config: losses and penalties.
        collectives: the ranks, for the means above.
        seed: of latents, mixing, augmentation and noise.
        conditional: whether both players are told the label.
        features: judges the images in evaluation; without it only the players' own opinions are reported.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        generator_optimizer: torch.optim.Optimizer,
        discriminator_optimizer: torch.optim.Optimizer,
        config: GANConfig,
        collectives: Collectives,
        seed: int,
        conditional: bool = False,
        features: Features | None = None,
    ) -> None:
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self._generator: Any = generator
        self._discriminator = discriminator
        self._fixed = {
            module: {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
            for module in (generator, discriminator)
        }
        self._like = next(generator.parameters())  # dtype and device of every image
        self._config, self._collectives, self._seed = config, collectives, seed
        self._conditional, self._features = conditional, features
        self._style_based = hasattr(generator, "synthesize")
        if not self._style_based and (config.path_length_weight or config.style_mixing):
            raise ValueError(
                "gan.path_length_weight and gan.style_mixing need a style-based generator: set both to 0, or use one"
            )
        phases = [Phase(name="d", module=discriminator, optimizer=discriminator_optimizer)]
        if config.r1_gamma:
            phases.append(_lazy("d_reg", discriminator, discriminator_optimizer, config.r1_interval))
        phases.append(Phase(name="g", module=generator, optimizer=generator_optimizer, calls_parts=self._style_based))
        if config.path_length_weight:
            generator.register_buffer("mean_path_length", self._like.new_zeros(()))
            phases.append(_lazy("g_reg", generator, generator_optimizer, config.path_length_interval))
        self.phases: Sequence[Phase] = phases

    # -- training ----------------------------------------------------------------------------------------------

    def losses(self, phase: Phase, batch: Any) -> dict[str, Tensor]:
        """The loss of one phase, a scalar; the opponent is left out of the graph. ValueError for a skipped sample."""
        if (batch.weights != 1).any():
            raise ValueError("a GAN cannot leave samples out: use on_bad_sample raise, or pack without the bad ones")
        trained = self._generator if phase.name.startswith("g") else self._discriminator
        for module, fixed in self._fixed.items():  # what came frozen stays so
            for name, parameter in module.named_parameters():
                if name not in fixed:
                    parameter.requires_grad_(module is trained)
        step = {"d": self._d, "d_reg": self._d_reg, "g": self._g, "g_reg": self._g_reg}[phase.name]
        return step(phase, batch)

    def _d(self, phase: Phase, batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            fakes = self._fakes(self._generator, batch, "d")
        real = self._judge(phase.module, self._augmented(self._reals(batch), batch, "d/real"), batch)
        fake = self._judge(phase.module, self._augmented(fakes, batch, "d/fake"), batch)
        return {"adversarial": discriminator_loss(self._config.loss, real, fake)}

    def _d_reg(self, phase: Phase, batch: Any) -> dict[str, Tensor]:
        images = self._reals(batch).requires_grad_()
        penalty = r1_penalty(self._judge(phase.module, images, batch), images)
        return {"r1": penalty * (self._config.r1_gamma / 2 * self._config.r1_interval)}

    def _g(self, phase: Phase, batch: Any) -> dict[str, Tensor]:
        fakes = self._fakes(phase.module, batch, "g", track=True)
        logits = self._judge(self._discriminator, self._augmented(fakes, batch, "g"), batch)
        return {"adversarial": generator_loss(self._config.loss, logits)}

    def _g_reg(self, phase: Phase, batch: Any) -> dict[str, Tensor]:
        """Every second sample, as StyleGAN2 halves the batch; the same ones at any number of ranks."""
        chosen = batch.positions % 2 == 0
        positions, generator = batch.positions[chosen], cast("Any", phase.module)
        if len(batch.positions) < 2:  # of a run of two or more, every rank has one
            raise ValueError("the path-length penalty needs at least two samples a rank and micro-batch")
        styles = self._styles(generator, positions, "g_reg")
        images = generator.synthesize(styles, noise=self._noise(positions, "g_reg"))
        size = images[0].numel()
        noise = normal_draws(positions, size, seed=self._seed, stream="g_reg/path").to(images).view_as(images)
        lengths = path_lengths(images, styles, noise)
        # Ranks with an odd share have chosen one more or one less: means over all ranks' samples, not of their means.
        found = torch.stack([lengths.detach().sum(), lengths.new_tensor(len(lengths))])
        total, count = self._collectives.sum_(found).unbind()
        target = torch.lerp(self._generator.mean_path_length, total / count, self._config.path_length_decay)
        self._generator.mean_path_length.copy_(target)
        penalty = (lengths - target).square().sum() / (len(batch.positions) / 2)
        return {"path_length": penalty * (self._config.path_length_weight * self._config.path_length_interval)}

    # -- images ------------------------------------------------------------------------------------------------

    def _fakes(self, generator: Any, batch: Any, stream: str, *, track: bool = False) -> Tensor:
        positions = batch.positions
        if self._style_based:
            styles = self._styles(generator, positions, stream, track=track)
            return generator.synthesize(styles, noise=self._noise(positions, stream))
        latents = self._latents(positions, stream)
        return generator(latents, batch.labels) if self._conditional else generator(latents)

    def _latents(self, positions: Tensor, stream: str) -> Tensor:
        size = self._generator.latent_size
        return normal_draws(positions, size, seed=self._seed, stream=stream).to(self._like)

    def _styles(self, generator: Any, positions: Tensor, stream: str, *, track: bool = False) -> Tensor:
        """`[B, num_styles, style_size]`, mixed where a sample's draw says so."""
        count = self._generator.num_styles
        styles = generator.mapping(self._latents(positions, stream))
        if track:
            mean = self._mean_over_ranks(styles.detach().mean(0))
            self._generator.track_mean_style(mean[None])
        mixed = styles[:, None].expand(-1, count, -1)
        if self._config.style_mixing:
            other = generator.mapping(self._latents(positions, f"{stream}/mixed"))
            draws = uniform_draws(positions, 2, seed=self._seed, stream=f"{stream}/mixing").to(styles.device)
            crossover = 1 + (draws[:, 1] * (count - 1)).long()
            crossover[draws[:, 0] >= self._config.style_mixing] = count
            later = torch.arange(count, device=styles.device) >= crossover[:, None]
            mixed = torch.where(later[:, :, None], other[:, None], mixed)
        return mixed

    def _noise(self, positions: Tensor, stream: str) -> list[Tensor] | None:
        if self._config.noise == "device":
            return None
        shapes = self._generator.noise_shapes()
        sizes = [height * width for height, width in shapes]
        flat = normal_draws(positions, sum(sizes), seed=self._seed, stream=f"{stream}/noise")
        parts = flat.to(self._like).split(sizes, dim=1)
        return [part.view(len(positions), 1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _reals(self, batch: Any) -> Tensor:
        """uint8 images in [-1, 1]."""
        return batch.images.to(self._like) / 127.5 - 1

    def _augmented(self, images: Tensor, batch: Any, stream: str) -> Tensor:
        if not self._config.augmentation:
            return images
        draws = uniform_draws(batch.positions, NUM_DRAWS, seed=self._seed, stream=f"{stream}/augment")
        return augment(images, self._config.augmentation, draws)

    def _judge(self, discriminator: nn.Module, images: Tensor, batch: Any) -> Tensor:
        return discriminator(images, batch.labels) if self._conditional else discriminator(images)

    def _mean_over_ranks(self, tensor: Tensor) -> Tensor:
        return self._collectives.sum_(tensor.clone()) / self._collectives.world.world_size

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluation_sums(self, batch: Any) -> tuple[dict[str, Tensor], list[Prediction]]:
        """Sums over reals and as many fakes, whose latents belong to the samples' ids: the same at any world size."""
        latents = _Positions(batch.sample_ids, batch.labels)
        fakes, reals = self._fakes(self._generator, latents, "evaluation"), self._reals(batch)
        sums = {
            "num_samples": torch.tensor(len(reals)),
            "real_logit": self._judge(self._discriminator, reals, batch).mean() * len(reals),
            "fake_logit": self._judge(self._discriminator, fakes, batch).mean() * len(reals),
        }
        if self._features is not None:
            for name, images in (("real", reals), ("fake", fakes)):
                values = self._features(images).double()
                sums[f"{name}_sum"] = values.sum(0)
                sums[f"{name}_outer"] = values.T @ values
        return sums, []

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Mean logits, and `fid_NAME` by the features of network NAME."""
        count = int(sums["num_samples"])
        summary: dict[str, float] = {name: float(sums[name]) / count for name in ("real_logit", "fake_logit")}
        summary["num_samples"] = count
        if self._features is not None:
            found = [
                Moments.of_sums(self._features.name, count, sums[f"{kind}_sum"], sums[f"{kind}_outer"])
                for kind in ("real", "fake")
            ]
            summary[f"fid_{self._features.name}"] = frechet_distance(*found)
        return summary


@dataclass(frozen=True)
class _Positions:
    """What `_fakes` needs of a batch."""

    positions: Tensor
    labels: Tensor


def _lazy(name: str, module: nn.Module, optimizer: torch.optim.Optimizer, interval: int) -> Phase:
    return Phase(name=name, module=module, optimizer=optimizer, interval=interval, double_backward=True)
