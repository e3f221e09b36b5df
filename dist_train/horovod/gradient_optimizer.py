"""The usual way: gradients are combined as they become ready, then each rank steps by the result.

A parameter that got no gradient on this rank takes part with zeros, for another rank may have one: as under Horovod, a
parameter that no rank used is stepped with a gradient of zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_train.horovod.functions import broadcast_object
from dist_train.horovod.mpi_ops import (
    allreduce_async_,
    grouped_allreduce_async_,
    sparse_allreduce_async,
    synchronize,
)
from dist_train.horovod.wrapped_optimizer import WrappedOptimizer


class GradientOptimizer(WrappedOptimizer):
    """Combines gradients as they become ready, then steps."""

    _group_of: dict[Tensor, tuple[Tensor, ...]]
    """The parameters that are exchanged together with one, itself included."""
    _under_way: dict[tuple[Tensor, ...], Callable[[], None]]
    """For each exchange that has begun: waits for it and stores the gradients."""
    _sparse_dims: dict[Tensor, int]
    """Of the parameters that have had a sparse gradient: without one, they take part with an empty one."""

    def attach(self, groups: int | Sequence[Sequence[Tensor]] | None) -> None:
        """Hooks the parameters and forms groups of them."""
        super().attach(groups)
        self._under_way, self._sparse_dims = {}, {}
        self._synchronized, self._should_synchronize = False, True
        self._group_of = {}
        if groups is not None:
            for group in self._form_groups(groups):
                self._group_of.update(dict.fromkeys(group, group))

    def _form_groups(self, groups: int | Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        if isinstance(groups, int):
            if groups <= 0:
                raise ValueError(f"groups should be a positive integer or a list of list of torch.Tensor, got {groups}")
            members = list(self._hooks)
            if self._is_active():
                # Rank 0's order decides, for groups must be the same everywhere.
                names = [self._parameter_names[p] for p in members]
                order = broadcast_object(names, self._first_rank(), "groups", self._process_set)
                members.sort(key=lambda p: order.index(self._parameter_names[p]))
            length, longer = divmod(len(members), groups)
            lengths = [length + (index < longer) for index in range(groups)]
            starts = [sum(lengths[:index]) for index in range(groups)]
            return [tuple(members[start : start + n]) for start, n in zip(starts, lengths, strict=True) if n]
        flat = [parameter for group in groups for parameter in group]
        if any(not isinstance(parameter, Tensor) for parameter in flat):
            raise ValueError("groups must consist of torch.Tensor.")
        if len(set(flat)) < len(flat):
            raise ValueError("A parameter can only appear once in groups.")
        trained = [tuple(parameter for parameter in group if parameter in self._hooks) for group in groups]
        return [group for group in trained if group]

    def _first_rank(self) -> int:
        ranks = self._process_set.ranks
        return ranks[0] if ranks else 0

    def _exchange(self, parameter: Tensor) -> None:
        group = self._group_of.get(parameter, (parameter,))
        if all(self._passes.get(member, 0) == self.backward_passes_per_step for member in group):
            self._begin(group)

    def _begin(self, group: tuple[Tensor, ...]) -> None:
        """Starts the exchange of the gradients of `group`; one that this rank does not have is zero."""
        for parameter in group:
            if parameter.grad is None:
                parameter.grad = self._zero_gradient(parameter)
            elif parameter.grad.is_sparse:
                self._sparse_dims[parameter] = parameter.grad.sparse_dim()
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        if len(group) > 1 and any(gradient.is_sparse for gradient in gradients):
            for parameter in group:
                self._begin((parameter,))
            return
        name = self._parameter_names[group[0]]
        if gradients[0].is_sparse and not self._sparse_as_dense:
            gathered = sparse_allreduce_async(gradients[0], name=name, op=self._op, process_set=self._process_set)
            self._under_way[group] = lambda: setattr(group[0], "grad", gathered())
            return
        dense = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
        sent, contexts = zip(*(self._compression.compress(gradient) for gradient in dense), strict=True)
        tensors = [tensor.contiguous() for tensor in sent]  # gradients of a channels-last model are not
        factor = self._predivide_factor
        options = (None, name, self._op, 1 / factor, factor, self._process_set)
        if group[0] in self._group_of:
            handle = grouped_allreduce_async_(tensors, *options)
        else:
            handle = allreduce_async_(tensors[0], *options)

        def finish() -> None:
            received = synchronize(handle)
            for parameter, tensor, context in zip(
                group, received if isinstance(received, (list, tuple)) else [received], contexts, strict=True
            ):
                _store(parameter, self._compression.decompress(tensor, context))

        self._under_way[group] = finish

    def _zero_gradient(self, parameter: Tensor) -> Tensor:
        dims = self._sparse_dims.get(parameter)
        if dims is None:
            return torch.zeros_like(parameter)
        indices = torch.empty(dims, 0, dtype=torch.long, device=parameter.device)
        return torch.sparse_coo_tensor(
            indices, parameter.new_empty(0, *parameter.shape[dims:]), parameter.shape, check_invariants=False
        )

    def synchronize(self) -> None:
        """Waits until every gradient is that of all ranks. Raises HorovodInternalError where an exchange failed."""
        if self._is_active():
            self._hook_parameters()
            begun = {parameter for group in self._under_way for parameter in group}
            for parameter in self._hooks:
                if parameter not in begun:
                    group = self._group_of.get(parameter, (parameter,))
                    self._begin(group)
                    begun.update(group)
            try:
                for finish in self._under_way.values():
                    finish()
            finally:
                self._under_way.clear()
                self._passes.clear()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Inside, `step()` takes the gradients as they are: for those clipped after `synchronize()`."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Waits for the gradients of all ranks and applies them.

        A `closure` may be called several times; its gradients are exchanged each time, after it.
        """
        self._wrapped._opt_called = True  # type: ignore[attr-defined]  # a scheduler made before looks there
        if not self._should_synchronize or closure is None:
            if self._should_synchronize:
                if self._synchronized:
                    warnings.warn(
                        "optimizer.step() called without optimizer.skip_synchronize() context after "
                        "optimizer.synchronize(). This can cause training slowdown. You may want to consider using "
                        "optimizer.skip_synchronize() context if you use optimizer.synchronize() in your code.",
                        stacklevel=2,
                    )
                self.synchronize()
            self._synchronized = False
            return super().step(closure)

        def closure_of_all() -> Any:
            loss = closure()
            self.synchronize()
            return loss

        try:
            return super().step(closure_of_all)
        finally:
            self._synchronized = False

    # PyTorch wraps `step` of each class with the profiler and the user's hooks: once is enough, in the wrapped class.
    step.hooked = True  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; whatever was being exchanged is forgotten."""
        self._under_way.clear()
        self._synchronized, self._should_synchronize = False, True
        super().load_state_dict(state_dict)


def _store(parameter: Tensor, gradient: Tensor) -> None:
    """Makes `gradient` that of `parameter`, in the layout that its optimizer expects."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        parameter.grad = gradient if gradient.is_sparse else gradient.to_sparse(parameter.grad.sparse_dim())
    elif gradient is not parameter.grad:
        parameter.grad.copy_(gradient)
