"""The interface of a strategy, and what all strategies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.collectives import Collectives
from dist_train.phases import Phase


class Strategy(Protocol):
    """How the ranks come to the same gradient.

    The loop calls, at each step and phase::

        for each micro-batch:
            with strategy.micro_batch(phase, synchronize=is_last):
                loss = ...            # forward, any number of times
                strategy.backward(phase, loss)      # or several backwards
        strategy.finish(phase)        # now every parameter's .grad is the mean over the ranks, the same bits on each
        strategy.clip_gradients(phase, max_norm)
        strategy.optimizer_step(phase)

    A parameter that no rank used keeps `grad=None`; one that some ranks used counts as zero on the others. Where a
    strategy cannot do what a phase needs (`Phase.double_backward`), `prepare` says so in a ValueError.

    Checkpoints have one form whatever the strategy, so that a run saved under one resumes under another: `state` gives
    whole tensors under the names of the plain modules, and `load_state` takes them.
    """

    name: str
    exchanges: bool
    """False while each rank goes its own way (post-local SGD): then nothing else is averaged in a step either."""

    averages_gradients: bool
    """True where each rank holds the whole gradient, its own before the exchange and the mean over the ranks after."""

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Makes the ranks' parameters and buffers equal to rank 0's and returns the phases to train with."""

    def micro_batch(self, phase: Phase, *, synchronize: bool) -> AbstractContextManager[Any]:
        """Wraps forward and backward of one micro-batch; gradients are exchanged where `synchronize` is true."""

    def backward(self, phase: Phase, loss: torch.Tensor) -> None:
        """Differentiates `loss`, a scalar, with respect to the phase's parameters."""

    def finish(self, phase: Phase) -> None:
        """Blocks until the phase's gradients are the mean over the ranks."""

    def clip_gradients(self, phase: Phase, max_norm: float) -> torch.Tensor:
        """Scales the phase's gradient down to the 2-norm `max_norm` where it is longer; returns the norm before."""

    def optimizer_step(self, phase: Phase) -> None:
        """Updates the phase's parameters from their gradients."""

    def state(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """`{"modules": {phase: state_dict}, "optimizers": {phase: state_dict}}`, whole, on the host or the device.

        Every rank calls it; the result is complete on rank 0 and may be empty elsewhere.
        """

    def load_state(self, phases: Sequence[Phase], state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, under this or another strategy or world size. Every rank has all of it.

        The optimizer's options (learning rate, momentum, ...) stay those of this run; its state is the checkpoint's.
        """

    def weights(self, phase: Phase) -> dict[str, torch.Tensor]:
        """What this rank holds of each parameter by name: all of it, or its part. They share the parameters' memory."""

    def whole(self, phase: Phase, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors from every rank's tensors laid out as `weights`; complete on rank 0. Every rank calls it."""

    def parts(self, phase: Phase, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `whole`, from whole tensors that every rank has."""

    def step_begins(self, epoch: float) -> None:
        """Tells how many epochs are done before a step's first phase."""

    def step_ends(self) -> bool:
        """Called after a step's last phase. True where it has just averaged copies that had gone apart."""

    def settle(self) -> bool:
        """Averages copies that have gone apart (post-local SGD), before an evaluation or a checkpoint; True if so."""

    def figures(self) -> dict[str, float]:
        """What the strategy has found out by itself, for the metrics."""

    def evaluating(self, phases: Sequence[Phase]) -> AbstractContextManager[Any]:
        """Inside, a rank may call its modules without gradients, whatever the others do and however often."""

    def close(self) -> None:
        """Lets go of hooks, threads and groups; the modules stay usable."""


class Replicated:
    """What the strategies with a whole copy of the model on each rank have in common."""

    exchanges = True
    averages_gradients = True

    def backward(self, phase: Phase, loss: torch.Tensor) -> None:  # noqa: ARG002
        """`loss.backward()`."""
        loss.backward()

    def clip_gradients(self, phase: Phase, max_norm: float) -> torch.Tensor:
        """Every rank has the same gradient and clips it by itself."""
        return torch.nn.utils.clip_grad_norm_(phase.parameters(), max_norm)

    def optimizer_step(self, phase: Phase) -> None:
        """Every rank makes the same update."""
        phase.optimizer.step()

    def state(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Every rank has all of it."""
        return {
            "modules": {phase.name: phase.module.state_dict() for phase in phases},
            "optimizers": {phase.name: phase.optimizer.state_dict() for phase in phases},
        }

    def load_state(self, phases: Sequence[Phase], state: Mapping[str, Any]) -> None:
        """Every rank takes all of it."""
        for phase in phases:
            check_groups(phase, state["optimizers"][phase.name])
            phase.module.load_state_dict(state["modules"][phase.name])
            options = [{k: v for k, v in g.items() if k != "params"} for g in phase.optimizer.param_groups]
            phase.optimizer.load_state_dict(state["optimizers"][phase.name])
            for group, wanted in zip(phase.optimizer.param_groups, options, strict=True):
                group.update(wanted)

    def weights(self, phase: Phase) -> dict[str, torch.Tensor]:
        """Every rank holds all of them."""
        return {name: parameter.detach() for name, parameter in phase.module.named_parameters()}

    def whole(self, phase: Phase, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """They are whole."""
        return dict(parts)

    def parts(self, phase: Phase, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """They are whole."""
        return dict(whole)

    def step_begins(self, epoch: float) -> None:
        """Nothing changes over time."""

    def step_ends(self) -> bool:
        """The copies never go apart."""
        return False

    def settle(self) -> bool:
        """The copies never go apart."""
        return False

    def figures(self) -> dict[str, float]:
        """Nothing was measured."""
        return {}

    def evaluating(self, phases: Sequence[Phase]) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Nothing to gather."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to let go of."""


def check_groups(phase: Phase, saved: Mapping[str, Any]) -> None:
    """Refuses an optimizer's state whose groups are not this run's: ValueError."""
    before = [len(group["params"]) for group in saved["param_groups"]]
    now = [len(group["params"]) for group in phase.optimizer.param_groups]
    if before != now:
        raise ValueError(
            f"the checkpoint's optimizer of phase {phase.name!r} has groups of {before} parameters, and this run's of "
            f"{now}: resume with the flags that choose what is trained, decayed and scaled as they were"
        )


def check_whole_calls(phases: Sequence[Phase], *, strategy: str) -> None:
    """Refuses phases that a strategy which wraps modules' forward would not see: ValueError."""
    for phase in phases:
        if phase.calls_parts:
            raise ValueError(
                f"phase {phase.name!r} calls parts of its module (calls_parts), and exchange.strategy {strategy!r} "
                "sees only calls of the whole module: use allreduce"
            )


def check_owners(phases: Sequence[Phase], *, strategy: str) -> None:
    """Refuses an optimizer with parameters that are not its module's: they are neither sent nor saved. ValueError."""
    for phase in phases:
        members = {id(parameter) for parameter in phase.module.parameters()}
        if any(id(parameter) not in members for parameter in phase.parameters()):
            raise ValueError(
                f"the optimizer of phase {phase.name!r} holds parameters that are not its module's, which "
                f"exchange.strategy {strategy!r} can neither send nor save: make them part of the module"
            )


def broadcast_modules(phases: Sequence[Phase], collectives: Collectives) -> None:
    """Overwrites parameters and buffers of every phase's module with those of rank 0."""
    if collectives.world.world_size == 1:
        return
    seen: set[int] = set()
    with torch.no_grad():
        for phase in phases:
            for tensor in [*phase.module.parameters(), *phase.module.buffers()]:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensor.copy_(collectives.broadcast_(tensor.detach().contiguous()))


class BufferAverage:
    """Keeps the running statistics of batch norm equal on all ranks.

    Each rank normalises by its own micro-batch and moves its own running statistics; after each step they are averaged.
    Running statistics are linear in the batch's statistics, so this equals averaging once before evaluation, and it
    makes every step a point at which a checkpoint of one rank is a checkpoint of all. The all-reduce is started before
    the backward pass and waited for after it: a few hundred kilobytes, hidden behind the gradients.
    """

    def __init__(self, phases: Sequence[Phase], collectives: Collectives) -> None:
        layers = (m for phase in phases for m in phase.module.modules() if isinstance(m, _BatchNorm))
        self._layers = list(dict.fromkeys(layers))
        self._buffers: list[torch.Tensor] = []
        self._collectives = collectives
        self._flat: torch.Tensor | None = None
        self._pending: Any = None

    def start(self) -> None:
        """Starts to average what the buffers hold now; frozen layers' are equal, and a mean could round them."""
        moving = [layer for layer in self._layers if layer.training]
        statistics = [s for layer in moving for s in (layer.running_mean, layer.running_var)]
        self._buffers = [buffer for buffer in statistics if buffer is not None]
        if self._collectives.world.world_size == 1 or not self._buffers:
            return
        with torch.no_grad():
            self._flat = torch.cat([buffer.reshape(-1).float() for buffer in self._buffers])
        self._pending = self._collectives.start_mean_(self._flat, name="batch norm buffers")

    def finish(self) -> None:
        """Writes the averages back; nothing to do if nothing was started."""
        if self._pending is None or self._flat is None:
            return
        self._pending.wait()
        sizes = [buffer.numel() for buffer in self._buffers]
        with torch.no_grad():
            for buffer, mean in zip(self._buffers, self._flat.split(sizes), strict=True):
                buffer.copy_(mean.view_as(buffer))
        self._pending = self._flat = None
