"""Writes one shard: aside, fsynced, renamed, and then its record, so that a kill loses this shard alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_shards.errors import FILE_ERRORS, DataError
from data_shards.forms.encoding import Encoded, EncodingConfig, encode_sample
from data_shards.forms.source_frames import MAX_SIDE
from data_shards.packing.planning import PlannedSample, PlannedShard
from data_shards.packing.records import Rejected, ShardRecord, stamp_of, write_record
from data_shards.shard_writer import MAX_PAYLOAD_BYTES, ShardWriter
from data_shards.sources.base import VideoContent

Report = Callable[[int], None]
"""Called after each sample with the bytes that it takes in the shard; 0 for one that was left out."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All that a process needs to write a shard."""

    shard: PlannedShard
    tar: Path
    record: Path
    encoding: EncodingConfig
    crashed: Mapping[int, str] = field(default_factory=dict)
    """Samples, by their place in the shard, that ended the process that encoded them, and how."""


def write_shard(job: ShardJob, report: Report) -> ShardRecord:
    """Write the tar and then its record; the same bytes whoever does it.

    Raises:
        OSError: the disk is full, or a disk or network does not give what is there. What was begun is removed.
    """
    rejected: list[Rejected] = []
    stamps: dict[str, tuple[int, int] | None] = {}
    with ShardWriter(job.tar) as writer:
        for place, planned in enumerate(job.shard.samples):
            try:
                if place in job.crashed:
                    raise DataError(job.crashed[place])
                encoded = _encode(planned, job.encoding)
                meta = _meta(planned, encoded)
            except FILE_ERRORS as error:
                reason = f"cannot be read: {error.strerror}"
            except DataError as error:
                reason = str(error)
            except OSError as error:
                error.filename = error.filename or planned.sample.content.where  # reads do not say of which file
                raise
            except MemoryError:
                reason = "needs more memory than there is"
            else:
                writer.add(planned.key, encoded.suffix, encoded.payload, planned.label, encoded.info, meta)
                report(len(encoded.payload))
                continue
            rejected.append(_reject(planned, reason))
            # What ended a process may have been the machine's fault: another run tries it again.
            stamps[str(place)] = None if place in job.crashed else stamp_of(planned.sample.content.path)
            report(0)
        num_bytes = writer.finish()
    record = ShardRecord(
        name=job.tar.name,
        num_bytes=num_bytes,
        weights=[planned.sample.weight for planned in job.shard.samples],
        rows=writer.rows,
        rejected=rejected,
        stamps=stamps,
    )
    write_record(job.record, record)
    return record


def _encode(planned: PlannedSample, encoding: EncodingConfig) -> Encoded:
    content = planned.sample.content
    if isinstance(content, VideoContent) and planned.sample.weight > MAX_PAYLOAD_BYTES:
        raise DataError("too large: a member of a plain tar has at most 8 GiB")
    encoded = encode_sample(content.read(), encoding, suffix=content.suffix)
    if len(encoded.payload) > MAX_PAYLOAD_BYTES:
        raise DataError(f"too large as {encoding.store_as}: a member of a plain tar has at most 8 GiB")
    if max(encoded.info.width, encoded.info.height) > MAX_SIDE:
        raise DataError(f"too large: {encoded.info.width} x {encoded.info.height}, at most {MAX_SIDE} pixels a side")
    return encoded


def _meta(planned: PlannedSample, encoded: Encoded) -> dict[str, Any]:
    """What the JSON member says."""
    sample = planned.sample
    names = {"class": sample.label, "label": planned.label, "file": sample.name}
    return names | sample.content.more_meta() | encoded.meta | asdict(encoded.info)


def _reject(planned: PlannedSample, reason: str) -> Rejected:
    sample = planned.sample
    reason = " ".join(reason.split())
    return Rejected(file=sample.content.where, label=sample.label, split=sample.split, reason=reason)
