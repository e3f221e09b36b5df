"""Fusion buckets: which gradients travel together, and the flat buffer they travel in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dist_train.collectives import Pending

FEWEST_BUCKETS, LEAST_BYTES = 4, 1_000_000


def usual_bucket_bytes(num_bytes: int, most: int, *, hides: bool) -> int:
    """The size of buckets for gradients of `num_bytes` in all where `most` is asked for.

    Four buckets at least where a network or a GPU can work beside the backward pass (`hides`): what is left of the
    exchange after it is the last bucket, and a model that fits into one would hide nothing. Below a megabyte latency
    costs more than that. Between processes of one node on their CPUs the exchange is work of the same processors, and
    starting it early only disturbs them: as few buckets as `most` allows.
    """
    return min(most, max(num_bytes // FEWEST_BUCKETS, LEAST_BYTES)) if hides else most


def plan_buckets(
    sizes_bytes: Sequence[int], dtypes: Sequence[torch.dtype], order: Sequence[int], bucket_bytes: int
) -> list[list[int]]:
    """Fuses parameters, in readiness `order`, into buckets of one dtype and about `bucket_bytes`.

    Returns lists of indices; every index is in exactly one, and a bucket exceeds `bucket_bytes` only when it holds a
    single parameter that does.
    """
    buckets: list[list[int]] = []
    open_of: dict[torch.dtype, int] = {}
    filled: list[int] = []
    for index in order:
        current = open_of.get(dtypes[index])
        if current is None or filled[current] + sizes_bytes[index] > bucket_bytes:
            open_of[dtypes[index]] = current = len(buckets)
            buckets.append([])
            filled.append(0)
        buckets[current].append(index)
        filled[current] += sizes_bytes[index]
    return buckets


class Bucket:
    """A flat buffer, and a view in it for each of its parameters with that parameter's own strides.

    Args:
        name: says in accounts and errors what this is.
        indices: the members' places in `parameters`.
        parameters: all parameters of the phase.
        multiple_of: the buffer is padded with zeros to a multiple of this many elements.
        num_flags: elements behind the gradients that travel with them and are added up unscaled.
    """

    def __init__(
        self,
        name: str,
        indices: Sequence[int],
        parameters: Sequence[nn.Parameter],
        *,
        multiple_of: int = 1,
        num_flags: int = 0,
    ) -> None:
        self.name = name
        self.indices = list(indices)
        members = [parameters[index] for index in indices]
        self.sizes = [parameter.numel() for parameter in members]
        length = sum(self.sizes)
        padded = -(-(length + num_flags) // multiple_of) * multiple_of
        self.flat = torch.zeros(padded, dtype=members[0].dtype, device=members[0].device)
        self.gradients, self.flags = self.flat[:length], self.flat[length : length + num_flags]
        self.views = []
        start = 0
        for parameter, size in zip(members, self.sizes, strict=True):
            part = self.flat[start : start + size]
            start += size
            dense = parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
            self.views.append(
                part.as_strided(parameter.size(), parameter.stride(), part.storage_offset())
                if dense
                else part.view(parameter.size())
            )
        self.reset()

    def reset(self) -> None:
        """Ready for the next step."""
        self.missing = len(self.indices)
        self._present: list[tuple[int, int] | None] = [None] * len(self.indices)  # which gradients are in already
        self.pending: Pending | None = None
        self.stale = False

    def wait(self) -> None:
        """Blocks until the buffer holds the result."""
        if self.pending is not None:
            self.pending.wait()

    def put(self, place: int, gradient: torch.Tensor, scale: float) -> None:
        """Copies the gradient of the member at `place` in now, while the processor has it at hand (host memory)."""
        view = self.views[place]
        address = gradient.data_ptr()
        if gradient.layout == torch.strided and address != view.data_ptr() and not gradient.requires_grad:
            torch.mul(gradient, scale, out=view)
            self._present[place] = (address, gradient._version)

    def fill(self, parameters: Sequence[nn.Parameter], scale: float = 1.0) -> None:
        """Copies those of the members' gradients in that are not there yet, times `scale`; zero where there is none."""
        views, gradients = [], []
        for index, view, present in zip(self.indices, self.views, self._present, strict=True):
            gradient = parameters[index].grad
            if present is not None and gradient is not None and present == (gradient.data_ptr(), gradient._version):
                continue
            if gradient is None:
                view.zero_()
            elif gradient.layout != torch.strided:
                raise ValueError(
                    f"{self.name}: a gradient of shape {tuple(gradient.shape)} is sparse, and the exchange is of dense "
                    "ones: build the nn.Embedding with sparse=False"
                )
            else:
                if gradient.data_ptr() == view.data_ptr():  # zeroed in place: another backward would add to the buffer
                    gradient = parameters[index].grad = gradient.clone()
                views.append(view)
                gradients.append(gradient)
        if scale != 1 and self.flat.device.type == "cpu":  # in one pass over memory
            for view, gradient in zip(views, gradients, strict=True):
                torch.mul(gradient, scale, out=view)
        elif views:  # in few kernels
            torch._foreach_copy_(views, gradients)
            if scale != 1:
                self.gradients.mul_(scale)
        self._present = [None] * len(self.indices)  # from here on the buffer is the exchange's
