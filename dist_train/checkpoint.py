"""Checkpoints: written aside, made durable, then visible by one rename; `latest` moves last.

    run_dir/checkpoints/step_00001200/state.pt    tensors, numbers and strings; loads with weights_only=True
    run_dir/checkpoints/step_00001200/meta.json   step, clips_seen, size and CRC-32 of state.pt, what the run was
    run_dir/checkpoints/latest                    the name of the newest whole checkpoint

The replicated state is written by rank 0; every rank learns whether that worked. A checkpoint whose bytes do not match
its checksum is reported and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_train.collectives import Collectives

logger = logging.getLogger(__name__)

STATE, META, LATEST = "state.pt", "meta.json", "latest"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_epochs: float = 1.0
    """Write one after each so many epochs; 0: only at the end."""
    keep: int = 2
    """Keep this many; the newest whole one is never removed."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if self.every_epochs < 0:
            found.append(f"checkpoint.every_epochs is {self.every_epochs}: use 0 (only at the end) or more")
        if self.keep < 1:
            found.append(f"checkpoint.keep is {self.keep}: keep at least 1")
        return found


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, why, and what to do.

    Raised alike on every rank, so one of them can speak for all.
    """

    on_every_rank = True


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint read back."""

    path: Path
    """Its folder."""
    step: int
    """Steps done when it was written."""
    clips_seen: int
    """Position in the stream of samples: the loader's whole state."""
    state: Mapping[str, Any]
    """What the loop saved."""
    meta: Mapping[str, Any]
    """The rest of meta.json."""


class _CheckedFile:
    """A file that keeps the CRC-32 and the size of what passes through `write`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.crc32, self.num_bytes = file, 0, 0

    def write(self, data: Any) -> int:
        rest = view = memoryview(data).cast("B")
        while rest:  # one call may take less: Linux stops at 2 GiB, a full disk at what is left
            rest = rest[self._file.write(rest) :]
        self.crc32 = zlib.crc32(view, self.crc32)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(
    run_dir: Path,
    *,
    step: int,
    clips_seen: int,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    collectives: Collectives,
    keep: int,
) -> Path:
    """Writes `state` as the checkpoint of `step`; returns its folder once it is durable, on every rank.

    Raises:
        CheckpointError: on every rank, when rank 0 could not write it. Earlier checkpoints are untouched.
    """
    folder = run_dir / "checkpoints"
    path = folder / f"step_{step:08d}"
    problem = None
    if collectives.world.is_first:
        try:
            _write(path, state, {"step": step, "clips_seen": clips_seen, **meta})
            _point_latest(folder, path.name)
            _remove_old(folder, keep, newest=path.name)
        except (OSError, RuntimeError) as error:
            problem = f"cannot save checkpoint {path}: {_reason(error)}"
    problem = collectives.broadcast_object(problem)
    if problem:
        newest = latest_name(run_dir)
        kept = f"{newest} is whole" if newest else "there is no earlier one"
        raise CheckpointError(f"{problem} ({kept}); make room, then continue with --resume")
    return path


def load_latest(run_dir: Path, *, collectives: Collectives) -> Checkpoint | None:
    """The newest checkpoint whose checksum holds, the same on every rank; None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints but none is whole.
    """
    chosen, problem = None, None
    if collectives.world.is_first:
        candidates = _candidates(run_dir / "checkpoints")
        for path in candidates:
            fault = _fault(path)
            if fault is None:
                chosen = path.name
                break
            logger.warning("checkpoint %s is damaged (%s): using the one before it", path, fault)
        if candidates and chosen is None:
            problem = f"no whole checkpoint in {run_dir / 'checkpoints'}: all {len(candidates)} are damaged"
    chosen, problem = collectives.broadcast_object((chosen, problem))
    if problem:
        raise CheckpointError(f"{problem}; start again in another run folder")
    return None if chosen is None else read_checkpoint(run_dir / "checkpoints" / chosen)


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the checkpoint folder `path` (without checking its checksum)."""
    meta = json.loads((path / META).read_text(encoding="utf-8"))
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(path=path, step=meta["step"], clips_seen=meta["clips_seen"], state=state, meta=meta)


def latest_name(run_dir: Path) -> str | None:
    """The name that `latest` holds, or None."""
    try:
        return (run_dir / "checkpoints" / LATEST).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _write(path: Path, state: Mapping[str, Any], meta: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with (aside / STATE).open("wb", buffering=0) as file:
            checked = _CheckedFile(file)
            torch.save(dict(state), checked)  # type: ignore[arg-type]
            os.fsync(file.fileno())
        meta |= {"state_crc32": checked.crc32, "state_bytes": checked.num_bytes}
        with (aside / META).open("w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        _sync_folder(aside)
        if path.exists():  # only a damaged one can be in the way: a whole one would have been resumed from
            shutil.rmtree(path)
        aside.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _point_latest(folder: Path, name: str) -> None:
    aside = folder / f".{LATEST}.partial"
    with aside.open("w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(folder / LATEST)
    _sync_folder(folder)


def _remove_old(folder: Path, keep: int, *, newest: str) -> None:
    """Keeps `newest` and the `keep - 1` before it. What claims a higher step is damaged: it would have been resumed."""
    paths = _candidates(folder)
    ahead = [path for path in paths if path.name > newest]
    behind = [path for path in paths if path.name <= newest]
    for path in [*ahead, *behind[keep:], *folder.glob(".step_*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _candidates(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def _fault(path: Path) -> str | None:
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        crc, size = 0, 0
        with (path / STATE).open("rb") as file:
            while block := file.read(1 << 22):
                crc, size = zlib.crc32(block, crc), size + len(block)
        if (crc, size) != (meta["state_crc32"], meta["state_bytes"]):
            expected = f"{meta['state_bytes']} and {meta['state_crc32']:08x}"
            return f"{STATE} has {size} bytes with CRC-32 {crc:08x}, {META} says {expected}"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """The operating system's own words where it said any, else the first line of the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]
