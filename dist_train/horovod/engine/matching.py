"""Whether the ranks' requests for one collective fit together, and who differs where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dist_train.horovod.engine.messages import REDUCE_OPS, Request

_SAME_SHAPE = ("allreduce", "broadcast", "reducescatter")
_SAME_TRAILING_SHAPE = ("allgather", "alltoall")


def mismatch(requests: dict[int, Request]) -> str:
    """One line saying how requests (by rank, in order of rank) contradict each other; empty where they do not."""
    first = next(iter(requests.values()))
    if all(request is first or request == first for request in requests.values()) and not first.problem:
        return _unsuited(first)
    what = f"{first.kind} {first.name!r}"
    problems = "; ".join(f"rank {rank}: {request.problem}" for rank, request in requests.items() if request.problem)
    if problems:
        return f"{what} failed. {problems}"
    for noun, show in _compared(first.kind):
        shown = {rank: show(request) for rank, request in requests.items()}
        if len(set(shown.values())) > 1:
            return f"Mismatched {noun} in {what}: {_grouped(shown)}."
    return _unsuited(first)


def span(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-3, 7`."""
    numbers = sorted(ranks)
    parts: list[str] = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            low, high = numbers[start], numbers[i - 1]
            parts.append(str(low) if low == high else f"{low}-{high}" if high > low + 1 else f"{low}, {high}")
            start = i
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(parts)}"


def _compared(kind: str) -> list[tuple[str, Callable[[Request], Any]]]:
    compared: list[tuple[str, Callable[[Request], Any]]] = [
        ("number of tensors", lambda request: str(len(request.shapes))),
        ("data types", lambda request: ", ".join(request.dtypes)),
    ]
    if kind in _SAME_SHAPE:
        compared.append(("tensor shapes", lambda request: ", ".join(str(list(shape)) for shape in request.shapes)))
    if kind in _SAME_TRAILING_SHAPE:
        compared.append(
            (
                "tensor shapes (only the first dimension may differ)",
                lambda request: ", ".join(_trailing(shape) for shape in request.shapes),
            )
        )
    if kind in ("add_process_set", "remove_process_set"):
        compared.append(("process sets", lambda request: str(request.shapes or request.root)))
    return [
        *compared,
        ("reduce ops", lambda request: REDUCE_OPS[request.op] if request.op >= 0 else "none"),
        ("root ranks", lambda request: str(request.root)),
        ("prescale and postscale factors", lambda request: f"({request.prescale:g}, {request.postscale:g})"),
        ("devices", lambda request: request.device),
    ]


def _trailing(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(["*", *map(str, shape[1:])]) + "]" if shape else "[]"


def _grouped(shown: dict[int, str]) -> str:
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in shown.items():
        ranks_by_value.setdefault(value, []).append(rank)
    return "; ".join(f"{span(ranks)} sent {value}" for value, ranks in ranks_by_value.items())


def _unsuited(request: Request) -> str:
    if request.kind in ("allgather", "alltoall", "reducescatter") and () in request.shapes:
        return f"{request.kind} {request.name!r} got a tensor without dimensions: it needs a first dimension to divide."
    return ""
