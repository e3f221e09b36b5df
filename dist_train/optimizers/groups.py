"""Parameter groups: who is decayed and adapted, and at which multiple of the learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_train.optimizers.config import OptimizerConfig


def is_norm_or_bias(parameter: nn.Parameter) -> bool:
    """True for parameters of at most one dimension: biases, and scales and shifts of normalisation layers."""
    return parameter.ndim <= 1


def parameter_groups(module: nn.Module, config: OptimizerConfig, *, learning_rate: float) -> list[dict[str, Any]]:
    """The module's trainable parameters in groups that share weight decay and learning rate.

    Norm parameters and biases are neither decayed nor adapted unless `decay_norm_and_bias`; the classifier is the
    module's last `nn.Linear`. Each group keeps its peak rate as `initial_lr` for the loop to scale. The order of the
    groups and in the groups depends on the module alone, so that an optimizer's state fits a later run.
    """
    head = _head(module) if config.head_learning_rate_factor != 1 else set()
    biases = _biases(module) if config.bias_learning_rate_factor != 1 else set()
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            decayed = config.decay_norm_and_bias or not is_norm_or_bias(parameter)
            factor = config.head_learning_rate_factor if id(parameter) in head else 1.0
            factor *= config.bias_learning_rate_factor if id(parameter) in biases else 1.0
            members.setdefault((decayed, factor), []).append(parameter)
    groups = []
    for (decayed, factor), parameters in sorted(members.items(), key=lambda item: (not item[0][0], item[0][1])):
        group: dict[str, Any] = {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr": learning_rate * factor,
            "initial_lr": learning_rate * factor,
        }
        if config.name != "sgd":
            group["adapt"] = decayed
        groups.append(group)
    return groups


def _head(module: nn.Module) -> set[int]:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError("optimizer.head_learning_rate_factor: the model has no nn.Linear to be its classifier; use 1")
    return {id(parameter) for parameter in layers[-1].parameters()}


def _biases(module: nn.Module) -> set[int]:
    """Biases of layers that multiply by a weight matrix or kernel; a normalisation layer's shift is not one."""
    found = set()
    for layer in module.modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.ndim > 1:
            found.add(id(bias))
    return found
