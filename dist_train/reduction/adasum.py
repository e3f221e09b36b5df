"""Adasum: a sum of gradients that keeps the step's length where they agree (Maleki et al. 2020, arXiv 2006.02924).

Two gradients a and b of one layer are combined to

    Adasum(a, b) = (1 - a.b / (2 a.a)) a  +  (1 - a.b / (2 b.b)) b

which is their sum where they are orthogonal and their mean where they are equal. More than two are combined in pairs
along a binary tree: neighbours first, then neighbouring pairs, and so on. The operation is not associative, so the tree
belongs to the definition.

The exchange is the paper's algorithm 1, recursive vector halving and distance doubling: at distance d a rank keeps one
half of its window, gets the same half of its partner's vector, and combines the two; the dot products, which need the
whole vectors, are summed over the 2d ranks that hold them. Then the windows travel back. A rank sends and receives
2(P-1)/P times its tensors' bytes, in 2 log2(P) messages and some small ones for the dot products.

Where the world size is no power of two, P is the largest below it: rank P + i hands its tensors to rank i, which
combines them with its own first, and gets the result at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dist_train.collectives import Collectives, Pending
from dist_train.reduction.lane import Lane
from dist_train.reduction.reducer import Stateless, Unscaled

if TYPE_CHECKING:
    from dist_train.strategies.buckets import Bucket


def adasum_(tensors: Sequence[torch.Tensor], *, group: dist.ProcessGroup) -> None:
    """Replaces each tensor by the Adasum of all ranks' tensors; each tensor is a layer with dot products of its own.

    Blocks until the result is there: the same bits on every rank of `group`. Dot products are taken in float64;
    float16 and bfloat16 are combined in float32 and travel as they are.

    Args:
        tensors: dense, floating point; the same shapes and dtypes, in the same order, on every rank.
        group: the ranks.

    Raises:
        ValueError: a tensor that is not dense or not floating point.
    """
    for tensor in tensors:
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ValueError(
                f"Adasum takes dense floating-point tensors, not {tensor.dtype} in {tensor.layout}: use a sum instead"
            )
    if group.size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        layers = [tensor for tensor in tensors if tensor.dtype == dtype]
        with torch.no_grad():
            flat = torch.cat([layer.reshape(-1) for layer in layers])
            adasum_flat_(flat, [layer.numel() for layer in layers], group=group)
            for layer, part in zip(layers, flat.split([layer.numel() for layer in layers]), strict=True):
                layer.copy_(part.view(layer.shape))


def adasum_flat_(flat: torch.Tensor, sizes: Sequence[int], *, group: dist.ProcessGroup) -> None:
    """`adasum_` for layers that already lie one after another in `flat`, `sizes` elements each."""
    rank, power = group.rank(), 1 << (group.size().bit_length() - 1)
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    has_helper = rank + power < group.size()
    if rank >= power:
        _swap(flat, None, rank - power, group)
        _swap(None, flat, rank - power, group)
        return
    if has_helper:
        other = torch.empty_like(flat)
        _swap(None, other, rank + power, group)
        flat.copy_(_combine(flat, other, starts, 0, _dots(flat, other, starts, 0)))
    _halve_and_double(flat, starts, rank, power, group)
    if has_helper:
        _swap(flat, None, rank + power, group)


class AdasumReducer(Unscaled, Stateless):
    """Adasum of buckets, parameter by parameter; see `dist_train.reduction.reducer.Reducer`."""

    multiple_of, sums_flags = 1, False

    def __init__(self, collectives: Collectives, channel: Any, lane: Lane) -> None:
        self._collectives, self._channel, self._lane = collectives, channel, lane

    def start(self, bucket: Bucket, *, weight: float | None, total: float) -> Pending:  # noqa: ARG002
        """See `Reducer`. A rank without a gradient adds nothing; other weights have no meaning here."""
        if weight is not None:
            raise ValueError("Adasum has no weights, so it cannot join uneven inputs: use exchange.reduction average")
        work = self._lane.start(lambda: adasum_flat_(bucket.flat, bucket.sizes, group=self._channel))
        on_host = bucket.flat.device.type == "cpu"
        return self._collectives.started(work, num_bytes=bucket.flat.nbytes, name=bucket.name, on_host=on_host)


def _halve_and_double(
    flat: torch.Tensor, starts: Sequence[int], rank: int, power: int, group: dist.ProcessGroup
) -> None:
    """Algorithm 1 over the ranks below `power`: down with halving windows, up with the results."""
    windows = [(0, flat.numel())]
    distance = 1
    while distance < power:
        begin, end = windows[-1]
        middle = begin + (end - begin) // 2
        is_left = not rank & distance
        mine, theirs = ((begin, middle), (middle, end)) if is_left else ((middle, end), (begin, middle))
        own = flat[slice(*mine)]
        other = torch.empty_like(own)
        _swap(flat[slice(*theirs)], other, rank ^ distance, group)
        left, right = (own, other) if is_left else (other, own)
        dots = _dots(left, right, starts, mine[0])
        step = 1
        while step <= distance:  # pairwise, so that every rank adds the same numbers in the same order
            partners = torch.empty_like(dots)
            _swap(dots, partners, rank ^ step, group)
            dots += partners
            step *= 2
        own.copy_(_combine(left, right, starts, mine[0], dots))
        windows.append(mine)
        distance *= 2
    while distance > 1:
        distance //= 2
        (begin, end), mine = windows[-2], windows.pop()
        theirs = (begin, mine[0]) if rank & distance else (mine[1], end)
        _swap(flat[slice(*mine)], flat[slice(*theirs)], rank ^ distance, group)


def _dots(left: torch.Tensor, right: torch.Tensor, starts: Sequence[int], begin: int) -> torch.Tensor:
    """`[num_layers, 3]` of float64: a.b, a.a and b.b over each layer's part of the window that starts at `begin`."""
    dots = torch.zeros(len(starts) - 1, 3, dtype=torch.float64, device=left.device)
    for layer, part in _parts(starts, begin, left.numel()):
        a, b = left[part].double(), right[part].double()
        dots[layer] = torch.stack([a @ b, a @ a, b @ b])
    return dots


def _combine(
    left: torch.Tensor, right: torch.Tensor, starts: Sequence[int], begin: int, dots: torch.Tensor
) -> torch.Tensor:
    """The window's Adasum from the dot products over whole layers. A gradient of length zero adds nothing."""
    product, lefts, rights = dots.unbind(1)
    nothing = torch.zeros_like(product)
    of_left = 1 - torch.where(lefts == 0, nothing, product / (2 * lefts))
    of_right = 1 - torch.where(rights == 0, nothing, product / (2 * rights))
    precise = torch.promote_types(left.dtype, torch.float32)
    combined = torch.empty_like(left)
    for layer, part in _parts(starts, begin, left.numel()):
        combined[part] = left[part].to(precise) * of_left[layer] + right[part].to(precise) * of_right[layer]
    return combined


def _parts(starts: Sequence[int], begin: int, length: int) -> list[tuple[int, slice]]:
    """Each layer with a part in the window of `length` elements from `begin`, and where in the window that part is."""
    found = []
    for layer, (first, last) in enumerate(itertools.pairwise(starts)):
        low, high = max(first - begin, 0), min(last - begin, length)
        if low < high:
            found.append((layer, slice(low, high)))
    return found


def _swap(sent: torch.Tensor | None, received: torch.Tensor | None, peer: int, group: dist.ProcessGroup) -> None:
    """Sends and receives at once, and waits for both."""
    operations = []
    if sent is not None and sent.numel():
        operations.append(dist.P2POp(dist.isend, sent, group=group, group_peer=peer))
    if received is not None and received.numel():
        operations.append(dist.P2POp(dist.irecv, received, group=group, group_peer=peer))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
