"""The manifest of a packed split: which samples there are, and where each one's bytes lie in the shards.

A packed split is a folder of plain WebDataset tars (`shard-000000.tar`, ...) with two files beside them:
`manifest.json` (format, classes, shards) and `samples.npy`, one row per sample, opened memory-mapped, so that
a sample is read with one `pread` and a set of 10^9 samples costs no memory. The writer makes `samples.npy`
durable first and `manifest.json` last: a folder with a `manifest.json` is whole.

    manifest = open_manifest("packed/train")
    row = manifest.samples[5]
    with open(manifest.shard_path(5), "rb") as shard:
        payload = os.pread(shard.fileno(), int(row["size"]), int(row["offset"]))
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.durable import write_atomically
from data_shards.errors import DataError, ManifestError
from data_shards.forms.base import Form
from data_shards.manifest_header import (
    FORMAT,
    MANIFEST_NAME,
    PACK_AGAIN,
    VERSION,
    Shard,
    check_header,
    first_samples,
    shards_of,
)
from data_shards.storage.base import StorageConfig
from data_shards.storage.urls import is_url

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "SAMPLES_NAME",
    "VERSION",
    "DataError",
    "Manifest",
    "ManifestError",
    "Shard",
    "open_manifest",
    "samples_dtype",
    "write_manifest",
]

SAMPLES_NAME = "samples.npy"


def samples_dtype(key_bytes: int) -> np.dtype[np.void]:
    """Row type of `samples.npy` for keys of at most `key_bytes` bytes; little-endian, no padding."""
    return np.dtype(
        [
            ("shard", "<u4"),  # index into Manifest.shards
            ("offset", "<u8"),  # bytes, of the video's payload in the tar
            ("size", "<u8"),  # bytes of the payload
            ("crc32", "<u4"),  # zlib.crc32 of the payload
            ("label", "<i4"),  # index into Manifest.classes
            ("num_frames", "<u4"),
            ("width", "<u2"),  # pixels, as decoded and upright
            ("height", "<u2"),
            ("fps", "<f4"),  # average frames per second
            ("key", f"S{max(1, key_bytes)}"),
        ]
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A packed split, opened: sample ids are 0 ... len(manifest) - 1.

    Pickling carries the folder only; the other process maps `samples.npy` itself.
    """

    root: Path
    """Folder of the split; of a remote one, the folder on this node with the copy of its manifest."""
    split: str
    """Name of the split: "train", "val", "test"."""
    classes: tuple[str, ...]
    """Class names verbatim, sorted; the same in every split of a set. A label indexes them."""
    shards: tuple[Shard, ...]
    """The tars, in order of their first sample."""
    samples: np.ndarray[Any, np.dtype[np.void]]
    """Rows of `samples_dtype`, memory-mapped and read-only."""
    form: Form = "video"
    """How the samples are stored."""
    url: str | None = None
    """Where the shards of a remote split are ("s3://bucket/set/train"); None where they are in `root`."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How the shards are read."""

    @property
    def location(self) -> str:
        """Folder or URL of the shards."""
        return self.url or str(self.root)

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.root, self.url, self.storage)

    def key(self, sample_id: int) -> str:
        """Key of a sample: the name of its tar members before the first dot."""
        return bytes(self.samples["key"][sample_id]).decode()

    def class_name(self, label: int) -> str:
        """Class name of a label."""
        if not 0 <= label < len(self.classes):
            raise ValueError(f"no class with label {label} in {self.root}: labels are 0 to {len(self.classes) - 1}")
        return self.classes[label]

    def shard_path(self, sample_id: int) -> Path:
        """Path of the tar that holds a sample; ValueError for a remote split, whose tars have none."""
        if self.url is not None:
            raise ValueError(f"{self.url} is remote, its shards have no path: read them with `ShardReader`")
        return self.root / self.shards[self.samples["shard"][sample_id]].name

    def describe(self, sample_id: int) -> str:
        """ "shard-000003.tar:KEY", for messages about a sample."""
        return f"{self.shards[self.samples['shard'][sample_id]].name}:{self.key(sample_id)}"


def open_manifest(
    folder: str | os.PathLike[str], *, check_shards: bool = True, storage: StorageConfig | None = None
) -> Manifest:
    """Open the packed split in `folder`, or at a URL ("s3://bucket/set/train") that `storage` says how to read.

    A remote split's manifest is copied to this node once, by one of its processes (`data_shards.remote_manifest`).
    With `check_shards` the checksum of `samples.npy` and the presence and size of each tar are checked too
    (no tar is read); turn it off in the worker processes of a process that has checked.

    Raises:
        ManifestError: one line, if the folder is absent, is no packed split, or is damaged, or if a shard is
            missing or its size is not the manifest's.
        OSError: the network does not give a remote manifest, after retries.
    """
    storage = storage or StorageConfig()
    if is_url(folder):
        from data_shards.remote_manifest import open_remote  # it opens its copy with what is in this module

        return open_remote(os.fspath(folder), storage, check_shards=check_shards)
    root = Path(folder)
    header = _read_header(root)
    shards = shards_of(header, root / MANIFEST_NAME)
    samples = _map_samples(root, header)
    if check_shards:
        check_samples(root, header, shards, samples)
        _check_shard_files(root, shards)
    return Manifest(
        root=root,
        split=header["split"],
        classes=tuple(header["classes"]),
        shards=shards,
        samples=samples,
        form=header["form"],
        storage=storage,
    )


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    split: str,
    classes: Sequence[str],
    shards: Sequence[Shard],
    samples: np.ndarray[Any, np.dtype[np.void]],
    form: Form = "video",
) -> None:
    """Write `samples.npy` and then `manifest.json` into `folder`, each aside, fsynced and renamed.

    `samples` has the fields of `samples_dtype`, in the order of the shards; the tars themselves must be
    durable already.
    """
    root = Path(folder)
    assert len(samples) > 0, "a split without samples is not written"
    assert samples.dtype == samples_dtype(samples.dtype["key"].itemsize), samples.dtype
    assert [shard.first_sample for shard in shards] == first_samples(shards), shards
    assert sum(shard.num_samples for shard in shards) == len(samples), (shards, len(samples))
    assert samples["label"].min() >= 0, samples["label"].min()
    assert samples["label"].max() < len(classes), (samples["label"].max(), classes)
    partial = root / (SAMPLES_NAME + ".partial")
    with partial.open("wb") as file:
        np.save(file, samples, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(root / SAMPLES_NAME)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "form": form,
        "classes": list(classes),
        "num_samples": len(samples),
        "shards": [asdict(shard) for shard in shards],
        "samples_crc32": crc32_of_file(root / SAMPLES_NAME),
        "created_by": _created_by(),
    }
    write_atomically(root / MANIFEST_NAME, (json.dumps(header, indent=1, ensure_ascii=False) + "\n").encode())


def _open_again(root: Path, url: str | None, storage: StorageConfig) -> Manifest:
    return replace(open_manifest(root, check_shards=False, storage=storage), url=url)


def _created_by() -> str:
    try:
        return f"reelscale {version('reelscale')}"
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "reelscale"


def _read_header(root: Path) -> dict[str, Any]:
    path = root / MANIFEST_NAME
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ManifestError(f"{root} {what}; give the folder of a packed split, such as DST/train")
    if not path.is_file():
        splits = sorted(found.parent.name for found in root.glob(f"*/{MANIFEST_NAME}"))
        hint = f"it holds the splits {', '.join(splits)}: give one of them" if splits else PACK_AGAIN
        raise ManifestError(f"{root} is not a packed split (it has no {MANIFEST_NAME}); {hint}")
    return check_header(path.read_bytes(), path)


def _map_samples(root: Path, header: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.void]]:
    path = root / SAMPLES_NAME
    if not path.is_file():
        raise ManifestError(f"{path} is missing; {PACK_AGAIN}")
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ManifestError(f"{path} is damaged or cut ({reason}); {PACK_AGAIN}") from None
    fields: Any = mapped.dtype.fields or {}
    key_type = fields["key"][0] if "key" in fields else None
    if mapped.ndim != 1 or key_type is None or mapped.dtype != samples_dtype(key_type.itemsize):
        raise ManifestError(f"{path} does not hold the fields of a manifest ({mapped.dtype}); {PACK_AGAIN}")
    if len(mapped) != header["num_samples"]:
        raise ManifestError(
            f"{path} holds {len(mapped)} samples, {MANIFEST_NAME} says {header['num_samples']}; {PACK_AGAIN}"
        )
    return mapped.view(np.ndarray)  # still mapped and read-only; rows are cheaper to take than a memmap's


def check_samples(
    root: Path, header: dict[str, Any], shards: tuple[Shard, ...], samples: np.ndarray[Any, np.dtype[np.void]]
) -> None:
    """Raise ManifestError where the rows in `root` are not those that the header was written with."""
    path = root / SAMPLES_NAME
    found = crc32_of_file(path)
    if found != header["samples_crc32"]:
        raise ManifestError(
            f"{path} does not belong to its {MANIFEST_NAME}, or is damaged "
            f"(crc32 {found}, expected {header['samples_crc32']}); {PACK_AGAIN}"
        )
    for number, shard in enumerate(shards):  # one at a time: a large set's columns would take gigabytes
        rows = samples[shard.first_sample : shard.first_sample + shard.num_samples]
        bad = (rows["label"] < 0) | (rows["label"] >= len(header["classes"])) | (rows["shard"] != number)
        if (bad | (rows["offset"] + rows["size"] > shard.num_bytes)).any():
            raise ManifestError(
                f"{path} names a label, a shard or an offset that {MANIFEST_NAME} does not have; {PACK_AGAIN}"
            )


def _check_shard_files(root: Path, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        path = root / shard.name
        try:
            num_bytes = path.stat().st_size
        except FileNotFoundError:
            raise ManifestError(f"{path} is missing, {MANIFEST_NAME} names it; {PACK_AGAIN}") from None
        if num_bytes != shard.num_bytes:
            raise ManifestError(
                f"{path} has {num_bytes} bytes, {MANIFEST_NAME} says {shard.num_bytes}: "
                f"the tar was cut or replaced; copy it again, or {PACK_AGAIN}"
            )


def crc32_of_file(path: Path) -> int:
    """zlib.crc32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
