"""The loader: batches of clips by position, from worker processes, the same stream whoever makes it.

    loader = ClipLoader(open_manifest("packed/train"), clip=ClipConfig(), loader=LoaderConfig(num_workers=4),
                        training=True, global_batch_clips=64, rank=rank, world_size=world_size)
    for batch in loader.batches(start_position=0, stop_position=6400):
        ...

A script that does this with worker processes needs `if __name__ == "__main__":` around it, for they import it.

Its state is one integer, the position: the stream from any position is the same at any number of workers, and the
clips of a global batch are the same at any number of ranks. Workers make batches ahead and never change the order; how
many there are may change at any time, and one that fails is replaced (`data_shards.workers.pool`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import torch

from data_shards.activity import WorkerActivity
from data_shards.augment.mirror import mirrored_labels
from data_shards.batch import Batch, BatchArrays, BatchShape
from data_shards.clips import ClipConfig
from data_shards.manifest import Manifest
from data_shards.mixture import Mixture
from data_shards.order import evaluation_requests, rank_positions
from data_shards.sample_order import OrderConfig, check_start
from data_shards.worker import BatchMaker, Failure, Made, StreamConfig
from data_shards.workers.accounts import WorkerAccount
from data_shards.workers.pool import MAX_LENT, WorkerLimits, WorkerPool
from data_shards.workers.requests import RequestPlan, Span
from data_shards.workers.room import check_memory, most_size
from data_shards.workers.slabs import Lease
from data_shards.workers.tuning import Size, Tuner


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How clips are loaded: which order, how many processes, what to do about a bad sample."""

    num_workers: int | Literal["auto"] = "auto"
    """Worker processes of each rank and loader; `auto` adds and removes them as the waiting for batches says; 0 makes
    the clips in the training process itself."""
    prefetch_batches: int | Literal["auto"] = "auto"
    """Batches that each worker makes ahead of the training process."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What to do with a sample that cannot be decoded: stop, or give it weight 0, count it and name it."""
    order: OrderConfig = field(default_factory=OrderConfig)
    """In which order samples come."""
    worker_timeout_seconds: float = 300.0
    """A worker that reads, decodes or augments one clip for longer is ended, and another makes its batch again."""
    worker_memory_mib: int = 4096
    """A worker that holds more memory of its own after a batch is replaced by another; 0: never."""

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("num_workers", 0), ("prefetch_batches", 1), ("worker_memory_mib", 0)):
            value = getattr(self, name)
            if value == "auto" and name != "worker_memory_mib":
                continue
            if not isinstance(value, int) or value < least:
                problems.append(f"{name} is {value!r}, it must be at least {least}")
        if not self.worker_timeout_seconds > 0:
            problems.append(f"worker_timeout_seconds is {self.worker_timeout_seconds}, it must be more than 0")
        if self.on_bad_sample not in ("raise", "skip"):
            problems.append(f'on_bad_sample is {self.on_bad_sample!r}, it must be "raise" or "skip"')
        if problems:
            raise ValueError("loader: " + "; ".join(problems))


class ClipLoader:
    """Batches of clips of one packed split (or a mixture of several), for one rank.

    Args:
        global_batch_clips: clips of one optimizer step over all ranks; divides by `world_size * micro_batches`.
        micro_batches: batches that this rank gets for each global batch (gradient accumulation).
        seed: seed of the sample order and of the random frames, crops and flips.
        pin_memory: hand out batches in pinned memory, for asynchronous copies to a CUDA device.
        local_world_size: ranks on this machine, which share its processors: `auto` takes its part of them.

    Raises ValueError where the batch does not divide or the rank does not exist. Worker processes start with the first
    stream and stay until `close` (or the end of a `with` statement); several loaders share one fork server.
    """

    def __init__(
        self,
        manifest: Manifest | Mixture,
        *,
        clip: ClipConfig,
        loader: LoaderConfig,
        training: bool,
        global_batch_clips: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        seed: int = 0,
        pin_memory: bool = False,
        local_world_size: int = 1,
    ) -> None:
        clip.decoding.check_available()
        mirrored_labels(manifest.classes, clip.flip_label_pairs)
        self.manifest = manifest
        self.training = training
        self._config, self._global_batch = loader, global_batch_clips
        self._pin = pin_memory and torch.cuda.is_available()
        batch_clips = rank_positions(0, global_batch_clips, rank, world_size, micro_batches).shape[1]
        batch_clips = max(batch_clips // clip.num_views(training=training), 1)  # a sample's views are that many clips
        self._plan = RequestPlan(
            training=training, batch_clips=batch_clips, rank=rank, world_size=world_size, micro_batches=micro_batches
        )
        self._shape = BatchShape(num_clips=batch_clips, sample_shape=clip.sample_shape(training=training))
        self._part = evaluation_requests(
            len(manifest), rank, world_size, batch_clips, pad=not training and loader.order.tail == "pad"
        )
        most = most_size(
            loader.num_workers,
            loader.prefetch_batches,
            slab_bytes=self._shape.num_bytes,
            spare_slabs=MAX_LENT,
            local_world_size=local_world_size,
        )
        self._tuner = Tuner(
            num_workers=None if loader.num_workers == "auto" else loader.num_workers,
            prefetch=None if loader.prefetch_batches == "auto" else loader.prefetch_batches,
            most=most,
        )
        self._limits = WorkerLimits(
            max_workers=most.num_workers,
            max_slabs=self._num_slabs(most),
            timeout_seconds=loader.worker_timeout_seconds,
            max_bytes=loader.worker_memory_mib << 20,
        )
        self._activity = WorkerActivity(self._limits.max_workers)
        stream = StreamConfig(
            training=training,
            order=loader.order,
            seed=seed,
            global_batch_clips=global_batch_clips,
            on_bad_sample=loader.on_bad_sample,
            stop=None if training else len(manifest) * (rank + 1) // world_size,
        )
        self._maker = BatchMaker(manifest, clip=clip, stream=stream, activity=self._activity)
        self._pool: WorkerPool | None = None
        self._stream_number = 0

    @property
    def num_samples(self) -> int:
        """Samples in the split; in training, positions of an epoch."""
        return self._maker.epoch_positions

    @property
    def num_workers(self) -> int:
        """Worker processes that there are to be now."""
        return 0 if self._pool is None else self._pool.num_workers

    @property
    def shared_bytes(self) -> int:
        """Memory that the batches of the workers take now, once for all processes."""
        return 0 if self._pool is None else self._pool.shared_bytes

    @property
    def most_shared_bytes(self) -> int:
        """What that memory can grow to, with the workers that there are."""
        return 0 if self._pool is None else self._pool.num_slabs * self._shape.num_bytes

    @property
    def accounts(self) -> list[WorkerAccount]:
        """Where the time of each worker process went, since the first stream after the last `close`."""
        return [] if self._pool is None else self._pool.accounts

    def batches(self, start_position: int, stop_position: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batches from `start_position` to `stop_position`, in order.

        Positions count clips of the endless stream of epochs (`data_shards.order`); the difference must be a multiple
        of the global batch. Starting another stream of this loader ends this one. A batch may be kept for as long as
        one likes; beyond the last two, those that are kept are copies.

        Raises:
            ValueError: at once, for positions that no stream has.
            DataError: for a bad sample with on_bad_sample="raise", naming shard and key, when its batch is due.
            OSError: where the machine cannot read a shard, naming shard and key.
            RuntimeError: where worker processes end one after the other, naming the sample.
        """
        if not self.training:
            raise ValueError("batches() needs a loader with training=True; use evaluation_batches()")
        span = stop_position - start_position
        if start_position < 0 or span < 0 or span % self._global_batch:
            whole = start_position + max(span, 0) // self._global_batch * self._global_batch
            raise ValueError(
                f"positions {start_position} to {stop_position} are not a whole number of global batches of "
                f"{self._global_batch} clips; stop at {whole}"
            )
        check_start(start_position, self._config.order, self._global_batch)
        return self._stream(Span(start_position, stop_position))

    def evaluation_batches(self) -> Iterator[Batch]:
        """This rank's part of the split, each sample on exactly one rank, in the manifest's order.

        The last batch is smaller where the part does not divide, and a rank may get none: no sample counts twice. With
        the tail policy `pad` it is filled up with clips of weight 0, and all ranks get the same number of batches.
        Raises as `batches` does.
        """
        if self.training:
            raise ValueError("evaluation_batches() needs a loader with training=False; use batches()")
        first = self._part[0][0] if self._part else 0
        return self._stream(Span(first, sum(self._part[-1]) if self._part else 0))

    def doing(self) -> str:
        """What a worker is at for longest now ("" where nobody is): sample, shard and key. Any thread may ask."""
        return self._activity.describe(self.manifest)

    def close(self) -> None:
        """End the worker processes. A stream that is under way ends with a RuntimeError; its batches stay valid."""
        self._stream_number += 1
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, span: Span) -> Iterator[Batch]:
        self._stream_number += 1
        number = self._stream_number
        made = self._made_by_workers(span) if self._limits.max_workers else self._made_here(span)
        while True:
            if number != self._stream_number:
                raise RuntimeError("this stream of the loader has ended: another was started, or close() was called")
            try:
                batch = next(made)
            except StopIteration:
                return
            yield batch
            del batch  # else its memory would be in use while the next one is waited for

    def _made_here(self, span: Span) -> Iterator[Batch]:
        for number in range(self._plan.num_requests(span)):
            request = self._plan.request(span, number)
            arrays = self._shape.arrays(torch.empty(self._shape.num_bytes, dtype=torch.uint8), request.num_clips)
            made = self._maker.make(request, arrays)
            if isinstance(made, Failure):
                raise made.to_error()
            assert made is not None
            yield _to_batch(arrays, made)
            del arrays

    def _made_by_workers(self, span: Span) -> Iterator[Batch]:
        if self._pool is None or self._pool.closed:
            self._pool = self._start_pool()
        pool, tuner = self._pool, self._tuner
        pool.start_stream(span)
        tuner.restart()
        while (found := pool.next()) is not None:
            arrays, lease, made = found
            size = tuner.observe(made.costs)
            if size is not None:
                pool.resize(size.num_workers, self._num_slabs(size))
            del found  # else the batch's memory would be in use while the next one is waited for
            yield _to_batch(arrays, made, lease)
            del arrays, lease

    def _start_pool(self) -> WorkerPool:
        size, limits = self._tuner.size, self._limits
        check_memory(self._num_slabs(size) * self._shape.num_bytes)
        pool = WorkerPool(
            self._maker,
            plan=self._plan,
            shape=self._shape,
            limits=limits,
            sets=self.manifest,
            skips=self._config.on_bad_sample == "skip",
            pin=self._pin,
        )
        pool.resize(size.num_workers, self._num_slabs(size))
        return pool

    def _num_slabs(self, size: Size) -> int:
        return size.num_workers * size.prefetch + MAX_LENT


def _to_batch(arrays: BatchArrays, made: Made, lease: Lease | None = None) -> Batch:
    return Batch(
        clips=arrays.clips.permute(0, 1, 4, 2, 3),
        labels=arrays.labels,
        weights=arrays.weights,
        sample_ids=arrays.sample_ids,
        positions=arrays.positions,
        costs=made.costs,
        skipped=made.skipped,
        lease=lease,
    )
