"""The header of a packed split, `manifest.json`: what it must hold, whether it was read from a folder or a URL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from data_shards.errors import ManifestError
from data_shards.forms.base import Form

FORMAT = "reelscale-manifest"
VERSION = 1
MANIFEST_NAME = "manifest.json"
PACK_AGAIN = "pack the set again with `reelscale pack`"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a split."""

    name: str
    """File name in the split's folder."""
    num_samples: int
    """Samples in the tar."""
    num_bytes: int
    """Size of the tar in bytes."""
    first_sample: int
    """Sample id of its first sample; a shard's samples are consecutive."""


def check_header(content: bytes, path: Path | str) -> dict[str, Any]:
    """What a `manifest.json` says; raises ManifestError naming its `path` where it is damaged or none of ours."""
    try:
        header = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ManifestError(f"{path} is damaged ({error}); {PACK_AGAIN}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ManifestError(f'{path} is not a manifest of reelscale (no "format": "{FORMAT}"); {PACK_AGAIN}')
    if header.get("version") != VERSION:
        raise ManifestError(
            f"{path} has version {header.get('version')!r}, this reelscale reads version {VERSION}; "
            f"update reelscale, or {PACK_AGAIN}"
        )
    kinds = {"split": str, "classes": list, "num_samples": int, "shards": list, "samples_crc32": int}
    for name, kind in kinds.items():
        value = header.get(name)
        if not isinstance(value, kind):
            raise ManifestError(f'{path} is damaged ("{name}" is {value!r:.60}, not {kind.__name__}); {PACK_AGAIN}')
    if not all(isinstance(name, str) for name in header["classes"]):
        raise ManifestError(f'{path} is damaged ("classes" holds what is not a string); {PACK_AGAIN}')
    header.setdefault("form", "video")  # manifests from before there were others
    if header["form"] not in get_args(Form):
        raise ManifestError(
            f"{path} names the form {header['form']!r:.60}, this reelscale reads {', '.join(get_args(Form))}; "
            f"update reelscale, or {PACK_AGAIN}"
        )
    return header


def shards_of(header: dict[str, Any], path: Path | str) -> tuple[Shard, ...]:
    """The shards that a header names; raises ManifestError naming its `path` where they do not add up."""
    shards = []
    for index, fields in enumerate(header["shards"]):
        try:
            shard = Shard(**fields)
        except TypeError as error:
            raise ManifestError(f"{path} is damaged (shard {index}: {error}); {PACK_AGAIN}") from None
        numbers = (shard.num_samples, shard.num_bytes, shard.first_sample)
        if not isinstance(shard.name, str) or not all(
            type(number) is int and 0 <= number < 2**63 for number in numbers
        ):
            raise ManifestError(f"{path} is damaged (shard {index} is {fields!r:.120}); {PACK_AGAIN}")
        shards.append(shard)
    total = sum(shard.num_samples for shard in shards)
    if total != header["num_samples"] or [shard.first_sample for shard in shards] != first_samples(shards):
        raise ManifestError(
            f"{path} is damaged (its {len(shards)} shards count {total} samples, "
            f'"num_samples" is {header["num_samples"]}); {PACK_AGAIN}'
        )
    return tuple(shards)


def first_samples(shards: Sequence[Shard]) -> list[int]:
    """Sample id of the first sample of each shard."""
    counts = [0, *(shard.num_samples for shard in shards)]
    return np.cumsum(counts)[:-1].tolist()
