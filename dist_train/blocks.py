"""The repeated blocks of a network: the unit that is recomputed, and the unit that is sharded.

A model names its blocks itself in an attribute `blocks` (a method that yields them, or a container of them); of any
other model they are the children of its outermost `nn.Sequential`s and `nn.ModuleList`s that hold layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of `module` in the order of its definition; none inside another; empty where it has none.

    Raises:
        ValueError: `module.blocks` does not give modules of `module`.
    """
    named = getattr(module, "blocks", None)
    if named is None:
        return list(_found(module))
    given = named() if callable(named) and not isinstance(named, nn.Module) else named
    blocks, known = list(given) if isinstance(given, Iterable) else [], set(module.modules())
    if not blocks or not all(block in known for block in blocks):
        raise ValueError(
            f"{type(module).__name__}.blocks has to give the model's own repeated modules (a method that yields them, "
            "or an nn.ModuleList or nn.Sequential of them)"
        )
    return blocks


def _found(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        members = list(child.children())
        if isinstance(child, (nn.Sequential, nn.ModuleList)) and any(_is_block(member) for member in members):
            yield from (member for member in members if _is_block(member))
        else:
            yield from _found(child)


def _is_block(module: nn.Module) -> bool:
    """True for a module with layers and parameters, which a container of containers is not."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return False
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
