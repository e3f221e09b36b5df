"""A sampler that shares out what is left of an epoch among however many ranks there are now."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import Sampler

from dist_train.horovod.mpi_ops import rank, size


class ElasticSampler(Sampler[int]):
    """Partitions a dataset over ranks; after a change of their number, partitions what was not yet processed.

    Keep it in a `TorchState`, call `record_batch` after each batch, and `set_epoch` at the END of each epoch. An epoch
    is one order of all indices, the same on every rank; rank r of n takes every n-th from the r-th on, so after k
    batches of b on each of n ranks exactly the first k*b*n are done. Where n does not divide what is left, the last
    round is filled up with indices from the start of it.

    Args:
        dataset: anything with a length, which must not change.
        shuffle: whether the order is random, another one each epoch.
        seed: the order's seed, the same on all ranks.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.epoch = 0
        self.processed_num = 0
        """Indices of this epoch's order that are done, over all ranks."""
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Starts epoch `epoch` with nothing processed."""
        self.epoch, self.processed_num = epoch, 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:  # noqa: ARG002
        """Says that this rank, and every other, has processed `batch_size` more indices."""
        self.processed_num += batch_size * self.num_replicas

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how much of it is done."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to where the state says, with the ranks of now."""
        self.epoch, self.processed_num = state_dict["epoch"], state_dict["processed_num"]
        self.reset()

    def reset(self) -> None:
        """Partitions what is left of the epoch over the ranks of now."""
        self.num_replicas, self.rank = size(), rank()
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(order)
        self.remaining_indices = order[self.processed_num :]
        self.num_samples = -(-len(self.remaining_indices) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        left = self.remaining_indices
        filled = left + (left * self.num_replicas)[: self.total_size - len(left)]
        return iter(filled[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        """How many indices this rank has yet to process."""
        return self.num_samples
