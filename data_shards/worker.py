"""The worker's side of the loader: a request for positions in, the clips of a batch out.

Runs in a worker process, or in the training process itself with `num_workers=0`; the code and the pixels are the same.
A batch is decoded straight into the memory that is shared with the training process. Its costs close: from the end of
the worker's last batch to the end of this one, `read + decode + augment + idle == wall` seconds.
"""

from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data_shards.activity import IDLE, WorkerActivity
from data_shards.clips import COST_NAMES, ClipConfig, read_clip
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.order import sample_at
from data_shards.reading import ShardReader

# `worker` is the worker's number (-1 in the training process); wall and idle count from the end of its last batch.
BATCH_COST_NAMES = ("worker", "wall_seconds", "idle_seconds", "skipped", *COST_NAMES)


class Request(NamedTuple):
    """Positions `start` to `start + num_clips - 1`: of the training stream, or of the set itself in evaluation."""

    start: int
    num_clips: int
    training: bool


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What decides which sample is at a position, and what happens to a bad one."""

    seed: int
    block_samples: int
    window_blocks: int
    on_bad_sample: Literal["raise", "skip"]


class Failure(NamedTuple):
    """A bad sample (or a file that cannot be read), on its way to the training process."""

    kind: type[DataError] | type[OSError]
    arguments: tuple[object, ...]

    def to_error(self) -> Exception:
        """The exception to raise in the training process."""
        return self.kind(*self.arguments)


class BatchMaker(Dataset):
    """Makes batches of one manifest; `maker[request]` is a dict of arrays, or a `Failure`. `activity` shows the work.

    The dict: clips (uint8 tensor BTHWC, in shared memory in a worker), labels, weights, sample_ids, positions (arrays
    of length B), costs (dict), skipped (list of lines).
    """

    def __init__(
        self, manifest: Manifest, *, clip: ClipConfig, stream: StreamConfig, activity: WorkerActivity | None = None
    ) -> None:
        self.manifest = manifest
        self.activity = activity or WorkerActivity(0, None)
        self.clip = clip
        self.stream = stream
        self._reader: ShardReader | None = None
        self._last_end: float | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reader": None, "_last_end": None}

    def start(self) -> None:
        """Called once in a worker that is ready: its wall time counts from here."""
        self._last_end = perf_counter()

    def __getitem__(self, request: Request) -> "dict[str, object] | Failure":
        started = perf_counter()
        if self._reader is None:
            self._reader = ShardReader(self.manifest)
        positions = np.arange(request.start, request.start + request.num_clips, dtype=np.int64)
        sample_ids = self._sample_ids(positions, request)
        clips = empty_clips(request.num_clips, self.clip, shared=get_worker_info() is not None)
        weights = np.ones(request.num_clips, dtype=np.float32)
        costs = dict.fromkeys(COST_NAMES, 0.0)
        skipped: list[str] = []
        info = get_worker_info()
        note, worker = self.activity.note, 0 if info is None else info.id
        for place, sample_id in enumerate(sample_ids.tolist()):
            try:
                _, clip_costs = read_clip(
                    self.manifest,
                    sample_id,
                    clip=self.clip,
                    training=request.training,
                    seed=self.stream.seed,
                    epoch=int(positions[place]) // len(self.manifest) if request.training else 0,
                    reader=self._reader,
                    out=clips[place],
                    begins=partial(note, worker, sample_id),
                )
            except DataError as error:
                if self.stream.on_bad_sample == "raise":
                    return Failure(DataError, (str(error),))
                clips[place].zero_()
                weights[place] = 0.0
                skipped.append(str(error))
            except OSError as error:
                return Failure(OSError, error.args)
            else:
                for name, value in clip_costs.items():
                    costs[name] += value
        note(worker, 0, IDLE)
        return {
            "clips": clips,
            "labels": self.manifest.samples["label"][sample_ids].astype(np.int64),
            "weights": weights,
            "sample_ids": sample_ids,
            "positions": positions,
            "skipped": skipped,
            "costs": self._close_costs(costs, started, len(skipped)),
        }

    def _sample_ids(self, positions: np.ndarray, request: Request) -> np.ndarray:
        if not request.training:
            return positions
        return sample_at(
            positions,
            seed=self.stream.seed,
            num_samples=len(self.manifest),
            block_samples=self.stream.block_samples,
            window_blocks=self.stream.window_blocks,
        )

    def _close_costs(self, costs: dict[str, float], started: float, num_skipped: int) -> dict[str, float]:
        """Give every second since the last batch a row: what is neither read, decode nor idle went into the batch."""
        worker = get_worker_info()
        ended = perf_counter()
        since = self._last_end if worker is not None and self._last_end is not None else started
        self._last_end = ended
        costs["augment_seconds"] = ended - started - costs["read_seconds"] - costs["decode_seconds"]
        return {
            "worker": -1 if worker is None else worker.id,
            "wall_seconds": ended - since,
            "idle_seconds": started - since,
            "skipped": num_skipped,
            **costs,
        }


def empty_clips(num_clips: int, clip: ClipConfig, *, shared: bool) -> torch.Tensor:
    """An uninitialized uint8 tensor (B, T, H, W, C); `shared` puts it in memory that another process can map."""
    shape = (num_clips, clip.num_segments, clip.crop_size, clip.crop_size, 3)
    if not shared:
        return torch.empty(shape, dtype=torch.uint8)
    # As torch's own collate function does: allocated shared, so that sending it copies nothing.
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
