"""Which of the requests that are ready at the same time travel in one exchange."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

from dist_train.horovod.engine.messages import Request, Response


def fuse(responses: list[Response], threshold_bytes: int) -> list[Response]:
    """The same work in fewer responses: all-reduces and broadcasts that differ in name and shape alone are joined.

    Args:
        responses: in the order in which they became ready.
        threshold_bytes: a fused response holds at most so much, but always one request; 0 fuses nothing.
    """
    fused: list[list[Response]] = []
    open_buckets: dict[Hashable, tuple[int, int]] = {}  # what may travel together: (place in `fused`, bytes there)
    for response in responses:
        alike = _alike(response)
        if alike is None or threshold_bytes == 0:
            fused.append([response])
            continue
        num_bytes = num_request_bytes(response.requests[0])
        place, held = open_buckets.get(alike, (-1, 0))
        if place >= 0 and held + num_bytes <= threshold_bytes:
            fused[place].append(response)
            open_buckets[alike] = (place, held + num_bytes)
        else:
            open_buckets[alike] = (len(fused), num_bytes)
            fused.append([response])
    return [
        bucket[0]._replace(requests=tuple(request for response in bucket for request in response.requests))
        for bucket in fused
    ]


def num_request_bytes(request: Request) -> int:
    """Bytes of a request's tensors."""
    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(request.shapes, request.dtypes, strict=True)
    )


def _alike(response: Response) -> Hashable | None:
    if response.kind not in ("allreduce", "broadcast"):
        return None
    first = response.requests[0]
    if len(set(first.dtypes)) > 1:
        return None
    return (
        response.kind, response.process_set, first.dtypes[:1], first.op, first.root,
        first.prescale, first.postscale, first.device,
    )  # fmt: skip
