"""What a packed set holds: classes, sizes, durations, and a few samples to look at.

    facts = inspect_set(Path("packed"))
    frames = sample_frames(facts.splits[0].manifest, sample_id=0)

The facts come from the manifests alone, so a terabyte takes as long as a megabyte; only pictures read shards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.errors import DataError
from data_shards.forms.opening import open_frames
from data_shards.manifest import Manifest
from data_shards.reading import ShardReader
from data_shards.sampling import segment_frames
from data_shards.verify import open_splits

__all__ = ["Histogram", "SetFacts", "SplitFacts", "inspect_set", "pick_samples", "sample_frames"]

_SPLIT_ORDER = ("train", "val", "test")
_NUM_BINS = 12
_OUTLIERS = 0.005  # share of samples at either end that lie outside the bins where the tails are long
_LONG_TAIL = 4.0  # all values spread so many times as far as those without the outliers


@dataclass(frozen=True, kw_only=True, eq=False)
class Histogram:
    """How a quantity is spread over samples."""

    name: str
    """What is counted."""
    unit: str
    """Its unit."""
    edges: np.ndarray
    """Round borders of the bins, float64 (B + 1,); what lies outside is counted in the first or last bin."""
    counts: np.ndarray
    """Samples in each bin, int64 (B,)."""
    least: float
    """Smallest value."""
    median: float
    """Middle value."""
    most: float
    """Largest value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitFacts:
    """One split."""

    manifest: Manifest
    """The split, opened."""
    class_counts: np.ndarray
    """Samples of each class, int64 (C,)."""
    num_bytes: int
    """Bytes of its tars."""
    seconds: float
    """Duration of all samples whose frame rate is known."""


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """A packed set."""

    root: Path
    """Its folder."""
    classes: tuple[str, ...]
    """Class names."""
    splits: tuple[SplitFacts, ...]
    """Train, val and test first."""
    sizes: tuple[tuple[str, int], ...]
    """Picture sizes ("340x256") with their number of samples, the most frequent first."""
    histograms: tuple[Histogram, ...]
    """Durations, lengths in frames, frame rates and bytes, over all splits."""
    notes: tuple[str, ...]
    """What a person should look at, one line each."""


def inspect_set(root: Path) -> SetFacts:
    """The facts of a packed set, or of one split of it.

    Raises DataError where it cannot be opened; `reelscale verify` says all that is wrong with it.
    """
    manifests, problems = open_splits(root)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}; `reelscale verify {root}` lists what is wrong")
    manifests.sort(key=lambda manifest: (_place(manifest.split), manifest.split))
    splits = tuple(_split_facts(manifest) for manifest in manifests)
    rows = [manifest.samples for manifest in manifests]
    sizes = Counter[tuple[int, int]]()
    for samples in rows:
        pairs, counts = np.unique(np.stack([samples["width"], samples["height"]]), axis=1, return_counts=True)
        sizes.update({(int(w), int(h)): int(count) for (w, h), count in zip(pairs.T, counts, strict=True)})
    return SetFacts(
        root=root,
        classes=manifests[0].classes,
        splits=splits,
        sizes=tuple((f"{width}x{height}", count) for (width, height), count in sizes.most_common()),
        histograms=tuple(_histograms(rows)),
        notes=tuple(_notes(splits)),
    )


def pick_samples(manifest: Manifest, limit: int) -> list[int]:
    """Up to `limit` sample ids, one of each class in turn, spread over the split."""
    labels = np.asarray(manifest.samples["label"])
    by_class = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)[:limit]}
    turns = -(-limit // max(len(by_class), 1))
    picked = []
    for turn in range(turns):
        for ids in by_class.values():
            if turn < len(ids):
                picked.append(int(ids[turn * len(ids) // min(turns, len(ids))]))
    return picked[:limit]


def sample_frames(manifest: Manifest, sample_id: int, num_frames: int = 8) -> np.ndarray:
    """Up to `num_frames` evenly spaced frames of a sample: RGB uint8 (T, H, W, 3), as stored and upright.

    Raises DataError where the sample is damaged, OSError where the machine cannot read it.
    """
    with ShardReader(manifest) as reader:
        source = open_frames(manifest.form, reader.open(sample_id))
        return source.decode(segment_frames(source.num_frames, min(num_frames, source.num_frames))).frames


def _place(split: str) -> int:
    return _SPLIT_ORDER.index(split) if split in _SPLIT_ORDER else len(_SPLIT_ORDER)


def _split_facts(manifest: Manifest) -> SplitFacts:
    return SplitFacts(
        manifest=manifest,
        class_counts=np.bincount(manifest.samples["label"], minlength=len(manifest.classes)),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        seconds=float(_seconds(manifest.samples).sum()),
    )


def _seconds(samples: np.ndarray) -> np.ndarray:
    """Duration of each sample with a frame rate."""
    known = samples[samples["fps"] > 0]
    return known["num_frames"] / known["fps"].astype(np.float64)


def _histograms(rows: list[np.ndarray]) -> list[Histogram]:
    quantities = [
        ("duration", "s", np.concatenate([_seconds(samples) for samples in rows])),
        ("length", "frames", np.concatenate([samples["num_frames"] for samples in rows]).astype(np.float64)),
        ("frame rate", "fps", np.concatenate([samples["fps"] for samples in rows]).astype(np.float64)),
        ("stored size", "kB", np.concatenate([samples["size"] for samples in rows]) / 1e3),
    ]
    return [histogram(values, name=name, unit=unit) for name, unit, values in quantities if values.size]


def histogram(values: np.ndarray, *, name: str, unit: str) -> Histogram:
    """The spread of one or more values over about a dozen bins with round borders, or one bin where all are equal."""
    low, high = float(values.min()), float(values.max())
    inner = np.quantile(values, [_OUTLIERS, 1 - _OUTLIERS])
    if high - low > _LONG_TAIL * (inner[1] - inner[0]) > 0:
        low, high = inner
    if high - low < 1e-6 * max(abs(high), 1.0):
        edges = np.array([low, high])
        counts = np.array([len(values)])
    else:
        rough = (high - low) / _NUM_BINS
        power = 10.0 ** np.floor(np.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        if (values == np.round(values)).all():
            step = max(step, 1.0)
        edges = np.arange(np.floor(low / step + 1e-9), np.floor(high / step + 1e-9) + 2) * step
        places = np.clip(np.floor((values - edges[0]) / step + 1e-9), 0, len(edges) - 2).astype(np.int64)
        counts = np.bincount(places, minlength=len(edges) - 1)
    return Histogram(
        name=name,
        unit=unit,
        edges=edges,
        counts=counts,
        least=float(values.min()),
        median=float(np.median(values)),
        most=float(values.max()),
    )


def _notes(splits: tuple[SplitFacts, ...]) -> list[str]:
    """Lines about classes without samples, unknown frame rates, and equal files."""
    notes = []
    for split in splits:
        absent = np.flatnonzero(split.class_counts == 0)
        if len(absent):
            names = ", ".join(repr(split.manifest.classes[label]) for label in absent[:5])
            more = " ..." if len(absent) > 5 else ""
            notes.append(
                f"{len(absent)} of {len(split.class_counts)} classes have no sample in {split.manifest.split}: "
                f"{names}{more}"
            )
        unknown = int((split.manifest.samples["fps"] <= 0).sum())
        if unknown and split.manifest.samples["num_frames"].max() > 1:
            notes.append(f"{unknown} of {len(split.manifest)} samples of {split.manifest.split} state no frame rate")
    contents = [_contents(split.manifest) for split in splits]
    for number, split in enumerate(splits):
        twice = len(contents[number]) - len(np.unique(contents[number]))
        if twice:
            notes.append(f"{twice} samples of {split.manifest.split} are there a second time (the same bytes)")
        for other in range(number):
            shared = len(np.intersect1d(contents[number], contents[other]))
            if shared:
                notes.append(
                    f"{shared} samples are in {splits[other].manifest.split} and in {split.manifest.split} "
                    "(the same bytes): what is measured on one is learnt from the other"
                )
    return notes


def _contents(manifest: Manifest) -> np.ndarray:
    """A number for the bytes of each sample, uint64 (N,): equal files have equal ones."""
    return manifest.samples["size"].astype(np.uint64) << np.uint64(32) ^ manifest.samples["crc32"].astype(np.uint64)
