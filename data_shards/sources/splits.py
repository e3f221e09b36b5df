"""Splits: the names that sources give them, and a split by hash for sources that have none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

from data_shards.errors import PackError
from data_shards.sources.base import SourceSample

SPLITS = ("train", "val", "test")
"""The splits, in the order in which they are packed."""

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What sources call them, in lower case."""


def assign_splits(
    samples: Sequence[SourceSample], *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[SourceSample, ...]:
    """Give each sample a split by a hash of its name and `seed`: the same whatever the order and the machine.

    Class by class, so that each class has its share in every split; in all, ceil(n * fraction) samples. It does
    not know which samples belong together (one recording cut in pieces): name the splits in a CSV then.
    """
    if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise PackError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be 0 or more, and below 1 together"
        )
    by_class: dict[str, list[SourceSample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    split_of: dict[str, str] = {}
    seen = num_test = num_val = 0
    for label in sorted(by_class):
        ranked = sorted(by_class[label], key=lambda sample: _hash(sample.name, seed))
        seen += len(ranked)
        spare = len(ranked) - 1  # each class keeps a sample to train on
        test = min(math.ceil(seen * test_fraction - 1e-9) - num_test, spare)
        val = min(math.ceil(seen * val_fraction - 1e-9) - num_val, spare - test)
        num_test, num_val = num_test + test, num_val + val
        names = ["test"] * test + ["val"] * val + ["train"] * (len(ranked) - test - val)
        split_of.update((sample.name, split) for sample, split in zip(ranked, names, strict=True))
    return tuple(replace(sample, split=split_of[sample.name]) for sample in samples)


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest()
