"""The journal of samples: which rank trained on which sample at which position, and the certificate read from it.

One JSON-lines file a rank: `{"attempt": 0, "start": 0}` when an attempt begins (0: the first; `start` is the position
it continues from), then `{"step": 3, "positions": [...], "samples": [...]}` for each step. A resumed run redoes the
steps after its checkpoint: whatever an earlier attempt wrote at or after the later attempt's start does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train.jsonlines import JsonLines, read_json_lines

_CHUNK = 2**16  # positions that are looked up at a time


class Journal:
    """Appends one rank's samples to `run_dir/journal/rank_00000.jsonl`."""

    def __init__(self, run_dir: Path, *, rank: int, attempt: int, start: int) -> None:
        self._lines = JsonLines(run_dir / "journal" / f"rank_{rank:05d}.jsonl")
        self._lines.write({"attempt": attempt, "start": start})
        self.flush()

    def add(self, *, step: int, positions: Sequence[int], samples: Sequence[int]) -> None:
        """Notes what this rank trains on at `step`."""
        self._lines.write({"step": step, "positions": list(positions), "samples": list(samples)})

    def flush(self) -> None:
        """Hands the lines to the operating system: they survive this process's death."""
        self._lines.flush()

    def sync(self) -> None:
        """Puts the lines on the disk: they survive the machine's death."""
        self._lines.sync()

    def close(self) -> None:
        """Flushes and closes; later calls do nothing."""
        self._lines.close()


@dataclass(frozen=True, kw_only=True)
class EpochCertificate:
    """How often the samples of one epoch were trained on."""

    epoch: int
    """The epoch, from 0."""
    num_samples: int
    """Samples in the training split."""
    num_seen: int
    """Positions of this epoch that were trained on."""
    num_dropped: int
    """Samples that were not trained on."""
    num_repeated: int
    """Surplus visits: visits minus distinct samples."""

    @property
    def exact(self) -> bool:
        """True when each sample was trained on exactly once."""
        return self.num_dropped == 0 and self.num_repeated == 0


def certify(run_dir: Path, *, num_samples: int, num_epochs: int) -> list[EpochCertificate]:
    """Reads all journals of a run and counts the samples of the first `num_epochs` epochs.

    Memory: two bytes for each sample of each epoch; the journals are read a line at a time.

    Raises:
        ValueError: no journal in the folder, or one of another set.
    """
    visits = np.zeros((num_epochs, num_samples), dtype=np.uint16)
    for positions, samples in _trained(run_dir, num_positions=num_epochs * num_samples, num_samples=num_samples):
        np.add.at(visits, (positions // num_samples, samples), 1)
    return [
        EpochCertificate(
            epoch=epoch,
            num_samples=num_samples,
            num_seen=int(row.sum()),
            num_dropped=int((row == 0).sum()),
            num_repeated=int(row.sum()) - int((row > 0).sum()),
        )
        for epoch, row in enumerate(visits)
    ]


@dataclass(frozen=True, kw_only=True)
class StreamCertificate:
    """How a run's journals compare with the order of its samples, position by position."""

    num_positions: int
    """Positions of the stream at which something should have been trained on."""
    num_dropped: int
    """Of these, the ones that nothing was trained on at."""
    num_repeated: int
    """Surplus visits: visits minus distinct positions."""
    num_others: int
    """Visits of another sample than the order's, or at a position where there should have been none."""
    visits: np.ndarray
    """How often each sample was trained on; int64 [num_samples]."""

    @property
    def exact(self) -> bool:
        """True when the order's sample was trained on exactly once at each position."""
        return self.num_dropped == self.num_repeated == self.num_others == 0


def certify_stream(
    run_dir: Path, *, num_samples: int, num_positions: int, order: Callable[[np.ndarray], np.ndarray]
) -> StreamCertificate:
    """Reads all journals of a run and compares the first `num_positions` positions with the order of the samples.

    For streams whose samples do not all come once in the same stretch (mixtures, balanced classes, tails). `order`:
    positions (int64 [N]) to sample ids, -1 where nothing should be trained on. Memory: one byte a position.

    Raises:
        ValueError: no journal in the folder, or one of another set.
    """
    seen = np.zeros(num_positions, dtype=np.uint8)
    visits = np.zeros(num_samples, dtype=np.int64)
    num_repeated = num_others = 0
    for positions, samples in _in_chunks(_trained(run_dir, num_positions=num_positions, num_samples=num_samples)):
        num_others += int((order(positions) != samples).sum())
        num_repeated += int(seen[positions].sum()) + len(positions) - len(np.unique(positions))
        seen[positions] = 1
        np.add.at(visits, samples, 1)
    chunks = [np.arange(first, min(first + _CHUNK, num_positions)) for first in range(0, num_positions, _CHUNK)]
    due = [order(chunk) >= 0 for chunk in chunks]
    return StreamCertificate(
        num_positions=sum(int(part.sum()) for part in due),
        num_dropped=sum(int((part & (seen[chunk] == 0)).sum()) for part, chunk in zip(due, chunks, strict=True)),
        num_repeated=num_repeated,
        num_others=num_others,
        visits=visits,
    )


def _trained(run_dir: Path, *, num_positions: int, num_samples: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions, samples) below `num_positions` of each line that counts, not redone by a later attempt."""
    files = sorted((run_dir / "journal").glob("rank_*.jsonl"))
    if not files:
        raise ValueError(f"{run_dir} has no journal: give the folder of a run that has trained")
    starts = {line["attempt"]: line["start"] for path in files for line in _attempts(path)}
    for path in files:
        limit = num_positions
        for line in read_json_lines(path):
            if "attempt" in line:
                later = (start for attempt, start in starts.items() if attempt > line["attempt"])
                limit = min(later, default=num_positions)
                continue
            positions = np.asarray(line["positions"], dtype=np.int64)
            counted = positions < min(limit, num_positions)
            samples = np.asarray(line["samples"], dtype=np.int64)[counted]
            if samples.max(initial=0) >= num_samples:
                raise ValueError(
                    f"{path} names sample {samples.max()}, the training split has {num_samples}: the run has trained "
                    "on another set"
                )
            yield positions[counted], samples


def _in_chunks(lines: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same, at least `_CHUNK` visits at a time: looking up many positions takes little longer than one."""
    positions, samples, size = [], [], 0
    for of_line, ids in lines:
        positions.append(of_line)
        samples.append(ids)
        size += len(ids)
        if size >= _CHUNK:
            yield np.concatenate(positions), np.concatenate(samples)
            positions, samples, size = [], [], 0
    if positions:
        yield np.concatenate(positions), np.concatenate(samples)


def _attempts(path: Path) -> Iterator[dict[str, int]]:
    return (line for line in read_json_lines(path) if "attempt" in line)
