"""The loader: batches of clips by position, from worker processes, the same stream whoever makes it.

    loader = ClipLoader(open_manifest("packed/train"), clip=ClipConfig(), loader=LoaderConfig(num_workers=4),
                        training=True, global_batch_clips=64, rank=rank, world_size=world_size)
    for batch in loader.batches(start_position=0, stop_position=6400):
        ...

A script that does this with worker processes needs `if __name__ == "__main__":` around it, for they import it.

Its state is one integer, the position: the stream from any position is the same at any number of workers, and the
clips of a global batch are the same at any number of ranks. Workers make batches ahead and never change the order.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from data_shards.activity import WorkerActivity
from data_shards.batch import Batch
from data_shards.clips import ClipConfig
from data_shards.manifest import Manifest
from data_shards.order import evaluation_positions, rank_positions
from data_shards.worker import BatchMaker, Failure, Request, StreamConfig
from data_shards.worker_process import start_worker, worker_context

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How clips are loaded: which order, how many processes, what to do about a bad sample."""

    num_workers: int = 2
    """Worker processes of each rank and loader; 0 makes the clips in the training process itself."""
    prefetch_batches: int = 2
    """Batches that each worker makes ahead of the training process."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What to do with a sample that cannot be decoded: stop, or give it weight 0, count it and name it."""
    shuffle_block_samples: int = 0
    """Samples in a row that a shuffled epoch keeps near each other, for slow storage; 0 shuffles all of the set."""
    shuffle_window_blocks: int = 16
    """Blocks that are mixed with each other when shuffle_block_samples is set."""

    def __post_init__(self) -> None:
        problems = []
        for name, least in (
            ("num_workers", 0),
            ("prefetch_batches", 1),
            ("shuffle_block_samples", 0),
            ("shuffle_window_blocks", 1),
        ):
            if getattr(self, name) < least:
                problems.append(f"{name} is {getattr(self, name)}, it must be at least {least}")
        if self.on_bad_sample not in ("raise", "skip"):
            problems.append(f'on_bad_sample is {self.on_bad_sample!r}, it must be "raise" or "skip"')
        if problems:
            raise ValueError("loader: " + "; ".join(problems))


class _Requests:
    """The sampler of the DataLoader: what the workers are asked for next, set anew for each stream."""

    def __init__(self) -> None:
        self.pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)


class ClipLoader:
    """Batches of clips of one packed split, for one rank.

    Args:
        global_batch_clips: clips of one optimizer step over all ranks; divides by `world_size * micro_batches`.
        micro_batches: batches that this rank gets for each global batch (gradient accumulation).
        seed: seed of the sample order and of the random frames, crops and flips.
        pin_memory: hand out batches in pinned memory, for asynchronous copies to a CUDA device.

    Raises ValueError where the batch does not divide or the rank does not exist. Worker processes start with the first
    stream and stay until `close` (or the end of a `with` statement); several loaders share one fork server.
    """

    def __init__(
        self,
        manifest: Manifest,
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
    ) -> None:
        self.manifest = manifest
        self.training = training
        self._clip, self._loader = clip, loader
        self._rank, self._world_size = rank, world_size
        self._global_batch, self._micro_batches = global_batch_clips, micro_batches
        self._batch_clips = rank_positions(0, global_batch_clips, rank, world_size, micro_batches).shape[1]
        self._requests = _Requests()
        self._stream_number = 0
        stream = StreamConfig(
            seed=seed,
            block_samples=loader.shuffle_block_samples,
            window_blocks=loader.shuffle_window_blocks,
            on_bad_sample=loader.on_bad_sample,
        )
        workers = loader.num_workers
        context = worker_context() if workers else None
        self._activity = WorkerActivity(workers, context)
        self._data_loader: DataLoader[Any] = DataLoader(
            BatchMaker(manifest, clip=clip, stream=stream, activity=self._activity),
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_as_made,
            pin_memory=pin_memory and torch.cuda.is_available(),
            prefetch_factor=loader.prefetch_batches if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=context,
            worker_init_fn=start_worker if workers else None,
            generator=torch.Generator(),  # else each stream would draw from PyTorch's global random numbers
        )

    @property
    def num_samples(self) -> int:
        """Samples in the split: the length of an epoch."""
        return len(self.manifest)

    def batches(self, start_position: int, stop_position: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batches from `start_position` to `stop_position`, in order.

        Positions count clips of the endless stream of epochs (`data_shards.order`); the difference must be a multiple
        of the global batch. Starting another stream of this loader ends this one.

        Raises:
            ValueError: at once, for positions that no stream has.
            DataError: for a bad sample with on_bad_sample="raise", naming shard and key, when its batch is due.
            OSError: where the machine cannot read a shard, naming shard and key.
            RuntimeError: where a worker process died.
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
        return self._stream(self._training_requests(start_position, stop_position))

    def evaluation_batches(self) -> Iterator[Batch]:
        """This rank's part of the split, each sample on exactly one rank, in the manifest's order.

        The last batch is smaller where the part does not divide, and a rank may get none: no sample counts twice.
        Raises as `batches` does.
        """
        if self.training:
            raise ValueError("evaluation_batches() needs a loader with training=False; use batches()")
        part = evaluation_positions(len(self.manifest), self._rank, self._world_size)
        return self._stream(
            Request(start, min(self._batch_clips, part.stop - start), training=False)
            for start in range(part.start, part.stop, self._batch_clips)
        )

    def doing(self) -> str:
        """What a worker is at for longest now ("" where nobody is): sample, shard and key. Any thread may ask."""
        return self._activity.describe(self.manifest)

    def close(self) -> None:
        """End the worker processes. A stream that is under way ends with a RuntimeError."""
        self._stream_number += 1
        iterator = self._data_loader._iterator
        self._data_loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def _training_requests(self, start: int, stop: int) -> Iterator[Request]:
        for batch_start in range(start, stop, self._global_batch):
            first = batch_start + self._rank * self._micro_batches * self._batch_clips
            for micro_batch in range(self._micro_batches):
                yield Request(first + micro_batch * self._batch_clips, self._batch_clips, training=True)

    def _stream(self, requests: Iterable[Request]) -> Iterator[Batch]:
        self._stream_number += 1
        number = self._stream_number
        if self._loader.num_workers and self._data_loader._iterator is None:
            self._check_shared_memory()
        self._requests.pending = requests
        iterator = iter(self._data_loader)
        while True:
            if number != self._stream_number:
                raise RuntimeError("this stream of the loader has ended: another was started, or close() was called")
            try:
                made = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                deaths = _deaths(iterator)
                if not deaths:
                    raise
                self.close()
                raise RuntimeError(deaths) from error
            if isinstance(made, Failure):
                raise made.to_error()
            yield _to_batch(made)

    def _check_shared_memory(self) -> None:
        """Batches travel in shared memory; too little of it kills a worker in the middle of a write."""
        if not _SHARED_MEMORY.is_dir():
            return
        pixels = self._clip.num_segments * self._clip.crop_size**2 * 3
        needed = self._batch_clips * pixels * (self._loader.num_workers * self._loader.prefetch_batches + 1)
        file_system = os.statvfs(_SHARED_MEMORY)
        free = file_system.f_bavail * file_system.f_frsize
        if needed > free:
            raise RuntimeError(
                f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB free, this loader needs {needed / 2**20:.0f} MiB: "
                "enlarge it (docker: --shm-size), or lower num_workers, prefetch_batches or the batch"
            )


def _to_batch(made: dict[str, Any]) -> Batch:
    return Batch(
        clips=made["clips"].permute(0, 1, 4, 2, 3),
        labels=torch.from_numpy(made["labels"]),
        weights=torch.from_numpy(made["weights"]),
        sample_ids=torch.from_numpy(made["sample_ids"]),
        positions=torch.from_numpy(made["positions"]),
        costs=made["costs"],
        skipped=made["skipped"],
    )


def _as_made(made: object) -> object:
    """The collate function: a worker's batch is whole already."""
    return made


def _deaths(iterator: Any) -> str:
    """Which workers have died, how, and what to do about it; "" where none has."""
    deaths, advice = [], ""
    for worker_id, process in enumerate(getattr(iterator, "_workers", [])):
        process.join(timeout=0.1)
        code = process.exitcode
        if code is None:
            continue
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            advice = "if the machine ran out of memory, lower num_workers, prefetch_batches or the batch"
        else:
            how = f"ended with exit code {code}"
            advice = advice or 'see its own message above; a script needs `if __name__ == "__main__":` to use workers'
        deaths.append(f"data worker {worker_id} (pid {process.pid}) {how}")
    return "; ".join([*deaths, advice]) if deaths else ""
