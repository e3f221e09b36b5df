"""What both ways of combining ranks share: a hook on each gradient, and the guards on the order of calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.horovod.compression import Compressor
from dist_train.horovod.mpi_ops import ProcessSet


class WrappedOptimizer(torch.optim.Optimizer):
    """Mixed into the class of an optimizer by `DistributedOptimizer`, which sets the attributes."""

    backward_passes_per_step: int
    _wrapped: torch.optim.Optimizer
    _parameter_names: dict[Tensor, str]
    _compression: type[Compressor]
    _process_set: ProcessSet
    _op: int
    _predivide_factor: float
    _sparse_as_dense: bool
    _hooks: dict[Tensor, Any]
    _passes: dict[Tensor, int]
    """Backward passes that reached a parameter since the last step, where there were any."""

    def attach(self, groups: int | Sequence[Sequence[Tensor]] | None) -> None:  # noqa: ARG002
        """Hooks the parameters; `groups` is what `DistributedOptimizer` was given."""
        self._hooks, self._passes = {}, {}
        self._hook_parameters()

    def _is_active(self) -> bool:
        """False where there is nobody to exchange gradients with. A world of one may grow in an elastic run."""
        return bool(self._process_set.included()) and self._process_set.size() != 1

    def _hook_parameters(self) -> None:
        """Hooks parameters that train: at first those of the start, later those unfrozen or added since."""
        for i, group in enumerate(self.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter.requires_grad and parameter not in self._hooks:
                    self._parameter_names.setdefault(parameter, f"allreduce.noname.{i}.{j}")
                    self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._gradient_is_ready)

    def _gradient_is_ready(self, parameter: Tensor) -> None:
        if not self._is_active():
            return
        passes = self._passes.get(parameter, 0) + 1
        if passes > self.backward_passes_per_step:
            raise AssertionError(
                f"Gradients of {self._parameter_names[parameter]} were computed more than backward_passes_per_step "
                f"({self.backward_passes_per_step}) times before call to step(). Increase backward_passes_per_step to "
                "accumulate gradients locally."
            )
        self._passes[parameter] = passes
        if passes == self.backward_passes_per_step:
            self._exchange(parameter)

    def _exchange(self, parameter: Tensor) -> None:
        """Called in backward when the gradient of `parameter` is complete."""

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes how many backward passes are added up before gradients are exchanged."""
        self.backward_passes_per_step = passes
        self._passes.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients. Raises AssertionError between a backward pass and `step()` or `synchronize()`."""
        if self._passes:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; whatever was being exchanged is forgotten."""
        self._passes.clear()
        super().load_state_dict(state_dict)
