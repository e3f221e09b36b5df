"""Post-local SGD: after a while, steps without an exchange, and now and then an average (Lin et al. 2018, 1808.07217).

From `exchange.local_after_epochs` on, each rank updates its copy by its own gradients, and after every
`exchange.average_every_steps` steps the copies are averaged: a share 1/H of the rounds. Averaged are the parameters and
the optimizer's state for them (momentum; Adam's moments and step); buffers other than running statistics become rank
0's. The paper's variant with local momentum keeps the momentum apart; here all ranks are equal after an average, so
that a checkpoint of one rank is one of all and a resumed run does the same as the undisturbed one.

It is another algorithm, not another way to the same numbers: only plain SGD with H = 1 would equal the exchange of
gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.collectives import Collectives
from dist_train.phases import Phase
from dist_train.strategies.base import Strategy
from dist_train.strategies.config import ExchangeConfig


class PostLocalSGD:
    """Wraps a strategy whose ranks have whole copies; see the module and `dist_train.strategies.base.Strategy`."""

    def __init__(self, strategy: Strategy, collectives: Collectives, config: ExchangeConfig) -> None:
        self._inner, self._collectives = strategy, collectives
        self._every, self._after = config.average_every_steps, config.local_after_epochs
        self._phases: list[Phase] = []
        self._local_steps = 0  # since the copies were equal
        self.name = strategy.name
        self.averages_gradients = strategy.averages_gradients
        self.exchanges = True

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """The inner strategy's."""
        self._phases = list(phases)
        return self._inner.prepare(phases)

    def step_begins(self, epoch: float) -> None:
        """Decides whether this step exchanges gradients."""
        self._inner.step_begins(epoch)
        self.exchanges = epoch < self._after or self._collectives.world.world_size == 1

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool) -> Iterator[None]:
        """The inner strategy's; nothing is exchanged in a local step."""
        with self._inner.micro_batch(phase, synchronize=synchronize and self.exchanges):
            yield

    def backward(self, phase: Phase, loss: torch.Tensor) -> None:
        """The inner strategy's."""
        self._inner.backward(phase, loss)

    def finish(self, phase: Phase) -> None:
        """The inner strategy's; in a local step the gradients stay the rank's own."""
        if self.exchanges:
            self._inner.finish(phase)

    def clip_gradients(self, phase: Phase, max_norm: float) -> torch.Tensor:
        """Of the gradients that there are: in a local step the rank's own."""
        return self._inner.clip_gradients(phase, max_norm)

    def optimizer_step(self, phase: Phase) -> None:
        """The inner strategy's."""
        self._inner.optimizer_step(phase)

    def step_ends(self) -> bool:
        """Averages after every H local steps."""
        if not self.exchanges:
            self._local_steps += 1
        return self._local_steps == self._every and self.settle()

    def settle(self) -> bool:
        """Averages parameters and optimizer state over the ranks if there were local steps."""
        if self._local_steps == 0:
            return False
        self._local_steps = 0
        with torch.no_grad():
            parameters = [parameter for phase in self._phases for parameter in phase.parameters()]
            self._average([parameter.data for parameter in dict.fromkeys(parameters)])  # phases may share them
            for optimizer in dict.fromkeys(phase.optimizer for phase in self._phases):
                self._average(self._optimizer_state(optimizer))
            self._replace(self._other_buffers(), self._collectives.broadcast_)
        return True

    def state(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """The inner strategy's, of copies that are equal."""
        self.settle()
        return self._inner.state(phases)

    def load_state(self, phases: Sequence[Phase], state: Mapping[str, Any]) -> None:
        """The inner strategy's."""
        self._inner.load_state(phases, state)
        self._local_steps = 0

    def weights(self, phase: Phase) -> dict[str, torch.Tensor]:
        """The inner strategy's."""
        return self._inner.weights(phase)

    def whole(self, phase: Phase, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inner strategy's."""
        return self._inner.whole(phase, parts)

    def parts(self, phase: Phase, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inner strategy's."""
        return self._inner.parts(phase, whole)

    def evaluating(self, phases: Sequence[Phase]) -> AbstractContextManager[Any]:
        """The inner strategy's."""
        return self._inner.evaluating(phases)

    def figures(self) -> dict[str, float]:
        """The inner strategy's."""
        return self._inner.figures()

    def close(self) -> None:
        """The inner strategy's."""
        self._inner.close()

    def _optimizer_state(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        """The optimizer's tensors, the same list on every rank; zeros where only other ranks have used a parameter.

        Numbers (LAMB's step, LARS's rate) become the largest of the ranks' at once.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        mine = {
            (index, key): (value.dtype, tuple(value.shape), value.device.type)
            if isinstance(value, torch.Tensor)
            else value
            for index, parameter in enumerate(parameters)
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, (torch.Tensor, int, float))
        }
        everyones = self._collectives.broadcast_object(self._collectives.gather_objects(mine))
        kinds: dict[tuple[int, str], Any] = {}
        for place, kind in itertools.chain.from_iterable(rank.items() for rank in everyones):
            kinds[place] = kind if isinstance(kind, tuple) else max(kind, kinds.get(place, kind))
        found = []
        for index, key in sorted(kinds):
            state = optimizer.state[parameters[index]]
            if not isinstance(kinds[index, key], tuple):
                state[key] = kinds[index, key]
                continue
            dtype, shape, device = kinds[index, key]
            if not isinstance(state.get(key), torch.Tensor):
                like = parameters[index]
                place = like.device if device == like.device.type else torch.device(device)
                state[key] = torch.zeros(shape, dtype=dtype, device=place)
            found.append(state[key])
        return found

    def _other_buffers(self) -> list[torch.Tensor]:
        """All but running statistics, which the loop averages: spectral norm's vectors follow a rank's own weights."""
        layers = dict.fromkeys(layer for phase in self._phases for layer in phase.module.modules())
        return [b for layer in layers if not isinstance(layer, _BatchNorm) for b in layer.buffers(recurse=False)]

    def _average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites `tensors` with their means over the ranks."""

        def average(flat: torch.Tensor) -> None:
            pending = self._collectives.start_mean_(flat, name="average of the copies")
            if pending is not None:
                pending.wait()

        self._replace(tensors, average)

    def _replace(self, tensors: Sequence[torch.Tensor], exchange: Callable[[torch.Tensor], Any]) -> None:
        """Overwrites `tensors` by what `exchange` makes of them, joined: one call for each dtype and device."""
        for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
            same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            exchange(flat)
            parts = flat.split([tensor.numel() for tensor in same])
            torch._foreach_copy_(same, [part.view(tensor.shape) for part, tensor in zip(parts, same, strict=True)])
