"""Evaluation over all ranks: each sample of the split counts exactly once, at any world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dist_train.collectives import Collectives
from dist_train.phases import Prediction, Task


@torch.no_grad()
def evaluate(
    task: Task,
    batches: Iterable[Any],
    *,
    collectives: Collectives,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], list[Prediction]]:
    """Runs this rank's batches and adds the sums of all ranks.

    Ranks may have different numbers of batches: there is no collective inside the loop.

    Args:
        task: its modules are put into evaluation mode and back.
        batches: this rank's share of the split.
        collectives: the ranks.
        autocast: context for the forward pass.
        on_batch: called after each batch with the number of this rank's clips judged so far (for a progress bar).

    Returns:
        The task's summary, the same on every rank, and all predictions in sample order on rank 0 (empty elsewhere).
    """
    device = collectives.world.device
    modules = {phase.module for phase in task.phases}
    training = {module: [m for m in module.modules() if m.training] for module in modules}
    for module in modules:
        module.eval()
    totals: dict[str, torch.Tensor] = {}
    predictions: list[Prediction] = []
    num_judged = 0
    for batch in batches:
        with autocast():
            sums, found = task.evaluation_sums(batch.to(device, non_blocking=True))
        for name, value in sums.items():
            totals[name] = totals.get(name, torch.zeros((), device=device, dtype=torch.float64)) + value.double()
        predictions.extend(found)
        num_judged += len(batch)
        if on_batch is not None:
            on_batch(num_judged)
    for layers in training.values():
        for layer in layers:
            layer.training = True

    own = {name: tuple(value.shape) for name, value in totals.items()}
    shapes = {name: shape for part in _everywhere(collectives, own) for name, shape in sorted(part.items())}
    if not shapes:
        raise ValueError("evaluation saw no sample: the split is empty")
    nothing = {name: torch.zeros(shape, device=device, dtype=torch.float64) for name, shape in shapes.items()}
    flat = torch.cat([totals.get(name, nothing[name]).flatten() for name in shapes])
    parts = collectives.sum_(flat, name="evaluation").cpu().split([value.numel() for value in nothing.values()])
    sums = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    summary = task.summarize({name: part if part.ndim else part.item() for name, part in sums.items()})
    gathered = [row for part in collectives.gather_objects(predictions) for row in part]
    return summary, sorted(gathered, key=lambda row: row.sample_id)


def _everywhere(collectives: Collectives, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Every rank's shapes on every rank: a rank without a sample does not know what the sums are."""
    return collectives.broadcast_object(collectives.gather_objects(shapes))
