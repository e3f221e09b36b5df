"""The way of Adasum (Maleki et al. 2021): each rank steps by its own gradients, then the updates are combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dist_train.horovod.mpi_ops import Adasum, allreduce_async_, synchronize
from dist_train.horovod.wrapped_optimizer import WrappedOptimizer


class AdasumOptimizer(WrappedOptimizer):
    """Steps by this rank's gradients, then combines the ranks' updates.

    Where Horovod steps parameter by parameter within backward, this steps once in `step()`: the updates are the same.
    """

    def synchronize(self) -> None:
        """Nothing: updates are combined in `step()`, and gradients stay this rank's own."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Not possible: raises AssertionError."""
        raise AssertionError("Skipping synchronization is not supported when using Adasum optimizer.")
        yield

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps, and moves each parameter from where it was by the Adasum of the ranks' updates."""
        self._wrapped._opt_called = True  # type: ignore[attr-defined]  # a scheduler made before looks there
        self._hook_parameters()
        for parameter in self._hooks:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        starts = [parameter.clone() for parameter in self._hooks]
        loss = super().step(closure)
        handles, contexts = [], []
        for parameter, start in zip(self._hooks, starts, strict=True):
            sent, context = self._compression.compress(parameter - start)
            handles.append(allreduce_async_(sent.contiguous(), name=self._parameter_names[parameter], op=Adasum))
            contexts.append(context)
        for parameter, start, handle, context in zip(self._hooks, starts, handles, contexts, strict=True):
            parameter.copy_(start + self._compression.decompress(synchronize(handle), context))
        self._passes.clear()
        return loss

    step.hooked = True  # type: ignore[attr-defined]
