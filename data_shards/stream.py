"""Stream mode: batches of clips from tars without a manifest, on webdataset's own pipeline.

    loader = StreamLoader("s3://bucket/set/shard-{000000..000099}.tar", classes=classes, clip=ClipConfig(),
                          global_batch_clips=64, rank=rank, world_size=world_size, num_workers=4)
    for batch in loader.batches(start_position=0, stop_position=6400):
        ...

For sets that somebody else packed and that are not to be packed again (`reelscale pack` takes such tars too). It is not
exact, as nothing can be that does not know what the tars hold:

- Tars, not samples, are dealt to the ranks and their workers. In an epoch of a reader each sample of its tars comes
  once, but readers with fewer samples begin their next epoch earlier; positions say how many clips were seen, not
  which. Another number of ranks or workers gives another stream; the same number and seed give the same.
- Resuming replays: each worker reads again, without decoding, all that it had handed out before `start_position`.
- All bytes of all members are read, whatever a clip uses.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_shards.batch import Batch
from data_shards.clips import ClipConfig, augment, decode_views
from data_shards.errors import DataError
from data_shards.forms.base import Form
from data_shards.forms.frames_file import SUFFIX, FramesFile
from data_shards.forms.opening import open_frames
from data_shards.forms.payload import MemoryPayload
from data_shards.manifest import samples_dtype
from data_shards.order import rank_positions
from data_shards.sampling import sample_generator
from data_shards.sources.base import VIDEO_SUFFIXES
from data_shards.storage import StorageConfig, check_url, is_url
from data_shards.stream_tars import Sample, ShardOrder, StreamReader, expand_tars
from data_shards.worker import BATCH_COST_NAMES, Failure
from data_shards.worker_process import guard_process, worker_context


@dataclass(frozen=True, kw_only=True)
class _BatchStream(IterableDataset):
    """The batches of one rank, dealt to its workers in turn; each worker makes its own, from `first_batch` on."""

    order: ShardOrder
    classes: tuple[str, ...]
    clip: ClipConfig
    batch_clips: int
    rank: int
    num_workers: int
    first_batch: int
    on_bad_sample: Literal["raise", "skip"]
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __iter__(self) -> Iterator[Batch | Failure]:
        try:
            yield from self._batches()
        except DataError as error:
            yield Failure(DataError, (str(error),))
        except OSError as error:
            yield Failure(OSError, error.args)

    def _batches(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        # The first batch comes from worker 0, whoever made it when nothing was skipped.
        as_worker = (worker + self.first_batch) % self.num_workers
        before = len(range(as_worker, self.first_batch, self.num_workers))
        reader = StreamReader(
            self.order,
            self.rank * self.num_workers + as_worker,
            storage=self.storage,
            skip_damaged=self.on_bad_sample == "skip",
        )
        samples = iter(reader)
        for _ in range(before * self.batch_clips):
            next(samples)
        while True:
            yield self._make_batch(samples, reader, -1 if info is None else worker)

    def _make_batch(self, samples: Iterator[tuple[int, Sample]], reader: StreamReader, worker: int) -> Batch:
        started, shape = perf_counter(), self.clip.sample_shape(training=True)
        pixels = torch.zeros((self.batch_clips, *shape), dtype=torch.uint8)
        labels = torch.zeros(self.batch_clips, dtype=torch.int64)
        weights = torch.ones(self.batch_clips, dtype=torch.float32)
        costs = dict.fromkeys(BATCH_COST_NAMES, 0.0)
        skipped: list[str] = []
        decode_seconds = 0.0
        for place in range(self.batch_clips):
            epoch, sample = next(samples)
            decoding = perf_counter()
            try:
                labels[place] = _label_of(sample, self.classes)
                self._decode(sample, epoch, pixels[place], costs)
            except DataError as error:
                line = f"{sample['__url__']}:{sample['__key__']}: {error}"
                if self.on_bad_sample == "raise":
                    raise DataError(line) from error
                weights[place], labels[place] = 0.0, 0
                pixels[place].zero_()
                skipped.append(line)
            decode_seconds += perf_counter() - decoding
        wall = perf_counter() - started
        read, damaged_tars = reader.take_account()
        read_seconds = read.total_seconds()
        for tier, num_bytes in read.num_bytes.items():
            costs[f"read_{tier}_bytes"] = num_bytes
            costs[f"read_{tier}_seconds"] = read.seconds[tier]
        costs |= {
            "worker": worker,
            "wall_seconds": wall,
            "read_seconds": read_seconds,
            "read_bytes": sum(read.num_bytes.values()),
            "decode_seconds": decode_seconds,
            "augment_seconds": wall - read_seconds - decode_seconds,
            "skipped": len(skipped),
        }
        return Batch(
            clips=pixels.flatten(0, 1).permute(0, 1, 4, 2, 3),
            labels=labels,
            weights=weights,
            sample_ids=torch.full((self.batch_clips,), -1),
            positions=torch.zeros(self.batch_clips, dtype=torch.int64),
            costs=costs,
            skipped=skipped + damaged_tars,
        )

    def _decode(self, sample: Sample, epoch: int, pixels: torch.Tensor, costs: dict[str, float]) -> None:
        form, content = _payload_of(sample)
        source = open_frames(form, MemoryPayload(content), self.clip.decoding)
        row = np.zeros(1, samples_dtype(1))[0]
        first = source.decode([0]).frames  # who packed the set has not said how large its pictures are
        row["height"], row["width"] = first.shape[1:3]
        generator = sample_generator(self.order.seed, epoch, zlib.crc32(sample["__key__"].encode()))
        views = self.clip.views(row, source.num_frames, generator)
        decoded, _ = decode_views(source, views, pixels, lambda _stage: None)
        augment(pixels[0].numpy(), self.clip, generator)
        costs["decoded_bytes"] += decoded.frames.nbytes
        costs["frames_decoded"] += decoded.frames_decoded + 1
        costs["frames_used"] += len(decoded.frames)


class StreamLoader:
    """Endless training batches of one rank, as `ClipLoader` gives them but for what this module's docstring says.

    Args:
        urls: paths or URLs of the tars, with webdataset's brace notation. A sample is a video (or a frames file of
            `reelscale pack`) and KEY.cls, a label's number or name.
        classes: names of the classes, in the order of the labels.
        shuffle_samples: samples that each worker keeps encoded in memory, to mix them.

    Raises ValueError where there are fewer tars than readers, the batch does not divide, or a URL's kind is unknown or
    its package is not installed.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        classes: Sequence[str],
        clip: ClipConfig,
        global_batch_clips: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        num_workers: int = 2,
        shuffle_samples: int = 100,
        seed: int = 0,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        storage: StorageConfig | None = None,
    ) -> None:
        tars, readers = expand_tars(urls), world_size * max(num_workers, 1)
        if len(tars) < readers:
            raise ValueError(
                f"{len(tars)} tars cannot be dealt to {world_size} ranks x {max(num_workers, 1)} workers: use fewer "
                "workers, or pack the set with `reelscale pack`, which needs no tar for each"
            )
        for root in {url.rpartition("/")[0] for url in tars if is_url(url)}:
            check_url(root)
        if clip.flip_label_pairs:
            raise ValueError("stream mode does not change labels (clip.flip_label_pairs): pack the set")
        self._plan = (global_batch_clips, rank, world_size, micro_batches)
        self._num_workers = num_workers
        self._made = {
            "order": ShardOrder(urls=tars, seed=seed, num_readers=readers, shuffle_samples=shuffle_samples),
            "classes": tuple(classes),
            "clip": clip,
            "batch_clips": rank_positions(0, *self._plan).shape[1],
            "rank": rank,
            "num_workers": max(num_workers, 1),
            "on_bad_sample": on_bad_sample,
            "storage": storage or StorageConfig(),
        }
        self._stream: Iterator[Batch | Failure] | None = None
        self._next_batch = 0

    def batches(self, start_position: int, stop_position: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batches from `start_position` to `stop_position`.

        Where the last stream of this loader has ended the next goes on at once; at any other position it replays.

        Raises:
            ValueError: the positions are not whole global batches.
            DataError: a bad sample or tar with on_bad_sample="raise", named.
            OSError: a tar cannot be read, named.
        """
        global_batch, _, _, micro_batches = self._plan
        if start_position < 0 or start_position % global_batch or stop_position % global_batch:
            raise ValueError(
                f"positions {start_position} to {stop_position} are not whole global batches of {global_batch} clips"
            )
        first = start_position // global_batch * micro_batches
        return self._deliver(first, stop_position // global_batch * micro_batches)

    def close(self) -> None:
        """End the worker processes."""
        self._stream = None

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def _deliver(self, first: int, stop: int) -> Iterator[Batch]:
        if self._stream is None or self._next_batch != first:
            self._stream, self._next_batch = self._start(first), first
        global_batch, rank, world_size, micro_batches = self._plan
        while self._next_batch < stop:
            batch = next(self._stream)
            if isinstance(batch, Failure):
                self._stream = None
                raise batch.to_error()
            number, micro_batch = divmod(self._next_batch, micro_batches)
            positions = rank_positions(number * global_batch, global_batch, rank, world_size, micro_batches)
            batch.positions.copy_(torch.as_tensor(positions[micro_batch]))
            self._next_batch += 1
            yield batch

    def _start(self, first_batch: int) -> Iterator[Batch | Failure]:
        workers = self._num_workers
        options: dict[str, Any] = {}
        if workers:
            options = {"multiprocessing_context": worker_context(), "worker_init_fn": guard_process}
        dataset = _BatchStream(first_batch=first_batch, **self._made)
        return iter(DataLoader(dataset, batch_size=None, num_workers=workers, generator=torch.Generator(), **options))


def _payload_of(sample: Sample) -> tuple[Form, bytes]:
    """The member to decode; DataError where there is none."""
    for name in sorted(name for name in sample if not name.startswith("__")):
        suffix = "." + name.rpartition(".")[2]
        if suffix in VIDEO_SUFFIXES:
            return "video", sample[name]
        if suffix == SUFFIX:
            return FramesFile(MemoryPayload(sample[name])).table.codec, sample[name]
    members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
    raise DataError(f"no video among its members ({members})")


def _label_of(sample: Sample, classes: Sequence[str]) -> int:
    """From KEY.cls: a number, or the name of a class."""
    if "cls" not in sample:
        raise DataError("it has no label (no member .cls)")
    text = bytes(sample["cls"]).decode(errors="replace").strip()
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise DataError(f"its label (.cls) is {text!r:.60}, neither a class nor 0 to {len(classes) - 1}")
