"""Video models: plain `nn.Module`s from normalized float clips `[B, T, C, H, W]` to logits `[B, K]`.

`MODELS` lists them by name; the name of a model is the name of its function. `build` makes one from its
name, or from a user's own function written as "package.module:function".

    model = build("tsm_resnet50", num_classes=400, num_segments=8)
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints, is_typeddict

from torch import nn

from models.video.tsm import TSM, tsm_resnet18, tsm_resnet34, tsm_resnet50, tsm_resnet101
from models.video.tsn import TSN, tsn_resnet18, tsn_resnet34, tsn_resnet50, tsn_resnet101

__all__ = [
    "MODELS",
    "TSM",
    "TSN",
    "build",
    "resolve",
    "tsm_resnet18",
    "tsm_resnet34",
    "tsm_resnet50",
    "tsm_resnet101",
    "tsn_resnet18",
    "tsn_resnet34",
    "tsn_resnet50",
    "tsn_resnet101",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "tsm_resnet18": tsm_resnet18,
    "tsm_resnet34": tsm_resnet34,
    "tsm_resnet50": tsm_resnet50,
    "tsm_resnet101": tsm_resnet101,
    "tsn_resnet18": tsn_resnet18,
    "tsn_resnet34": tsn_resnet34,
    "tsn_resnet50": tsn_resnet50,
    "tsn_resnet101": tsn_resnet101,
}


def build(name: str, /, **arguments: Any) -> nn.Module:
    """Makes the model `name` with keyword arguments.

    Args:
        name: a key of `MODELS`, or "package.module:function" for a function that returns an `nn.Module`.
        arguments: passed on to the function.

    Raises:
        ValueError: for an unknown name, function or argument (with the nearest known one), an argument out
            of range, or a function that does not return an `nn.Module`. An exception inside a user's own
            module is left alone.
    """
    function = resolve(name)
    _check_arguments(name, function, arguments)
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: returned a {type(model).__name__}, not an nn.Module")
    return model


def resolve(name: str) -> Callable[..., Any]:
    """The function behind a model's name, without calling it; names and errors as in `build`."""
    if ":" not in name:
        if name not in MODELS:
            raise ValueError(
                f"unknown model {name!r}{_suggestion(name, MODELS)}; known are {', '.join(MODELS)}, "
                "and your own as 'package.module:function'"
            )
        return MODELS[name]
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"model {name!r}: write your own model as 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"model {name!r}: there is no module {error.name!r}; is its folder on PYTHONPATH?") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"model {name!r}: {module_name} has no function {function_name!r}{_suggestion(function_name, public)}"
        )
    return function


def _check_arguments(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    known = [key for key, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    takes_any = False
    for key, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = get_args(get_type_hints(function, include_extras=True).get(key, None))
            # Unpack[SomeTypedDict] names its keys; a plain **kwargs takes anything.
            if options and is_typeddict(options[0]):
                known += options[0].__annotations__
            else:
                takes_any = True
    for key in arguments:
        if key not in known and not takes_any:
            raise ValueError(
                f"model {name!r}: unknown argument {key!r}{_suggestion(key, known)}; it takes {', '.join(known)}"
            )
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in arguments
    ]
    if missing:
        raise ValueError(f"model {name!r}: needs the argument {missing[0]!r}")


def _suggestion(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
