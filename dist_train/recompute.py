"""Activation checkpointing: a block keeps its input and computes itself again in the backward pass.

The gradients are the same bits as without it: the recomputation sees the random numbers and the buffers that the first
computation saw, and leaves the buffers alone, so that batch norm's running statistics move once (PyTorch's `checkpoint`
by itself moves them twice) and spectral norm iterates once. Parameters keep their names, and evaluation is untouched.
Several forwards and double backward (R1) work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_train.blocks import repeated_blocks

Recomputation = Literal["off", "blocks"]


def apply_recomputation(module: nn.Module, mode: Recomputation) -> nn.Module:
    """Makes the repeated blocks of `module` recompute (`blocks`) or leaves it as it is (`off`). Returns `module`.

    Raises:
        ValueError: the model has no repeated blocks.
    """
    if mode == "off":
        return module
    blocks = repeated_blocks(module)
    if not blocks:
        raise ValueError(
            f"training.activation_checkpointing is 'blocks', but {type(module).__name__} has no repeated blocks: give "
            "it an attribute `blocks` that lists them, or use --training.activation-checkpointing off"
        )
    for block in blocks:
        if not isinstance(block, _Recomputed):  # a subclass made at run time, as fully_shard does: no name changes
            block.__class__ = type(type(block).__name__, (_Recomputed, type(block)), {})
    return module


class _Recomputed(nn.Module):
    """Mixed in before a block's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What `checkpoint` computes in: nothing special at first, then the buffers as they are at this moment."""
        return nullcontext(), _BuffersAsTheyWere(self)


class _BuffersAsTheyWere:
    """Inside, a module has copies of the buffers that it had when this was made; after it, its own again."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = [(m, name) for m in module.modules() for name, b in m._buffers.items() if b is not None]
        self._then = [owner._buffers[name].clone() for owner, name in self._owners]  # type: ignore[union-attr]
        self._now: list[list[torch.Tensor | None]] = []

    def __enter__(self) -> None:
        self._now.append([owner._buffers[name] for owner, name in self._owners])
        for (owner, name), then in zip(self._owners, self._then, strict=True):
            owner._buffers[name] = then.clone()

    def __exit__(self, *_: object) -> None:
        for (owner, name), now in zip(self._owners, self._now.pop(), strict=True):
            owner._buffers[name] = now
