"""Temporal shift: some channels of a frame's features are replaced by those of its neighbors in time.

Lin, Gan, Han 2019, "TSM: Temporal Shift Module for Efficient Video Understanding" (arXiv 1811.08383),
section 3. With `fold = channels // fold_div`:

- bidirectional (offline): channels [0, fold) come from the next frame, [fold, 2 * fold) from the previous
  one;
- unidirectional (online): channels [0, fold) come from the previous frame, nothing from the future.

What lies before the first and after the last frame of a clip is zero. Frames are the leading dimension of
`[B*T, ...]` with the T frames of a clip next to each other; the memory format of the input (contiguous or
channels-last) is kept in the output and in the gradient.

`temporal_shift` is the fast one: one copy forward, one copy backward, nothing saved, and differentiable any
number of times, because the adjoint of a shift is the opposite shift. `temporal_shift_reference` says the
same in plain slices; autograd's backward of those slices fills and adds whole tensors, which costs ten
times as much and loses channels-last.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

Direction = Literal["bidirectional", "unidirectional"]
DIRECTIONS: tuple[Direction, ...] = ("bidirectional", "unidirectional")

_Fold = tuple[int, int, int]
"""(first channel, end channel, step): output frame t takes these channels from input frame t + step."""


def _folds(channels: int, fold_div: int, direction: Direction) -> tuple[_Fold, ...]:
    fold = channels // fold_div
    if direction == "bidirectional":
        return ((0, fold, 1), (fold, 2 * fold, -1))
    return ((0, fold, -1),)


def _check(x: Tensor, num_segments: int, fold_div: int, direction: str) -> None:
    check_shift_options(num_segments=num_segments, fold_div=fold_div, direction=direction)
    if x.ndim < 2:
        raise ValueError(f"temporal shift: expected [B*T, C, ...], got the shape {tuple(x.shape)}")
    if x.shape[0] % num_segments:
        raise ValueError(
            f"temporal shift: {x.shape[0]} frames do not divide into clips of num_segments={num_segments}; "
            "build the model with the number of frames that each clip has"
        )


def check_shift_options(*, num_segments: int, fold_div: int, direction: str) -> None:
    """Raises ValueError where no shift is defined; the same for the function, the module and the models."""
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments}: a clip has at least 1 frame")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}: choose one of {', '.join(DIRECTIONS)}")
    smallest = 2 if direction == "bidirectional" else 1
    if fold_div < smallest:
        raise ValueError(f"fold_div={fold_div}: a {direction} shift needs at least {smallest}")


def _shifted(x: Tensor, num_segments: int, folds: tuple[_Fold, ...]) -> Tensor:
    """A copy of all, then the shifted channels again; keeps the memory format; not differentiable."""
    out = torch.clone(x)
    num_clips = x.shape[0] // num_segments
    source = x.unflatten(0, (num_clips, num_segments))
    target = out.unflatten(0, (num_clips, num_segments))
    for start, end, step in folds:
        if step > 0:
            target[:, :-1, start:end] = source[:, 1:, start:end]
            target[:, -1, start:end] = 0
        else:
            target[:, 1:, start:end] = source[:, :-1, start:end]
            target[:, 0, start:end] = 0
    return out


class _TemporalShift(torch.autograd.Function):
    # Not with setup_context: PyTorch then inspects the signature at every call, more than a small shift itself takes.
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_segments: int, folds: tuple[_Fold, ...]) -> Tensor:
        ctx.num_segments, ctx.folds = num_segments, folds
        return _shifted(x, num_segments, folds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        adjoint = tuple((start, end, -step) for start, end, step in ctx.folds)
        return _TemporalShift.apply(grads[0], ctx.num_segments, adjoint), None, None


def temporal_shift(
    x: Tensor, num_segments: int, *, fold_div: int = 8, direction: Direction = "bidirectional"
) -> Tensor:
    """Shifts channels between the frames of each clip.

    Args:
        x: `[B * num_segments, C, ...]`, any dtype and device.
        num_segments: frames of a clip (T).
        fold_div: 1 / fold_div of the channels moves in each direction.
        direction: "bidirectional" or "unidirectional" (from the past only).

    Returns:
        A new tensor with the shape, dtype and memory format of `x`.

    Raises:
        ValueError: if the frames do not divide into clips, or an option is out of range.
    """
    _check(x, num_segments, fold_div, direction)
    shifted: Tensor = _TemporalShift.apply(x, num_segments, _folds(x.shape[1], fold_div, direction))
    return shifted


def temporal_shift_reference(
    x: Tensor, num_segments: int, *, fold_div: int = 8, direction: Direction = "bidirectional"
) -> Tensor:
    """The definition in plain slices, for tests and reading; arguments and errors as `temporal_shift`."""
    _check(x, num_segments, fold_div, direction)
    clips = x.unflatten(0, (x.shape[0] // num_segments, num_segments))
    fold = x.shape[1] // fold_div
    out = torch.zeros_like(clips)
    if direction == "bidirectional":
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    else:
        out[:, 1:, :fold] = clips[:, :-1, :fold]
        out[:, :, fold:] = clips[:, :, fold:]
    return out.flatten(0, 1)


class TemporalShift(nn.Module):
    """`temporal_shift` as a module without parameters, buffers or state; arguments as the function's."""

    def __init__(self, num_segments: int, *, fold_div: int = 8, direction: Direction = "bidirectional") -> None:
        super().__init__()
        check_shift_options(num_segments=num_segments, fold_div=fold_div, direction=direction)
        self.num_segments = num_segments
        self.fold_div = fold_div
        self.direction: Direction = direction

    def forward(self, x: Tensor) -> Tensor:
        return temporal_shift(x, self.num_segments, fold_div=self.fold_div, direction=self.direction)

    def extra_repr(self) -> str:
        return f"num_segments={self.num_segments}, fold_div={self.fold_div}, direction={self.direction!r}"
