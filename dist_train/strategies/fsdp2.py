"""PyTorch's FSDP2 (`fully_shard`): weights, gradients and optimizer state in equal parts over the ranks.

Each repeated block (`dist_train.blocks`) is a unit: its weights are gathered before its forward and again before its
backward, and its gradient is reduce-scattered as soon as it is there, in every micro-batch, so that a rank never holds
more than its part and one or two whole units. The model is made whole on every rank once, before it is sharded.

A parameter that only some ranks used counts as zero on the others, and one that no rank used keeps `grad=None`, as long
as every rank runs the same blocks. What FSDP2 cannot do is refused: double backward (`Phase.double_backward`;
undeclared it is a RuntimeError where it happens), and a parameter in several phases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_train.blocks import repeated_blocks
from dist_train.collectives import Collectives
from dist_train.phases import Phase
from dist_train.strategies.accounted import account_units
from dist_train.strategies.base import Replicated, broadcast_modules, check_groups
from dist_train.strategies.config import ExchangeConfig
from dist_train.strategies.sharding import OneBackward, check_phases, make_contiguous, whole_on_first


class FullyShardedStrategy(Replicated):
    """The strategy `fsdp2`; see the module. In a world of one process it shards nothing."""

    name = "fsdp2"
    averages_gradients = False  # a rank never holds the whole mean

    def __init__(self, collectives: Collectives, config: ExchangeConfig) -> None:  # noqa: ARG002
        self._collectives = collectives
        self._mesh: DeviceMesh | None = None
        self._units: list[FSDPModule] = []
        self._roots: list[FSDPModule] = []
        self._used: dict[str, _Used] = {}
        self._guard: OneBackward | None = None

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Shards rank 0's modules in place and puts the parts into the phases' optimizers.

        Raises:
            ValueError: see `check_phases`; or a parameter has no dimension to be cut along.
        """
        check_phases(phases, strategy=self.name)
        for phase in phases:
            for name, parameter in phase.module.named_parameters():
                if parameter.ndim == 0:
                    raise ValueError(
                        f"parameter {name} of phase {phase.name!r} is a scalar, which exchange.strategy {self.name!r} "
                        "cannot cut: give it the shape [1], or use allreduce"
                    )
        world = self._collectives.world
        if world.world_size == 1:
            return list(phases)
        make_contiguous(phases)
        broadcast_modules(phases, self._collectives)
        self._mesh = init_device_mesh(world.device.type, (world.world_size,))
        for phase in phases:
            names = {id(parameter): name for name, parameter in phase.module.named_parameters()}
            ours = [[names[id(p)] for p in group["params"]] for group in phase.optimizer.param_groups]
            units = self._shard(phase.module)
            account_units(units, phase.name, self._collectives)
            parts = dict(phase.module.named_parameters())
            for group, members in zip(phase.optimizer.param_groups, ours, strict=True):
                group["params"] = [parts[name] for name in members]
            self._units += units
            self._roots.append(units[-1])
            self._used[phase.name] = _Used(phase, units)
        self._guard = OneBackward(phases, strategy=self.name)
        return list(phases)

    def _shard(self, module: nn.Module) -> list[FSDPModule]:
        units = [block for block in repeated_blocks(module) if block is not module]
        for block in units:
            fully_shard(block, mesh=self._mesh, reshard_after_forward=True)
        fully_shard(module, mesh=self._mesh, reshard_after_forward=False)  # its backward begins at once
        sharded: list[FSDPModule] = [unit for unit in [*units, module] if isinstance(unit, FSDPModule)]
        for unit in sharded:
            unit.set_reduce_scatter_unused_params(True)
            unit.set_force_sum_reduction_for_comms(True)  # sum, then divide: what Gloo can do, and the same everywhere
        return sharded

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool) -> Iterator[None]:  # noqa: ARG002
        """Gradients are reduce-scattered in every micro-batch and accumulated in parts."""
        yield

    def backward(self, phase: Phase, loss: torch.Tensor) -> None:  # noqa: ARG002
        """`loss.backward()`, the only place that may differentiate through the modules."""
        with self._guard.backward() if self._guard else nullcontext():
            loss.backward()

    def finish(self, phase: Phase) -> None:
        """Leaves this rank's part of the mean gradient in `.grad`, and None where no rank used the parameter."""
        if phase.name not in self._used:
            return
        mine = self._used[phase.name].flags()
        somewhere = self._collectives.max_(
            torch.tensor(mine, dtype=torch.uint8), name=f"{phase.name} parameters used"
        ).tolist()
        for parameter, used in zip(phase.module.parameters(), somewhere, strict=True):
            if not used:
                parameter.grad = None

    def clip_gradients(self, phase: Phase, max_norm: float) -> torch.Tensor:
        """Clips by the norm over all ranks' parts."""
        norm = super().clip_gradients(phase, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # -- weights in parts --------------------------------------------------------------------------------------

    def weights(self, phase: Phase) -> dict[str, torch.Tensor]:
        """This rank's parts."""
        self._let_go()
        return {name: _local(p.detach()) for name, p in phase.module.named_parameters()}

    def whole(self, phase: Phase, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gathers the parts on rank 0."""
        self._let_go()
        like = dict(phase.module.named_parameters())
        joined = {name: _joined(parts[name], parameter) for name, parameter in like.items()}
        return whole_on_first(joined, self._collectives.world)

    def parts(self, phase: Phase, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cuts this rank's parts out."""
        self._let_go()
        return {name: _local(_part(whole[name], p)) for name, p in phase.module.named_parameters()}

    @contextmanager
    def evaluating(self, phases: Sequence[Phase]) -> Iterator[None]:  # noqa: ARG002
        """Every rank holds the whole weights inside, so that ranks may have different numbers of batches."""
        self._let_go()  # what is gathered already may be older than the parts
        for unit in self._units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            self._let_go()
            for unit in self._units:
                unit.set_reshard_after_forward(unit not in self._roots, recurse=False)

    def _let_go(self) -> None:
        """Back to parts: a forward pass without a backward (an opponent's, a penalty-free step's) stays gathered."""
        for unit in self._units:
            unit.reshard()

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Whole tensors on rank 0, gathered one at a time."""
        return whole_on_first(super().state(phases), self._collectives.world)

    def load_state(self, phases: Sequence[Phase], state: Mapping[str, Any]) -> None:
        """Cuts this rank's parts out of the whole tensors."""
        if self._mesh is not None:
            state = {
                "modules": {phase.name: _module_parts(phase, state["modules"][phase.name]) for phase in phases},
                "optimizers": {
                    phase.name: _optimizer_parts(phase, state["optimizers"][phase.name]) for phase in phases
                },
            }
        super().load_state(phases, state)

    def close(self) -> None:
        """Lets go of the guard; the modules stay sharded."""
        if self._guard is not None:
            self._guard.remove()


class _Used:
    """Which parameters of a phase got a gradient on this rank."""

    def __init__(self, phase: Phase, units: Sequence[FSDPModule]) -> None:
        self._names = [name for name, _ in phase.module.named_parameters()]
        self._seen: set[str] = set()
        prefix = {id(module): f"{name}." if name else "" for name, module in phase.module.named_modules()}
        for unit in units:
            self._watch(unit, prefix)

    def flags(self) -> list[bool]:
        """Since the last call, in the order of the module's parameters."""
        flags = [name in self._seen for name in self._names]
        self._seen.clear()
        return flags

    def _watch(self, unit: Any, prefix: Mapping[int, str]) -> None:
        """Hooks the unit's gathered parameters, which exist from its first forward on, once they are trained."""
        hooked: set[str] = set()

        def gathered(*_: Any) -> None:
            everything_hooked = True
            for owner in unit.modules():
                for key, parameter in owner._parameters.items():
                    name = prefix[id(owner)] + key
                    if parameter is None or name in hooked or isinstance(parameter, DTensor):
                        continue
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._seen.add(name))
                        hooked.add(name)
                    else:  # frozen, perhaps for this phase only
                        everything_hooked = False
            if everything_hooked:
                handle.remove()

        handle = unit.register_forward_pre_hook(gathered)  # after FSDP2's own, which gathers


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _joined(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride()
    )


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of `whole`, laid out as `like`; without communication."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _module_parts(phase: Phase, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    targets = phase.module.state_dict()
    return {name: _part(tensor, targets[name]) if name in targets else tensor for name, tensor in whole.items()}


def _optimizer_parts(phase: Phase, whole: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the phase's optimizer with momenta and their like in parts, counters as they are."""
    check_groups(phase, whole)
    parameters = phase.parameters()

    def part(index: int, value: Any) -> Any:
        like = parameters[index]
        of_its_shape = isinstance(value, torch.Tensor) and value.shape == like.shape
        return _part(value, like) if of_its_shape else value

    state = {index: {key: part(index, value) for key, value in own.items()} for index, own in whole["state"].items()}
    return {**whole, "state": state}
