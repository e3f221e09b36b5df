"""Weights of others as our `state_dict`s: checkpoints of the TSM repository, torchvision's ImageNet ones.

Pure functions from names and tensors to names and tensors; reading the file is the caller's:

    state = torch.load("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e50.pth", weights_only=True)
    model = tsm_resnet50(num_classes=400, num_segments=8)
    model.load_state_dict(from_tsm_repository(state["state_dict"], target=model.state_dict()))

`target` is the `state_dict` of the model that the weights are for. What is returned has exactly its keys
and shapes, so a strict `load_state_dict` takes it; anything missing, left over or of another shape is an
error that names it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

HEAD_KEYS = ("fc.weight", "fc.bias")

_UNSUPPORTED_TSM = (
    (re.compile(r"(^|\.)nl\."), "has non-local blocks"),
    (re.compile(r"^(module\.)?base_model\.features\."), "is a MobileNetV2"),
    (re.compile(r"^(module\.)?base_model\.(inception|conv1_7x7)"), "is a BNInception"),
    (re.compile(r"layer2\.net\.\d+\."), "was trained with temporal pooling"),
)


class CheckpointError(ValueError):
    """Weights that do not fit the model they are meant for."""


def from_tsm_repository(
    state_dict: Mapping[str, Tensor], *, target: Mapping[str, Tensor], keep_head: bool = True
) -> dict[str, Tensor]:
    """Renames a checkpoint of mit-han-lab/temporal-shift-module to our keys.

    Its layout: `module.` from DataParallel, `base_model.` for the ResNet, `.net` where a TemporalShift
    wraps a layer (`module.base_model.layer1.0.conv1.net.weight`), and `new_fc` for the classifier
    (`base_model.fc` without dropout).

    Args:
        state_dict: the entry "state_dict" of the checkpoint.
        target: the `state_dict` of the model to load into (any `shift_place`: both names map to the same
            keys).
        keep_head: False leaves the target's own `fc`, for fine-tuning on other classes.

    Raises:
        CheckpointError: a ValueError that says which keys are unknown, missing or of another shape.
    """
    _check_tensors(state_dict, source="TSM checkpoint")
    for key in state_dict:
        for pattern, what in _UNSUPPORTED_TSM:
            if pattern.search(key):
                raise CheckpointError(
                    f"TSM checkpoint: {what} (key {key!r}), and only plain ResNets are supported here"
                )
    renamed: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        new_key = _rename_tsm_key(key)
        if new_key in renamed:
            raise CheckpointError(f"TSM checkpoint: two keys map to {new_key!r}, the second is {key!r}")
        renamed[new_key] = value
    if not keep_head:
        renamed = _without_head(renamed)
    return _fitted(renamed, target, source="TSM checkpoint", take_head=not keep_head)


def from_torchvision(
    state_dict: Mapping[str, Tensor], *, target: Mapping[str, Tensor], keep_head: bool = False
) -> dict[str, Tensor]:
    """ImageNet weights of torchvision's ResNets, whose keys are ours; `fc` stays the target's by default.

    Args:
        state_dict: as in the `.pth` files of torchvision (those of before 2018 lack `num_batches_tracked`).
        target: the `state_dict` of the model to load into.
        keep_head: True keeps the 1000-class `fc` too, for a `ResNet` on ImageNet.

    Raises:
        CheckpointError: a ValueError that says which keys are unknown, missing or of another shape.
    """
    _check_tensors(state_dict, source="torchvision weights")
    renamed = dict(state_dict) if keep_head else _without_head(state_dict)
    return _fitted(renamed, target, source="torchvision weights", take_head=not keep_head)


def _rename_tsm_key(key: str) -> str:
    name = key.removeprefix("module.")
    if name.startswith("new_fc."):
        return "fc." + name.removeprefix("new_fc.")
    if not name.startswith("base_model."):
        raise CheckpointError(
            f"TSM checkpoint: unknown key {key!r}; expected names like "
            "'module.base_model.layer1.0.conv1.net.weight' and 'module.new_fc.weight'"
        )
    return name.removeprefix("base_model.").replace(".net.", ".")


def _check_tensors(state_dict: Mapping[str, Tensor], *, source: str) -> None:
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            hint = "; pass its entry 'state_dict'" if "state_dict" in state_dict else ""
            raise CheckpointError(f"{source}: {key!r} is a {type(value).__name__}, not a tensor{hint}")


def _without_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if key not in HEAD_KEYS}


def _fitted(
    weights: dict[str, Tensor], target: Mapping[str, Tensor], *, source: str, take_head: bool
) -> dict[str, Tensor]:
    """The weights in the target's order, after a check of every key and shape."""
    given = dict(weights)
    for key, value in target.items():
        if take_head and key in HEAD_KEYS:
            given[key] = value
        elif key.endswith(".num_batches_tracked"):
            given.setdefault(key, torch.zeros_like(value))
    problems = []
    if unknown := sorted(given.keys() - target.keys()):
        problems.append(_listed("unknown", unknown))
    if missing := sorted(target.keys() - given.keys()):
        problems.append(_listed("missing", missing))
    different = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in target.items()
        if key in given and given[key].shape != value.shape
    ]
    if different:
        problems.append(_listed("of another shape", different))
    if problems:
        advice = "check depth, width, stem_stride and in_channels of the model"
        if different and all(entry.startswith("fc.") for entry in different) and not (unknown or missing):
            advice = "other classes: build the model with as many, or pass keep_head=False"
        raise CheckpointError(f"{source}: keys {'; '.join(problems)}; {advice}")
    return {key: given[key] for key in target}


def _listed(what: str, names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}"
