"""The worker's side of the loader: a request for positions in, the clips of a batch out.

Runs in a worker process, or in the training process itself with `num_workers=0`; the code and the pixels are the same.
A batch is decoded straight into the memory that is shared with the training process. Its costs close: from the end of
the worker's last batch to the end of this one, `read + decode + augment + idle == wall` seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from data_shards.activity import IDLE, WorkerActivity
from data_shards.batch import BatchArrays
from data_shards.clips import COST_NAMES, ClipConfig, read_clip, training_labels
from data_shards.errors import DataError
from data_shards.manifest import Manifest
from data_shards.mixture import Mixture, as_mixture
from data_shards.planned_reads import clip_reads
from data_shards.reading import ShardReader
from data_shards.sample_order import PADDING, ManifestOrder, OrderConfig, SampleOrder, Visits, make_order
from data_shards.workers.memory import private_bytes
from data_shards.workers.requests import Request

# `worker` is the worker's number (-1 in the training process) and `worker_bytes` what it shares with nobody; `wait` is
# how long the training process waited for the batch; wall and idle count from the end of the worker's last batch.
BATCH_COST_NAMES = (
    "worker",
    "worker_bytes",
    "wait_seconds",
    "wall_seconds",
    "idle_seconds",
    "skipped",
    *COST_NAMES,
)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What decides which sample is at a position, and what happens to a bad one."""

    training: bool
    """The endless stream of training, or the samples of the set in order."""
    order: OrderConfig
    """Of the training stream."""
    seed: int
    """Of the order and of all random choices."""
    global_batch_clips: int
    """Clips of a global batch."""
    on_bad_sample: Literal["raise", "skip"]
    """Stop, or give the sample weight 0."""
    stop: int | None = None
    """In evaluation, where this rank's part ends."""

    def sample_order(self, mixture: Mixture) -> SampleOrder:
        """The order of the samples of `mixture`."""
        if not self.training:
            return ManifestOrder([len(manifest) for manifest in mixture.manifests], stop=self.stop)
        return make_order(
            mixture.labels,
            self.order,
            seed=self.seed,
            global_batch_clips=self.global_batch_clips,
            shares=mixture.shares,
        )


class Made(NamedTuple):
    """A batch is made."""

    costs: dict[str, float]
    """See `BATCH_COST_NAMES`."""
    skipped: list[str]
    """One line for each bad sample."""


class Failure(NamedTuple):
    """A bad sample (or a file that cannot be read), on its way to the training process."""

    kind: type[DataError] | type[OSError] | type[RuntimeError]
    """Class of the exception."""
    arguments: tuple[object, ...]
    """Its arguments."""

    def to_error(self) -> Exception:
        """The exception to raise in the training process."""
        return self.kind(*self.arguments)


class BatchMaker:
    """Makes batches of one packed split, or of several; `activity` shows the work to other processes."""

    def __init__(
        self,
        sets: Manifest | Mixture,
        *,
        clip: ClipConfig,
        stream: StreamConfig,
        activity: WorkerActivity | None = None,
    ) -> None:
        self.clip, self.stream = clip, stream
        self.activity = activity or WorkerActivity(0)
        self._sets = sets
        self._start(None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("clip", "stream", "activity", "_sets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start(None)

    def _start(self, worker: int | None) -> None:
        self._mixture = as_mixture(self._sets)
        self._order = self.stream.sample_order(self._mixture)
        self._readers = [ShardReader(manifest) for manifest in self._mixture.manifests]
        self._worker = worker
        self._last_end: float | None = None

    def start(self, worker: int) -> None:
        """Called once in worker `worker` when it is ready: its wall time counts from here."""
        self._worker = worker
        self._last_end = perf_counter()

    @property
    def epoch_positions(self) -> int:
        """Positions of the stream that count as one epoch."""
        return self._order.epoch_positions

    @property
    def reads_ahead(self) -> bool:
        """Whether `want` does anything."""
        return any(reader.reads_ahead for reader in self._readers)

    def want(self, request: Request) -> None:
        """Say that the batch of `request` will be made after those wanted already; returns at once."""
        visits = self._visits(request)
        for number, sample, epoch, _ in zip(*(column.tolist() for column in visits), strict=True):
            if sample != PADDING:
                reads = clip_reads(
                    self._mixture.manifests[number],
                    sample,
                    clip=self.clip,
                    training=request.training,
                    seed=self._order.set_seeds[number],
                    epoch=epoch,
                )
                self._readers[number].want([(sample, reads)])

    def forget(self) -> None:
        """What was wanted will not be made."""
        for reader in self._readers:
            reader.forget()

    def make(
        self,
        request: Request,
        arrays: BatchArrays,
        *,
        goes_on: Callable[[], bool] = lambda: True,
        refused: frozenset[int] = frozenset(),
    ) -> Made | Failure | None:
        """The batch of `request`, written to `arrays`.

        Args:
            goes_on: asked before each clip; once it says no the work is left, and None returned.
            refused: sample ids that are bad because they ended the workers that touched them.
        """
        try:
            return self._make(request, arrays, goes_on, refused)
        finally:
            self._note(0, IDLE)

    def _make(
        self, request: Request, arrays: BatchArrays, goes_on: Callable[[], bool], refused: frozenset[int]
    ) -> Made | Failure | None:
        started = perf_counter()
        visits = self._visits(request)
        sample_ids = self._mixture.sample_ids(visits.sets, visits.samples)
        clips = arrays.clips.view(request.num_clips, -1)
        arrays.weights.copy_(torch.from_numpy(visits.weights))
        costs = dict.fromkeys(COST_NAMES, 0.0)
        skipped: list[str] = []
        for place, sample_id in enumerate(sample_ids.tolist()):
            if not goes_on():
                self._last_end = perf_counter()
                return None
            if sample_id == PADDING:
                clips[place].zero_()
                continue
            begun = perf_counter()
            try:
                if sample_id in refused:
                    raise DataError(f"{self._mixture.describe(sample_id)}: it ended the worker processes that read it")
                clip_costs = self._make_clip(visits, place, sample_id, clips[place])
            except DataError as error:
                if self.stream.on_bad_sample == "raise":
                    return Failure(DataError, (str(error),))
                clips[place].zero_()
                arrays.weights[place] = 0.0
                skipped.append(str(error))
                costs["decode_seconds"] += perf_counter() - begun  # where it went wrong is not told
            except OSError as error:
                return Failure(OSError, error.args)
            else:
                for name, value in clip_costs.items():
                    costs[name] += value
        arrays.labels.copy_(torch.from_numpy(self._labels(visits)))
        arrays.sample_ids.copy_(torch.from_numpy(sample_ids))
        torch.arange(request.start, request.start + request.num_clips, out=arrays.positions)
        return Made(self._close_costs(costs, started, len(skipped)), skipped)

    def _make_clip(self, visits: Visits, place: int, sample_id: int, out: torch.Tensor) -> dict[str, float]:
        number = int(visits.sets[place])
        _, costs = read_clip(
            self._mixture.manifests[number],
            int(visits.samples[place]),
            clip=self.clip,
            training=self.stream.training,
            seed=self._order.set_seeds[number],
            epoch=int(visits.epochs[place]),
            reader=self._readers[number],
            out=out,
            begins=partial(self._note, sample_id),
        )
        return costs

    def _visits(self, request: Request) -> Visits:
        return self._order.at(np.arange(request.start, request.start + request.num_clips, dtype=np.int64))

    def _labels(self, visits: Visits) -> np.ndarray:
        labels = np.zeros(len(visits.sets), dtype=np.int64)
        for number, manifest in enumerate(self._mixture.manifests):
            chosen = (visits.sets == number) & (visits.samples != PADDING)
            samples, epochs = visits.samples[chosen], visits.epochs[chosen]
            if self.stream.training:
                seed = self._order.set_seeds[number]
                labels[chosen] = training_labels(manifest, samples, epochs, clip=self.clip, seed=seed)
            else:
                labels[chosen] = manifest.samples["label"][samples]
        return labels

    def _note(self, sample_id: int, stage: int) -> None:
        self.activity.note(self._worker or 0, sample_id, stage)

    def _close_costs(self, costs: dict[str, float], started: float, num_skipped: int) -> dict[str, float]:
        """Give every second since the last batch a row: what is neither read, decode nor idle went into the batch."""
        ended = perf_counter()
        since = started if self._worker is None or self._last_end is None else self._last_end
        self._last_end = ended
        costs["augment_seconds"] = ended - started - costs["read_seconds"] - costs["decode_seconds"]
        return {
            "worker": -1 if self._worker is None else self._worker,
            "worker_bytes": 0 if self._worker is None else private_bytes(),
            "wait_seconds": 0.0,
            "wall_seconds": ended - since,
            "idle_seconds": started - since,
            "skipped": num_skipped,
            **costs,
        }
