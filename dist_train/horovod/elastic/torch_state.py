"""The state of a PyTorch training: models, optimizers, samplers and Python objects."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dist_train.horovod.elastic.sampler import ElasticSampler
from dist_train.horovod.elastic.state import ObjectState
from dist_train.horovod.functions import broadcast_object, broadcast_optimizer_state, broadcast_parameters
from dist_train.horovod.mpi_ops import rank


class TorchState(ObjectState):
    """Models, optimizers and `ElasticSampler`s by their `state_dict`, everything else as Python objects.

    Args:
        model: a module, as attribute `model`.
        optimizer: an optimizer, as attribute `optimizer`.
        kwargs: more of either, or anything else that can be pickled, each an attribute of its name.
    """

    _handlers: dict[str, StateHandler]

    def __init__(
        self, model: torch.nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any
    ) -> None:
        values = {**kwargs, "model": model, "optimizer": optimizer}
        handlers = {name: handler for name, value in values.items() if (handler := _handler(value)) is not None}
        object.__setattr__(self, "_handlers", handlers)
        for name in handlers:
            object.__setattr__(self, name, values.pop(name))
        super().__init__(bcast_object=broadcast_object, get_rank=rank, **values)

    def save(self) -> None:
        """Copies every part in this process's memory."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Loads every part as it was saved last."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Makes every part that of rank 0 as it is, and saves it."""
        for handler in self._handlers.values():
            handler.sync()
        super().sync()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._handlers:
            self._handlers[name].set_value(value)
        super().__setattr__(name, value)


class StateHandler:
    """Saves, restores and synchronises one part of a state that has a `state_dict`."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.save()

    def save(self) -> None:
        """Copies the part's state."""
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        """Loads the copy. A copy of the copy: an optimizer keeps, and later changes, the tensors that it loads."""
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        """Makes the part's state that of rank 0, and saves it."""
        raise NotImplementedError

    def set_value(self, value: Any) -> None:
        """Takes `value` for the part from now on."""
        self.value = value
        self.save()


class ModelStateHandler(StateHandler):
    """A module."""

    def sync(self) -> None:
        """Broadcasts the parameters and buffers in place."""
        broadcast_parameters(self.value.state_dict(), root_rank=0)
        self.save()


class OptimizerStateHandler(StateHandler):
    """An optimizer."""

    def sync(self) -> None:
        """Broadcasts the options and the state."""
        broadcast_optimizer_state(self.value, root_rank=0)
        self.save()


class SamplerStateHandler(StateHandler):
    """An `ElasticSampler`."""

    def sync(self) -> None:
        """Broadcasts how much is done, and partitions the rest over the ranks of now."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict()))
        self.save()


_handlers: list[tuple[type, type[StateHandler]]] = [
    (torch.nn.Module, ModelStateHandler),
    (torch.optim.Optimizer, OptimizerStateHandler),
    (ElasticSampler, SamplerStateHandler),
]


def get_handler_registry() -> list[tuple[type, type[StateHandler]]]:
    """Which class of values which handler takes; the first that fits is used."""
    return _handlers


def set_handler_registry(registry: list[tuple[type, type[StateHandler]]]) -> None:
    """Replaces the registry, for states made from now on."""
    global _handlers
    _handlers = registry


def _handler(value: Any) -> StateHandler | None:
    return next((handler(value) for kind, handler in _handlers if isinstance(value, kind)), None)
