"""The journal of samples: which rank trained on which sample at which position, and the certificate read from it.

One JSON-lines file a rank: `{"attempt": 0, "start": 0}` when an attempt begins (0: the first; `start` is the position
it continues from), then `{"step": 3, "positions": [...], "samples": [...]}` for each step. A resumed run redoes the
steps after its checkpoint: whatever an earlier attempt wrote at or after the later attempt's start does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train.jsonlines import JsonLines, read_json_lines


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
        ValueError: no journal in the folder.
    """
    files = sorted((run_dir / "journal").glob("rank_*.jsonl"))
    if not files:
        raise ValueError(f"{run_dir} has no journal: give the folder of a run that has trained")
    starts = {line["attempt"]: line["start"] for path in files for line in _attempts(path)}
    visits = np.zeros((num_epochs, num_samples), dtype=np.uint16)
    for path in files:
        limit = None
        for line in read_json_lines(path):
            if "attempt" in line:
                limit = min((start for later, start in starts.items() if later > line["attempt"]), default=None)
                continue
            positions, samples = np.asarray(line["positions"]), np.asarray(line["samples"])
            counted = positions < num_epochs * num_samples
            if limit is not None:
                counted &= positions < limit
            np.add.at(visits, (positions[counted] // num_samples, samples[counted]), 1)
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


def _attempts(path: Path) -> Iterator[dict[str, int]]:
    return (line for line in read_json_lines(path) if "attempt" in line)
