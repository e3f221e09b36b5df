"""DeepSpeed's ZeRO over the ranks: `zero1` shards the optimizer's state, `zero2` gradients too, `zero3` weights too.

`zero1` exchanges gradients after the last micro-batch, the others in every one. The gradient stays inside DeepSpeed:
a parameter's `.grad` is not to be read. Its optimizer updates flat pieces of many parameters, so only optimizers that
treat every element alike are taken (SGD, Adam, AdamW, RMSprop). Refused, too: double backward (`Phase.double_backward`;
undeclared it is a RuntimeError where it happens), more than one phase, and a step in which some rank gives a parameter
no gradient (a RuntimeError: ZeRO would count it as zero and decay the weight).

DeepSpeed is an extra, `pip install 'reelscale[deepspeed]'`. It joins the process group that is there; its launcher, its
configuration files and its checkpoints are not used, and its shared-memory op, which takes a compiler and a minute, is
left out.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dist_train.collectives import Collectives
from dist_train.phases import Phase
from dist_train.placement import expected_environment
from dist_train.strategies.base import Replicated, broadcast_modules
from dist_train.strategies.config import ExchangeConfig
from dist_train.strategies.sharding import OneBackward, check_phases, make_contiguous
from dist_train.strategies.zero_state import Parts, load_optimizer, optimizer_state, set_weights
from dist_train.world import World

ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


class ZeroStrategy(Replicated):
    """The strategies `zero1`, `zero2` and `zero3`; see the module. A world of one process shards nothing."""

    averages_gradients = False  # they stay inside DeepSpeed

    def __init__(self, collectives: Collectives, config: ExchangeConfig) -> None:
        self.name: str = config.strategy
        self._stage = int(config.strategy.removeprefix("zero"))
        self._collectives = collectives
        self._bucket_elements = config.bucket_bytes // 4
        self._deepspeed = _import_deepspeed(collectives.world)
        self._engine: Any = None
        self._parts = Parts(collectives)
        self._groups: list[list[nn.Parameter]] = []  # as the optimizer had them before DeepSpeed flattened them
        self._without: set[str] = set()  # parameters that this step gave no gradient
        self._guard: OneBackward | None = None

    def prepare(self, phases: Sequence[Phase]) -> list[Phase]:
        """Hands rank 0's module and the optimizer to a DeepSpeed engine, and puts the engine into the phase."""
        check_phases(phases, strategy=self.name)
        if len(phases) > 1:
            names = ", ".join(phase.name for phase in phases)
            raise ValueError(
                f"exchange.strategy {self.name!r} trains one phase, and this task has {len(phases)} ({names}): "
                "use fsdp2 or allreduce"
            )
        (phase,) = phases
        if type(phase.optimizer) not in ELEMENTWISE:
            raise ValueError(
                f"exchange.strategy {self.name!r} updates pieces of parameters, which {type(phase.optimizer).__name__} "
                f"cannot: use one of {', '.join(kind.__name__ for kind in ELEMENTWISE)}, or fsdp2 or allreduce"
            )
        if not all(parameter.requires_grad for parameter in phase.parameters()):
            raise ValueError(
                f"the optimizer of phase {phase.name!r} holds frozen parameters, which exchange.strategy {self.name!r} "
                "would leave out of its pieces: give the optimizer the trainable ones only"
            )
        if self._collectives.world.world_size == 1:
            return list(phases)
        make_contiguous(phases)
        broadcast_modules(phases, self._collectives)
        self._groups = [list(group["params"]) for group in phase.optimizer.param_groups]
        self._expect_gradients(phase)
        inside = _KeepsAutocast(phase.module)
        with _environment(self._collectives.world):
            self._engine, *_ = self._deepspeed.initialize(
                model=inside, optimizer=phase.optimizer, config=self._settings(), dist_init_required=False
            )
        for name, value in expected_environment(
            self._collectives.world.local_rank
        ).items():  # ZeRO 3 reads it in its steps, too
            os.environ.setdefault(name, value)
        self._engine.register_forward_pre_hook(inside.remember)
        self._guard = OneBackward([replace(phase, module=self._engine)], strategy=self.name)
        return [replace(phase, module=self._engine)]

    def _settings(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # not used: the loop cuts batches and says where a step ends
            "gradient_accumulation_steps": 1,  # the loop divides the loss, and `micro_batch` sets the boundary
            "gradient_clipping": 0.0,  # DeepSpeed's own default is to clip to 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "zero_optimization": {
                "stage": self._stage,
                "reduce_bucket_size": self._bucket_elements,
                "allgather_bucket_size": self._bucket_elements + self._bucket_elements % 2,
                "stage3_param_persistence_threshold": 0,  # every weight has one place, its part
                "stage3_max_reuse_distance": 0,  # a layer's weights are let go after its forward
                "stage3_max_live_parameters": self._bucket_elements,
                "stage3_prefetch_bucket_size": self._bucket_elements,
            },
        }

    def _expect_gradients(self, phase: Phase) -> None:
        ours = {id(parameter) for parameter in phase.parameters()}
        self._expected = {name for name, p in phase.module.named_parameters() if id(p) in ours and p.requires_grad}
        self._without = set(self._expected)
        for name, parameter in phase.module.named_parameters():
            if name in self._expected:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._without.discard(name))

    # -- a step ------------------------------------------------------------------------------------------------

    @contextmanager
    def micro_batch(self, phase: Phase, *, synchronize: bool) -> Iterator[None]:  # noqa: ARG002
        """Tells the engine which micro-batch is the step's last."""
        if self._engine is not None:
            self._engine.set_gradient_accumulation_boundary(synchronize)
        yield

    def backward(self, phase: Phase, loss: torch.Tensor) -> None:
        """The engine's backward, the only place that may differentiate through the module."""
        if self._engine is None or self._guard is None:
            super().backward(phase, loss)
            return
        with self._guard.backward():
            self._engine.backward(loss)

    def finish(self, phase: Phase) -> None:
        """Checks that every rank gave every parameter a gradient; the exchange is done.

        Raises:
            RuntimeError: on every rank, when one did not.
        """
        if self._engine is None:
            return
        missing = torch.tensor([name in self._without for name in sorted(self._expected)], dtype=torch.uint8)
        missing = self._collectives.max_(missing, name=f"{phase.name} parameters unused")
        self._without = set(self._expected)
        names = [name for name, gone in zip(sorted(self._expected), missing.tolist(), strict=True) if gone]
        if names:
            raise RuntimeError(
                f"phase {phase.name!r}: some rank gave {len(names)} parameters no gradient ({', '.join(names[:3])}), "
                f"which exchange.strategy {self.name!r} cannot leave out: use allreduce, or freeze them"
            )

    def clip_gradients(self, phase: Phase, max_norm: float) -> torch.Tensor:
        """DeepSpeed scales the gradient in its step; this sets the norm that it may have."""
        if self._engine is None:
            return super().clip_gradients(phase, max_norm)
        zero = self._engine.optimizer
        zero.clip_grad = max_norm
        norms = zero._get_norm_groups() if self._stage == 3 else [zero.scaled_global_norm()]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).norm()

    def optimizer_step(self, phase: Phase) -> None:
        """Updates this rank's piece and gathers the weights (`zero1`, `zero2`)."""
        if self._engine is None:
            super().optimizer_step(phase)
        else:
            self._engine.step()

    # -- weights in parts --------------------------------------------------------------------------------------

    def weights(self, phase: Phase) -> dict[str, torch.Tensor]:
        """The whole weights (`zero1`, `zero2`), or this rank's flat parts."""
        if not self._is_parted:
            return super().weights(phase)
        held: list[tuple[str, Any]] = list(phase.module.named_parameters())
        return {name: parameter.ds_tensor.detach() for name, parameter in held}

    def whole(self, phase: Phase, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gathers the parts; complete on rank 0."""
        if not self._is_parted:
            return super().whole(phase, parts)
        return {name: self._parts.whole(parts[name], p) for name, p in phase.module.named_parameters()}

    def parts(self, phase: Phase, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cuts this rank's parts out."""
        if not self._is_parted:
            return super().parts(phase, whole)
        return {name: self._parts.part(whole[name], p) for name, p in phase.module.named_parameters()}

    @contextmanager
    def evaluating(self, phases: Sequence[Phase]) -> Iterator[None]:
        """Every rank holds the whole weights inside, so that ranks may have different numbers of batches."""
        if not self._is_parted:
            yield
            return
        parameters: list[Any] = list(phases[0].module.parameters())
        with self._deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:
                parameter.ds_persist = True  # or a layer's forward would let go of it
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_persist = False

    @property
    def _is_parted(self) -> bool:
        return self._engine is not None and self._stage == 3

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state(self, phases: Sequence[Phase]) -> dict[str, Any]:
        """Whole tensors under the plain module's names and in the plain optimizer's layout."""
        if self._engine is None:
            return super().state(phases)
        (phase,) = phases
        weights = self.whole(phase, self.weights(phase))
        return {
            "modules": {phase.name: {**phase.module.state_dict(), **weights}},
            "optimizers": {phase.name: optimizer_state(self._engine.optimizer, self._groups, self._parts)},
        }

    def load_state(self, phases: Sequence[Phase], state: Mapping[str, Any]) -> None:
        """Gives every rank its piece of weights and optimizer state."""
        if self._engine is None:
            super().load_state(phases, state)
            return
        (phase,) = phases
        set_weights(phase.module, state["modules"][phase.name], self._parts)
        load_optimizer(self._engine.optimizer, self._groups, state["optimizers"][phase.name], self._parts)

    def close(self) -> None:
        """Ends the engine."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None


class _KeepsAutocast(nn.Module):
    """What the engine wraps: it turns autocast off around its module, and this computes as the engine's caller did."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._autocast: tuple[str, torch.dtype, bool] | None = None

    def remember(self, *_: object) -> None:
        """A hook: how the caller computes."""
        device = next(self.module.parameters()).device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._autocast is None:
            return self.module(*args, **kwargs)
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.module(*args, **kwargs)


def _import_deepspeed(world: World) -> Any:
    with _environment(world):
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)  # DeepSpeed's calls
    __compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled; Gloo does what it does
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextmanager
def _environment(world: World) -> Iterator[None]:
    """What DeepSpeed reads from the environment while it is imported and set up; as it was, afterwards."""
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ.update(expected_environment(world.local_rank))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
