"""What the sharded strategies share: what they refuse, and how parts become whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from dist_train.phases import Phase
from dist_train.strategies.base import check_owners, check_whole_calls
from dist_train.world import World


def check_phases(phases: Sequence[Phase], *, strategy: str) -> None:
    """Refuses what a sharded strategy cannot do.

    Raises:
        ValueError: double backward, calls of a module's parts, a parameter in the modules of two phases, or one that
            is not its module's.
    """
    check_owners(phases, strategy=strategy)
    check_whole_calls(phases, strategy=strategy)
    owner: dict[int, str] = {}
    for phase in phases:
        if phase.double_backward:
            raise ValueError(
                f"phase {phase.name!r} differentiates through a gradient (double_backward), which "
                f"exchange.strategy {strategy!r} cannot: use allreduce"
            )
        for parameter in phase.module.parameters():
            other = owner.setdefault(id(parameter), phase.name)
            if other != phase.name:
                raise ValueError(
                    f"phases {other!r} and {phase.name!r} share parameters, which exchange.strategy {strategy!r} "
                    "cannot shard twice: use allreduce"
                )


def make_contiguous(phases: Sequence[Phase]) -> None:
    """Gives channels-last weights the plain layout, in place: a weight is cut where it is flat.

    Activations keep the layout of the input, and convolutions lay weights out as they need them.
    """
    for phase in phases:
        for parameter in phase.module.parameters():
            # Not `contiguous()`, which keeps odd strides where a size is 1 (a 1x1 convolution's weight).
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


class OneBackward:
    """Guards sharded modules: they are differentiated through in `Strategy.backward` only, and only once.

    A gradient taken elsewhere (`autograd.grad` for R1) would use weights that are no longer gathered; a hook on the
    modules' outputs ends it in a RuntimeError instead. One phase's backward may pass through another's module (a
    generator's through the discriminator), so all of them have one guard.
    """

    def __init__(self, phases: Sequence[Phase], *, strategy: str) -> None:
        self._strategy = strategy
        self._inside = False
        self._handles = [phase.module.register_forward_hook(self._watch_outputs(phase.name)) for phase in phases]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The block in which gradients may flow."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def remove(self) -> None:
        """Lets go of the modules."""
        for handle in self._handles:
            handle.remove()

    def _watch_outputs(self, name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def check(_: torch.Tensor) -> None:
            if not self._inside or torch.is_grad_enabled():  # with create_graph, hooks run with gradients enabled
                raise RuntimeError(
                    f"the module of phase {name!r} takes a gradient outside of Strategy.backward (a gradient "
                    f"penalty?), which exchange.strategy {self._strategy!r} cannot: use allreduce, and declare "
                    "Phase.double_backward"
                )

        def watch(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            for output in tree_leaves(outputs):
                if isinstance(output, torch.Tensor) and output.requires_grad:
                    output.register_hook(check)

        return watch


def whole_on_first(tree: Any, world: World) -> Any:
    """Nested dicts and lists with every DTensor gathered, on the host of rank 0; `{}` on the others. All call it."""
    if isinstance(tree, Mapping):
        items = {key: whole_on_first(value, world) for key, value in tree.items()}
        return items if world.is_first else {}
    if isinstance(tree, list):
        return [whole_on_first(value, world) for value in tree]
    if isinstance(tree, DTensor):
        tree = tree.full_tensor()  # every rank takes part; only the first keeps it
    return tree.cpu() if isinstance(tree, torch.Tensor) and world.is_first else tree
