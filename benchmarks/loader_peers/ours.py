"""This project's loader, and the limit: the same decoding and framing in as many processes, with no pipeline at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.loader_peers.work import BATCH_CLIPS, CROP_SIZE, NUM_FRAMES, PREFETCH_BATCHES, Place, Stream
from data_shards.clips import ClipConfig, decode_views
from data_shards.forms.opening import open_frames
from data_shards.forms.payload import MemoryPayload
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import open_manifest
from data_shards.order import sample_at
from data_shards.reading import ShardReader
from data_shards.sampling import sample_generator

CLIP = ClipConfig(num_segments=NUM_FRAMES, crop_size=CROP_SIZE)
_ENDLESS = 10**9 // BATCH_CLIPS * BATCH_CLIPS


@contextmanager
def ours(place: Place, workers: int, position: int = 0) -> Iterator[Stream]:
    """`ClipLoader` with its defaults."""
    config = LoaderConfig(num_workers=workers)
    manifest = open_manifest(place.shards)
    with ClipLoader(manifest, clip=CLIP, loader=config, training=True, global_batch_clips=BATCH_CLIPS) as loader:
        yield loader.batches(position, _ENDLESS)


def limit(place: Place, workers: int, seconds: float) -> tuple[float, float]:
    """Clips/s, and processor seconds a clip, of `workers` processes that do nothing but decode and frame.

    The payloads are in their memory before. The clips are those that the loader makes, batch by batch in turns, after
    those that its warming takes.
    """
    context = get_context("forkserver")
    ends = [context.Pipe() for _ in range(workers)]
    processes = [
        context.Process(target=_loop, args=(place.shards, number, workers, ends[number][1]))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for connection, _ in ends:
        connection.recv()  # warm
    start = time.monotonic() + 0.05
    for connection, _ in ends:
        connection.send((start, start + seconds))
    clips, rates, cpu_seconds = zip(*(connection.recv() for connection, _ in ends), strict=True)
    for process in processes:
        process.join()
    return sum(rates), sum(cpu_seconds) / sum(clips)


def _loop(shards: Path, number: int, workers: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    manifest = open_manifest(shards)
    with ShardReader(manifest) as reader:
        payloads = [reader.open(sample_id).whole() for sample_id in range(len(manifest))]
    pixels = torch.empty(CLIP.sample_shape(training=True), dtype=torch.uint8)

    def make(turn: int) -> None:
        batch, place = divmod(turn, BATCH_CLIPS)
        position = ((PREFETCH_BATCHES + batch) * workers + number) * BATCH_CLIPS + place
        sample_id = int(sample_at(position, seed=0, num_samples=len(manifest)))
        row = manifest.samples[sample_id]
        payload = MemoryPayload(payloads[sample_id])
        payload.num_frames = int(row["num_frames"])
        source = open_frames(manifest.form, payload, CLIP.decoding)
        views = CLIP.views(row, source.num_frames, sample_generator(0, position // len(manifest), sample_id))
        decode_views(source, views, pixels, lambda _stage: None)

    for turn in range(4):  # again below: what is timed begins where the loader's timed part does
        make(turn)
    connection.send("warm")
    start, stop = connection.recv()
    time.sleep(max(start - time.monotonic(), 0))
    started, cpu_started, done = time.monotonic(), time.process_time(), 0
    while time.monotonic() < stop:
        make(done)
        done += 1
    connection.send((done, done / (time.monotonic() - started), time.process_time() - cpu_started))
