"""The model of an experiment: built by name, sized to the data, started from weights where some are given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.config import ModelConfig
from models.video import MODELS, build, resolve
from models.video.checkpoints import from_torchvision, from_tsm_repository


def make_model(config: ModelConfig, *, num_classes: int, num_segments: int, in_channels: int = 3) -> nn.Module:
    """Builds the model with those of the configuration's fields that its function takes.

    Raises:
        ValueError: unknown model, an option out of range, or weights that do not fit.
    """
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "num_segments": num_segments,
        "in_channels": in_channels,
        "width": config.width,
        "stem_stride": config.stem_stride,
        "dropout": config.dropout,
        "zero_init_residual": config.zero_init_residual,
    }
    if config.name not in MODELS:
        taken = inspect.signature(resolve(config.name)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
            options = {name: value for name, value in options.items() if name in taken}
    model = build(config.name, **options)
    if config.weights is not None:
        load_weights(model, config.weights)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a file of weights: one of our checkpoints' `state.pt`, torchvision's, or the TSM repository's.

    Raises:
        ValueError: the file cannot be read, or its keys or shapes do not fit the model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"--model.weights {path} cannot be read: {str(error).splitlines()[0]}") from None
    except Exception as error:  # pickle.UnpicklingError and its kin
        raise ValueError(f"--model.weights {path} is not a file of tensors: {str(error).splitlines()[0]}") from None
    model.load_state_dict(_for_model(content, model.state_dict(), path))


def _for_model(content: Any, target: Mapping[str, torch.Tensor], path: Path) -> Mapping[str, torch.Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"--model.weights {path} holds a {type(content).__name__}, not a state dict")
    if "modules" in content:
        content = next(iter(content["modules"].values()))
    content = content.get("state_dict", content)
    if any("base_model." in key for key in content):
        return from_tsm_repository(content, target=target)
    keep_head = "fc.weight" in content and content["fc.weight"].shape == target["fc.weight"].shape
    return from_torchvision(content, target=target, keep_head=keep_head)
