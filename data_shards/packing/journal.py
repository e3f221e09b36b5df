"""The folder that a set is packed in until it is whole, and what makes packing go on after a kill.

    DST.partial/plan.json                        settings, the checksum of the list of samples, samples of each shard
    DST.partial/packed/SPLIT/shard-000000.tar    whole, or named .partial while it is written
    DST.partial/records/SPLIT-000000.json        comes after its tar: a shard with a record is finished
    DST.partial/lock                             held by the run that packs

`packed` is renamed to DST at the end, and the rest removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_shards.durable import beside, fsync_folder, lock_folder, refuse_existing, write_atomically
from data_shards.packing.planning import PlannedShard
from data_shards.packing.records import ShardRecord, read_record, stamp_of

PLAN_NAME = "plan.json"
LOCK_NAME = "lock"
_FORMAT = "reelscale-pack-plan"


class Journal:
    """The state of a set that is being packed into `destination`; made by `open_journal`."""

    def __init__(self, destination: Path, folder: Path) -> None:
        self.destination, self.folder = destination, folder
        self.packed, self._records = folder / "packed", folder / "records"

    def earlier_plan(self, settings: Mapping[str, Any], digest: str) -> dict[str, list[int]] | None:
        """The shard sizes that an earlier run decided; None where this is the first.

        Raises:
            ValueError: the earlier run had other settings or another source.
        """
        path = self.folder / PLAN_NAME
        if not path.exists():
            return None
        plan = json.loads(path.read_bytes())
        changed = [
            f"{name} {plan['settings'].get(name)!r}, now {value!r}"
            for name, value in settings.items()
            if plan["settings"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{self.folder} was begun with other settings ({'; '.join(changed)}); give the same ones to go on, "
                "or remove it to begin anew"
            )
        if plan["digest"] != digest:
            raise ValueError(
                f"{self.folder} was begun from another list of files, labels or splits; give the same source to go on, "
                "or remove it to begin anew"
            )
        self._make_folders(plan["shard_sizes"])
        return dict(plan["shard_sizes"])

    def write_plan(self, settings: Mapping[str, Any], digest: str, shard_sizes: dict[str, list[int]]) -> None:
        """Note what was decided; from here on the folder can be gone on with."""
        plan = {"format": _FORMAT, "settings": dict(settings), "digest": digest, "shard_sizes": shard_sizes}
        write_atomically(self.folder / PLAN_NAME, json.dumps(plan, indent=1).encode())
        self._make_folders(shard_sizes)

    def _make_folders(self, shard_sizes: Mapping[str, object]) -> None:
        for folder in (*(self.packed / split for split in shard_sizes), self._records):
            folder.mkdir(parents=True, exist_ok=True)

    def tar_of(self, shard: PlannedShard) -> Path:
        """Where a shard goes."""
        return self.packed / shard.split / f"shard-{shard.number:06d}.tar"

    def record_of(self, shard: PlannedShard) -> Path:
        """Where it is noted as finished."""
        return self._records / f"{shard.split}-{shard.number:06d}.json"

    def finished(self, shard: PlannedShard) -> ShardRecord | None:
        """The record of a finished shard whose sources are what they were; None where it is to be written (again)."""
        record = read_record(self.record_of(shard))
        if record is None or record.weights != [planned.sample.weight for planned in shard.samples]:
            return None
        contents = {place: shard.samples[int(place)].sample.content for place in record.stamps}
        if any(stamp != stamp_of(contents[place].path) for place, stamp in record.stamps.items()):
            return None
        tar = stamp_of(self.tar_of(shard))
        has_tar = tar is not None and tar[0] == record.num_bytes
        return record if has_tar or not record.rows else None

    def publish(self) -> None:
        """Make the packed set visible under its own name and remove the rest, as far as it can be."""
        fsync_folder(self.packed)
        refuse_existing(self.destination)
        self.packed.rename(self.destination)  # replaces an empty folder, fails on any other
        fsync_folder(self.destination.parent)
        shutil.rmtree(self._records, ignore_errors=True)  # the set is there: what fails now is no failure of packing
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear_unfinished(self) -> None:
        """Remove the shards that were being written, for their space."""
        for path in self.packed.rglob("*.partial"):
            path.unlink(missing_ok=True)

    def keep(self, error: OSError) -> OSError:
        """The error, with how far it is and how to go on."""
        if not (self.folder / PLAN_NAME).exists():
            kept = f"{self.destination} was not written"
        else:
            total = sum(map(len, json.loads((self.folder / PLAN_NAME).read_bytes())["shard_sizes"].values()))
            finished = len(list(self._records.glob("*.json")))
            kept = f"{finished} of {total} shards of {self.destination} are finished and kept in {self.folder}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OSError(error.errno, f"the disk is full: {kept}; free some space and run the same command again")
        where = f" ({error.filename})" if error.filename else ""
        what = error.strerror or str(error)
        return OSError(error.errno, f"{what}{where}: {kept}; run the same command again to go on")

    def discard(self) -> None:
        """Remove everything, what says whose it is last."""
        for folder in (self.packed, self._records, self.folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def open_journal(destination: Path) -> Iterator[Journal]:
    """Open or begin DESTINATION.partial, for this process alone.

    Raises:
        ValueError: the folder holds something else.
        RuntimeError: another process packs the same set now.
    """
    folder = beside(destination, ".partial")
    _finish_publishing(destination, folder)
    refuse_existing(destination)
    folder.mkdir(parents=True, exist_ok=True)
    ours = (folder / PLAN_NAME).exists() and _is_plan(folder / PLAN_NAME)
    if not ours and not {path.name for path in folder.iterdir()} <= {PLAN_NAME + ".partial", LOCK_NAME}:
        raise ValueError(f"{folder} exists and was not begun by reelscale pack; move it away")
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_folder(descriptor, destination, folder)
        try:
            yield Journal(destination, folder)
        finally:
            if folder.exists() and not (folder / PLAN_NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)  # nothing was decided, nothing is lost
    finally:
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # if it is empty: NFS keeps a file that was removed until it is closed


def _finish_publishing(destination: Path, folder: Path) -> None:
    """A kill after the set was made visible has left the records of it: remove them."""
    left = {PLAN_NAME, LOCK_NAME, "records"}
    if destination.is_dir() and folder.is_dir() and {path.name for path in folder.iterdir()} <= left:
        shutil.rmtree(folder, ignore_errors=True)  # that run may be doing so now


def _is_plan(path: Path) -> bool:
    try:
        plan = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(plan, dict) and plan.get("format") == _FORMAT
