"""DeepSpeed's flat state to and from the plain module's and the plain optimizer's.

ZeRO 1 and 2 cut each parameter group, flattened and joined, into one piece a rank; ZeRO 3 cuts each parameter,
flattened and padded, into one part a rank. Both are read and written here through DeepSpeed's own accessors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.collectives import Collectives


class Parts:
    """Cuts whole tensors into ZeRO 3's parts and joins them."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def part(self, whole: torch.Tensor, parameter: Any) -> torch.Tensor:
        """This rank's part of `whole`, padded with zeros."""
        size = parameter.ds_tensor.numel()
        part = torch.zeros(size, dtype=whole.dtype, device=parameter.ds_tensor.device)
        mine = whole.flatten()[self._collectives.world.rank * size :][:size]
        part[: len(mine)] = mine
        return part

    def whole(self, part: torch.Tensor, parameter: Any) -> torch.Tensor:
        """All ranks' parts, joined, on every rank."""
        size, world = part.numel(), self._collectives.world
        joined = torch.zeros(size * world.world_size, dtype=part.dtype, device=part.device)
        joined[world.rank * size :][:size] = part
        return self._collectives.sum_(joined)[: parameter.ds_numel].view(parameter.ds_shape)


def set_weights(module: nn.Module, whole: Mapping[str, torch.Tensor], parts: Parts) -> None:
    """Writes a plain state dict into the module, and into the weights that DeepSpeed's optimizer updates."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    weights: dict[str, Any] = dict(module.named_parameters())
    if any(hasattr(parameter, "ds_tensor") for parameter in weights.values()):
        for name, parameter in weights.items():
            part = parts.part(whole[name], parameter)
            parameter.ds_tensor.copy_(part)
            safe_set_local_fp32_param(parameter, part)
        buffers = {name: tensor for name, tensor in whole.items() if name not in weights}
        module.load_state_dict(buffers, strict=False)
        return
    module.load_state_dict(whole)
    for parameter in weights.values():
        safe_set_full_fp32_param(parameter, parameter.detach())


def optimizer_state(zero: Any, groups: Sequence[Sequence[nn.Parameter]], parts: Parts) -> dict[str, Any]:
    """The plain optimizer's state dict. Every rank calls it and has all of it."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    _link(zero, groups)
    state: dict[int, dict[str, Any]] = {}
    for index, (flat, parameter) in enumerate(_pieces(zero, groups)):
        own = {}
        for key, value in zero.optimizer.state.get(flat, {}).items():
            if not isinstance(value, torch.Tensor) or value.shape != flat.shape:
                own[key] = value
            elif hasattr(parameter, "ds_tensor"):
                own[key] = parts.whole(safe_get_local_optimizer_state(parameter, key), parameter)
            else:
                own[key] = safe_get_full_optimizer_state(parameter, key)
        if own:
            state[index] = own
    options = [{key: value for key, value in g.items() if key != "params"} for g in zero.optimizer.param_groups]
    first, layout = 0, []
    for group, option in zip(groups, options, strict=True):
        layout.append({**option, "params": list(range(first, first + len(group)))})
        first += len(group)
    return {"state": state, "param_groups": layout}


def load_optimizer(zero: Any, groups: Sequence[Sequence[nn.Parameter]], saved: Mapping[str, Any], parts: Parts) -> None:
    """Takes a plain optimizer's state dict; its options stay those of this run.

    Raises:
        ValueError: the parameters of a group have different counters, which a flat piece cannot keep.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    pieces = list(_pieces(zero, groups))
    if len(pieces) != sum(len(group["params"]) for group in saved["param_groups"]):
        raise ValueError("the checkpoint's optimizer has other parameters: it belongs to another model")
    for index, (flat, parameter) in enumerate(pieces):
        target = zero.optimizer.state[flat]
        for key, value in saved["state"].get(index, {}).items():
            if not isinstance(value, torch.Tensor) or value.shape != _shape(parameter):
                if key in target and not torch.equal(torch.as_tensor(target[key]), torch.as_tensor(value)):
                    raise ValueError(
                        f"the checkpoint's optimizer counts {key!r} differently for parameters of one group (some had "
                        "steps without a gradient), which ZeRO cannot keep: resume with allreduce or fsdp2"
                    )
                target[key] = value.clone() if isinstance(value, torch.Tensor) else value
            elif key not in target:
                target[key] = torch.zeros_like(flat)
    _link(zero, groups)
    for index, (flat, parameter) in enumerate(pieces):
        for key, value in saved["state"].get(index, {}).items():
            if zero.optimizer.state[flat][key] is None or not isinstance(value, torch.Tensor):
                continue
            if value.shape != _shape(parameter):
                continue
            value = value.to(flat.device)
            if hasattr(parameter, "ds_tensor"):
                safe_set_local_optimizer_state(parameter, parts.part(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def _pieces(zero: Any, groups: Sequence[Sequence[nn.Parameter]]) -> Iterator[tuple[torch.Tensor, Any]]:
    """Each parameter with the flat piece that has its place, in the order of the plain optimizer."""
    for number, group in enumerate(groups):
        for parameter in group:
            if hasattr(parameter, "ds_tensor"):
                sub_group, *_ = zero.grad_position[zero.get_param_id(parameter)]
                yield zero.fp32_partitioned_groups_flat[sub_group], parameter
            else:
                yield zero.single_partition_of_fp32_groups[number], parameter


def _link(zero: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Lets ZeRO 1 and 2's accessors find each parameter's optimizer state.

    DeepSpeed does so at the first group's first update, when optimizers that make their state in their first update
    (all of PyTorch's) have none yet for the other groups.
    """
    for flat, parameter in _pieces(zero, groups):
        if getattr(parameter, "_hp_mapping", None) is not None:
            parameter._hp_mapping.set_optim_state_fragment(flat, zero.optimizer.state.get(flat, {}))


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_tensor") else parameter.shape
