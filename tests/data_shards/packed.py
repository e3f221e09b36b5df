"""Packed splits for tests, written with `tarfile` and the manifest's writer only."""

import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_shards.errors import DataError
from data_shards.forms.base import Form
from data_shards.manifest import Manifest, Shard, open_manifest, samples_dtype, write_manifest
from data_shards.probe import probe_frames, probe_video


def make_split(
    folder: Path,
    videos: Mapping[str, bytes],
    *,
    labels: Sequence[int] | None = None,
    samples_per_shard: int = 8,
    split: str = "train",
    form: Form = "video",
) -> Manifest:
    """Pack `videos` (key -> member content) into `folder`; labels count 0, 1, 2, 0, ... unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(videos)
    labels = [number % 3 for number in range(len(keys))] if labels is None else labels
    samples = np.zeros(len(keys), dtype=samples_dtype(max(len(key) for key in keys)))
    shards = []
    for first in range(0, len(keys), samples_per_shard):
        name = f"shard-{len(shards):06d}.tar"
        members = range(first, min(first + samples_per_shard, len(keys)))
        with tarfile.open(folder / name, "w") as tar:
            for sample_id in members:
                key, payload = keys[sample_id], videos[keys[sample_id]]
                _add(tar, key + (".mp4" if form == "video" else ".frames"), payload)
                assert tar.fileobj is not None
                padding = -len(payload) % 512
                samples[sample_id]["offset"] = tar.fileobj.tell() - padding - len(payload)
                samples[sample_id]["size"] = len(payload)
                samples[sample_id]["crc32"] = zlib.crc32(payload)
                samples[sample_id]["shard"] = len(shards)
                for field, value in _facts(payload, form).items():
                    samples[sample_id][field] = value
                samples[sample_id]["label"] = labels[sample_id]
                samples[sample_id]["key"] = key.encode()
                _add(tar, f"{key}.cls", str(labels[sample_id]).encode())
                _add(tar, f"{key}.json", json.dumps({"key": key}).encode())
        size = (folder / name).stat().st_size
        shards.append(Shard(name=name, num_samples=len(members), num_bytes=size, first_sample=first))
    classes = [f"class{label}" for label in range(max(labels) + 1)]
    write_manifest(folder, split=split, classes=classes, shards=shards, samples=samples, form=form)
    return open_manifest(folder)


def _facts(payload: bytes, form: Form) -> dict[str, float]:
    """What the manifest says of a sample; 1 x 1 for bytes that are no sample."""
    try:
        info = probe_video(payload) if form == "video" else probe_frames(payload)
    except DataError:
        return {"width": 1, "height": 1}
    return {"width": info.width, "height": info.height, "num_frames": info.num_frames, "fps": info.fps}


def damage(manifest: Manifest, sample_id: int) -> None:
    """Flip the bytes in the middle of a sample's video, in its tar."""
    row = manifest.samples[sample_id]
    with manifest.shard_path(sample_id).open("r+b") as tar:
        tar.seek(int(row["offset"]) + int(row["size"]) // 2)
        tar.write(b"\xff\x00damaged\xff\x00")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
