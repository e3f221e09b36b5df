"""Decides, before anything is written, which samples each shard holds.

A shard is then a job of its own: any process can write it, in any order, and write it again with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_shards.errors import DataError
from data_shards.forms.encoding import EncodingConfig, encode_sample
from data_shards.shard_writer import sample_keys, stored_bytes
from data_shards.sources import Source, SourceSample
from data_shards.sources.splits import SPLITS

MIN_SHARDS, MIN_SHARD_SAMPLES = 16, 32
"""A split has so many shards where each of them holds so many samples: work for as many processes, and for as many
readers that share out a set by shards."""

_MEASURED_SAMPLES = 4
_FACTS_BYTES = 256  # of the JSON member, beside the names


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSample:
    """A sample with its place in the labels and its name in the tar."""

    sample: SourceSample
    key: str
    label: int


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """One shard: what it will hold, in order."""

    split: str
    number: int
    """Counts from 0 in its split; the tar is shard-NUMBER.tar."""
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a set."""

    samples: tuple[PlannedSample, ...]
    """Split by split, in the order of the shards."""
    shard_sizes: dict[str, list[int]]
    """By split, in the order of `samples`: how many samples each shard takes."""

    @property
    def num_shards(self) -> int:
        """Of all splits."""
        return sum(map(len, self.shard_sizes.values()))

    def shards(self) -> Iterator[PlannedShard]:
        """The shards in order."""
        start = 0
        for split, sizes in self.shard_sizes.items():
            for number, size in enumerate(sizes):
                yield PlannedShard(split=split, number=number, samples=self.samples[start : start + size])
                start += size
        assert start == len(self.samples), (start, len(self.samples))


def arrange(source: Source, seed: int) -> tuple[PlannedSample, ...]:
    """The samples split by split, each split in an order drawn from the seed, with their keys and labels."""
    labels = {name: label for label, name in enumerate(source.classes)}
    ordered: list[SourceSample] = []
    for number, split in enumerate(SPLITS):
        members = [sample for sample in source.samples if sample.split == split]
        order = np.random.default_rng([seed, number]).permutation(len(members))
        ordered += [members[place] for place in order]
    assert len(ordered) == len(source.samples), "a source gave a split of another name"
    keys = sample_keys([sample.name for sample in ordered])
    return tuple(
        PlannedSample(sample=sample, key=key, label=labels[sample.label])
        for sample, key in zip(ordered, keys, strict=True)
    )


def digest(samples: Sequence[PlannedSample], classes: Sequence[str]) -> str:
    """A checksum of the list of samples: names, labels, splits and their order."""
    found = hashlib.sha256("\n".join(classes).encode(errors="surrogateescape"))
    for planned in samples:
        line = f"\n{planned.sample.name}\0{planned.label}\0{planned.sample.split}"
        found.update(line.encode(errors="surrogateescape"))
    return found.hexdigest()


def plan_shards(
    samples: tuple[PlannedSample, ...], encoding: EncodingConfig, *, max_shard_bytes: int, max_shard_samples: int
) -> Plan:
    """Cut the samples into shards.

    A shard is closed before it grows beyond `max_shard_bytes`, a larger sample has one of its own. Where samples are
    encoded anew their sizes are not known yet: they are estimated from a few that are encoded now.
    """
    growth = 1.0 if encoding.is_untouched else _measure_growth(samples, encoding)
    shard_sizes: dict[str, list[int]] = {}
    for split in SPLITS:
        members = [planned for planned in samples if planned.sample.split == split]
        most = min(max_shard_samples, max(MIN_SHARD_SAMPLES, -(-len(members) // MIN_SHARDS)))
        sizes: list[int] = []
        filled = 0
        for planned in members:
            num_bytes = _estimate(planned, growth)
            if not sizes or sizes[-1] >= most or filled + num_bytes > max_shard_bytes:
                sizes.append(0)
                filled = 0
            sizes[-1] += 1
            filled += num_bytes
        if sizes:
            shard_sizes[split] = sizes
    return Plan(samples=samples, shard_sizes=shard_sizes)


def _estimate(planned: PlannedSample, growth: float) -> int:
    """Bytes of a sample in its tar; at most a little too many where it is stored as it is."""
    sample = planned.sample
    names = len(json.dumps([sample.name, sample.label]))
    more = sample.content.num_meta_bytes
    return stored_bytes(round(sample.weight * growth)) + stored_bytes(1) + stored_bytes(names + more + _FACTS_BYTES)


def _measure_growth(samples: Sequence[PlannedSample], encoding: EncodingConfig) -> float:
    """Bytes stored for each unit of weight, from a few samples; 1 where none of them can be read."""
    weight = num_bytes = 0
    for place in np.linspace(0, len(samples) - 1, min(_MEASURED_SAMPLES, len(samples))).round().astype(int):
        sample = samples[place].sample
        try:
            encoded = encode_sample(sample.content.read(), encoding, suffix=sample.content.suffix)
        except (DataError, OSError):
            continue  # packing says why
        weight += sample.weight
        num_bytes += len(encoded.payload)
    return num_bytes / weight if weight else 1.0
