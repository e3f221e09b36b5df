"""Uneven inputs: ranks with different numbers of batches train together, nobody hangs and nobody is counted twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from dist_train.collectives import Collectives

Item = TypeVar("Item")


def join(batches: Iterable[Item], collectives: Collectives) -> Iterator[Item | None]:
    """This rank's batches, and None from its last one until every rank has had its last.

    A rank that has run out goes on with the step, with weight 0: it answers the others' collectives, makes the same
    updates and so stays equal to them, and the mean is over the clips that there are::

        for batch in join(loader, collectives):
            optimizer.zero_grad()
            with strategy.micro_batch(phase, synchronize=True, weight=0 if batch is None else len(batch)):
                if batch is not None:
                    strategy.backward(phase, mean_loss(batch))
            strategy.finish(phase)
            strategy.optimizer_step(phase)

    Works with the strategy `allreduce` and the reductions `average` and `sum`. Modules whose forward pass is a
    collective by itself (synchronised batch norm) cannot be left out by a rank: use local batch norm.

    Args:
        batches: of this rank; any number, none included.
        collectives: the ranks; one small collective a step says whether anybody goes on.
    """
    own = iter(batches)
    while True:
        batch = next(own, None)
        going_on = torch.tensor([batch is not None], dtype=torch.int32)  # on the host: no device is waited for
        if not collectives.sum_(going_on, name="ranks with a batch"):
            return
        yield batch
