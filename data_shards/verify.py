"""Is a packed set whole: its manifests, its tars, the checksum of every sample, and whether samples decode.

    result = verify(VerifyConfig(root=Path("packed")), found=print)
    assert not result.num_problems

Every byte that training reads is read once. Problems are lines that begin with a path (and a key); the work goes on
behind each. Sets on a mounted file system only: a bucket's shards are copied, or verified where they were packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_shards.errors import DataError, ManifestError
from data_shards.forms.opening import open_frames
from data_shards.manifest import MANIFEST_NAME, Manifest, open_manifest
from data_shards.parallel import ordered_map
from data_shards.reading import Payload, ShardReader, describe_sample
from data_shards.tar_check import check_tar

__all__ = ["Decode", "VerifyConfig", "VerifyResult", "open_splits", "verify"]

Decode = Literal["all", "sample", "none"]
"""All frames of all samples; the first, middle and last frame of one sample in sixteen; nothing."""

VerifyProgress = Callable[[int, int, int], None]
"""Called as progress(samples done, samples in all, bytes read)."""

_SAMPLES_A_TASK = 16
_ONE_IN = 16  # samples that "sample" decodes; each task's first
_MAX_DECODED_BYTES = 1 << 28  # of frames held at a time


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to verify, and how thoroughly."""

    root: Path
    """A packed set (a folder of splits), or one split."""
    decode: Decode = "sample"
    """Decode "all" frames of all samples, the first, middle and last of one "sample" in sixteen, or "none"."""
    workers: int = 0
    """Processes that read and decode; 0 takes one for each usable processor."""

    def __post_init__(self) -> None:
        if self.decode not in ("all", "sample", "none") or self.workers < 0:
            raise ValueError(
                f"decode is {self.decode!r} and workers {self.workers}: give all, sample or none, and 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was looked at, and how many problems were found."""

    splits: tuple[str, ...]
    """Names of the splits that could be opened."""
    num_shards: int
    """Tars of them."""
    num_samples: int
    """Samples of them."""
    num_bytes: int
    """Bytes of payload that were read and agree with their checksums or were reported."""
    num_decoded: int
    """Samples of which frames were decoded."""
    num_problems: int
    """Lines given to `found`."""


class _Task(NamedTuple):
    """The structure of a shard (`num_samples` is 0), or the payloads of `num_samples` samples from `first` on."""

    manifest: Manifest
    first: int
    num_samples: int
    decode: Decode


class _Done(NamedTuple):
    problems: list[str]
    num_samples: int
    num_bytes: int
    num_decoded: int


def verify(
    config: VerifyConfig, *, found: Callable[[str], None], progress: VerifyProgress | None = None
) -> VerifyResult:
    """Look at everything, and call `found` with each problem, one line each.

    Raises:
        DataError: `config.root` holds no packed split at all.
        RuntimeError: a worker process died.
    """
    problems = 0

    def report(lines: Sequence[str]) -> None:
        nonlocal problems
        problems += len(lines)
        for line in lines:
            found(" ".join(line.split()))

    manifests, wrong = open_splits(config.root)
    report(wrong)
    tasks = [
        task
        for manifest in manifests
        for shard in range(len(manifest.shards))
        for task in _tasks_of_shard(manifest, shard, config.decode)
    ]
    total = sum(map(len, manifests))
    num_samples = num_bytes = num_decoded = 0
    with closing(ordered_map(_run, tasks, workers=config.workers)) as outcomes:
        for done in outcomes:
            report(done.problems)
            num_samples += done.num_samples
            num_bytes += done.num_bytes
            num_decoded += done.num_decoded
            if progress is not None:
                progress(num_samples, total, num_bytes)
    return VerifyResult(
        splits=tuple(manifest.split for manifest in manifests),
        num_shards=sum(len(manifest.shards) for manifest in manifests),
        num_samples=total,
        num_bytes=num_bytes,
        num_decoded=num_decoded,
        num_problems=problems,
    )


def open_splits(root: Path) -> tuple[list[Manifest], list[str]]:
    """The manifests of a set, or of one split, that can be opened, and what is wrong with them and the others.

    Raises DataError where there is no split.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a packed set, as `reelscale pack SRC DST` writes it")
    folders = [root]
    if not (root / MANIFEST_NAME).is_file():
        folders = sorted(
            path for path in root.iterdir() if path.is_dir() and (_has_manifest(path) or any(path.glob("shard-*.tar")))
        )
    if not any(map(_has_manifest, folders)):
        raise DataError(
            f"{root} holds no packed split: there is no {MANIFEST_NAME} in it or in a folder of it; if packing was "
            "interrupted, run the same `reelscale pack` again"
        )
    manifests: list[Manifest] = []
    problems: list[str] = []
    for folder in folders:
        try:
            manifest = open_manifest(folder, check_shards=False)
        except (ManifestError, OSError) as error:
            problems.append(str(error))
            continue
        wrong = _wrong_samples(manifest)
        problems += wrong or _strange_tars(manifest)
        if not wrong:  # with offsets that are not to be trusted, all shards would look damaged
            manifests.append(manifest)
    for manifest in manifests[1:]:
        if manifest.classes != manifests[0].classes:
            problems.append(f"{manifest.root}: its classes are not those of {manifests[0].root}; pack the set again")
    return manifests, problems


def _has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _wrong_samples(manifest: Manifest) -> list[str]:
    """What `open_manifest` finds in the files of a split, except in its shards, which are walked later."""
    shards = tuple(str(Path(manifest.root) / shard.name) for shard in manifest.shards)
    try:
        open_manifest(manifest.root)
    except (ManifestError, OSError) as error:
        if not str(error).startswith(shards):
            return [str(error)]
    return []


def _strange_tars(manifest: Manifest) -> list[str]:
    known = {shard.name for shard in manifest.shards}
    return [
        f"{path}: {MANIFEST_NAME} does not name it, no loader reads it; remove it, or pack the set again"
        for path in sorted(Path(manifest.root).glob("*.tar"))
        if path.name not in known
    ]


def _tasks_of_shard(manifest: Manifest, index: int, decode: Decode) -> Iterator[_Task]:
    """A shard's structure first, then its samples; a shard that is not there has no samples to read."""
    yield _Task(manifest, index, 0, decode)
    shard = manifest.shards[index]
    if (Path(manifest.root) / shard.name).is_file():
        stop = shard.first_sample + shard.num_samples
        for first in range(shard.first_sample, stop, _SAMPLES_A_TASK):
            yield _Task(manifest, first, min(_SAMPLES_A_TASK, stop - first), decode)


def _run(task: _Task) -> _Done:
    if task.num_samples == 0:
        return _Done(list(check_tar(task.manifest, task.first)), 0, 0, 0)
    problems: list[str] = []
    num_bytes = num_decoded = 0
    with ShardReader(task.manifest) as reader:
        for place in range(task.num_samples):
            sample_id = task.first + place
            wanted = task.decode == "all" or (task.decode == "sample" and place % _ONE_IN == 0)
            payload = reader.open(sample_id)
            try:
                num_bytes += len(payload.whole())
                if wanted:
                    num_decoded += 1
                    _decode(task.manifest, sample_id, payload, all_frames=task.decode == "all")
            except DataError as error:
                where = describe_sample(task.manifest, sample_id)
                problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
            except OSError as error:
                problems.append(f"{describe_sample(task.manifest, sample_id)}: cannot be read: {error.strerror}")
    return _Done(problems, task.num_samples, num_bytes, num_decoded)


def _decode(manifest: Manifest, sample_id: int, payload: Payload, *, all_frames: bool) -> None:
    """Raises DataError where frames do not decode, or are not as the manifest describes them."""
    row = manifest.samples[sample_id]
    source = open_frames(manifest.form, payload)
    if source.num_frames != row["num_frames"]:
        raise DataError(f"it has {source.num_frames} frames, the manifest says {row['num_frames']}; pack the set again")
    last = source.num_frames - 1
    numbers = np.arange(source.num_frames) if all_frames else np.array([0, last // 2, last])
    size = (int(row["height"]), int(row["width"]))
    at_a_time = max(1, _MAX_DECODED_BYTES // (3 * size[0] * size[1]))
    for start in range(0, len(numbers), at_a_time):
        height, width = source.decode(numbers[start : start + at_a_time]).frames.shape[1:3]
        if (height, width) != size:
            raise DataError(
                f"its pictures are {width}x{height}, the manifest says {size[1]}x{size[0]}; pack the set again"
            )
