"""A task as data: a list of phases and one function that gives a phase's losses.

A classifier has one phase; a GAN has two to four (D, D-reg, G, G-reg), each with its parameters, its optimizer and the
interval at which it runs. The loop knows nothing else about what it trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One kind of update: which module it trains, with which optimizer, and how often.

    `module` is what a task calls; a strategy may put a wrapper there (`DistributedDataParallel`) whose parameters are
    the same objects.
    """

    name: str
    """Names the phase in losses, metrics and checkpoints."""
    module: nn.Module
    """What the phase trains."""
    optimizer: torch.optim.Optimizer
    """Holds exactly the parameters that this phase updates."""
    interval: int = 1
    """The phase runs at every step whose number is a multiple of this."""
    double_backward: bool = False
    """The phase's losses differentiate through a gradient (R1, path length); not every strategy can do that."""
    calls_parts: bool = False
    """The phase's losses call methods or children of the module (StyleGAN's mapping and synthesis) and not the module
    itself; a strategy that wraps its forward cannot do that."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters this phase updates, in the order of its optimizer's groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class Batch(Protocol):
    """What a loader yields: the rank's share of one micro-batch."""

    @property
    def num_bytes(self) -> int: ...
    def __len__(self) -> int: ...
    @property
    def sample_ids(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def weights(self) -> torch.Tensor: ...
    @property
    def costs(self) -> Mapping[str, float]: ...
    @property
    def skipped(self) -> Sequence[str]: ...
    def to(self, device: torch.device, non_blocking: bool = False) -> Self: ...


class Loader(Protocol):
    """A source of batches whose whole state is one integer: the position in the endless stream of samples.

    It may have a method `doing() -> str` which says, from any thread, what it is at work on: errors quote that.
    """

    @property
    def num_samples(self) -> int: ...
    def batches(self, start_position: int, stop_position: int) -> Iterator[Any]: ...
    def evaluation_batches(self) -> Iterator[Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model said of one evaluation sample."""

    sample_id: int
    label: int
    prediction: int
    probability: float


class Task(Protocol):
    """What is learnt: phases, their losses, and how a model is judged."""

    phases: Sequence[Phase]

    def losses(self, phase: Phase, batch: Any) -> dict[str, torch.Tensor]:
        """Named scalar losses of this micro-batch, each a mean over its clips; their sum is differentiated.

        Where clips have weights: the weighted sum over the number of clips; the loop goes by the weights of all ranks.
        """

    def evaluation_sums(self, batch: Any) -> tuple[dict[str, torch.Tensor], list[Prediction]]:
        """Sums over the batch (tensors of any shape, `num_samples` among them), and predictions where there are any."""

    def summarize(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Figures of the evaluation from the sums over all samples of all ranks: numbers, or float64 tensors."""
