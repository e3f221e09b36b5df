"""A set behind a server that answers late: what read-ahead and the node's cache give back of a local folder's speed.

    .venv/bin/python -m benchmarks.remote_reading ../shared/data/tennis7 --latency-milliseconds 25 --markdown

The server is Python's own on loopback, in a process of its own, and waits before each answer as a far object store
does; all rows of a form read the same set in the same order with one worker process, one after the other in one run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Literal

from data_shards.clips import ClipConfig
from data_shards.forms.encoding import EncodingConfig
from data_shards.loader import ClipLoader, LoaderConfig
from data_shards.manifest import Manifest, open_manifest
from data_shards.pack import PackConfig, pack
from data_shards.storage import StorageConfig, below
from tests.data_shards.servers import Fault, serving

BATCH = 8
COLUMNS = ("form", "read from", "clips/s", "waits to read, ms/clip", "decodes, ms/clip", "KB/clip network", "cache")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="class folders, or a folder with labels.csv")
    parser.add_argument("--latency-milliseconds", type=float, default=25.0)
    parser.add_argument("--num-clips", type=int, default=160, help="clips that each row reads")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for form in ("mp4", "jpeg") for row in measure_form(Path(folder), form, options)]
    widths = [max(len(line[column]) for line in (COLUMNS, *rows)) for column in range(len(COLUMNS))]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (COLUMNS, *rows)]
    if options.markdown:
        lines.insert(1, ["-" * width for width in widths])
    print("\n".join(f"| {' | '.join(line)} |" if options.markdown else "  ".join(line) for line in lines))


def measure_form(folder: Path, form: Literal["mp4", "jpeg"], options: argparse.Namespace) -> list[tuple[str, ...]]:
    """The rows of one form."""
    packed = folder / form
    encoding = EncodingConfig(store_as=form)
    pack(PackConfig(source=options.source, destination=packed, val_fraction=0.0, encoding=encoding))
    cache = StorageConfig(cache_folder=folder / f"cache-{form}")
    with served(packed, options.latency_milliseconds / 1000) as url:
        return [(form, *row) for row in measure_places(packed, url, cache, options.num_clips)]


def measure_places(packed: Path, url: str, cache: StorageConfig, num_clips: int) -> list[tuple[str, ...]]:
    """A row for each way to read the same set."""
    places = {
        "folder": (str(packed), StorageConfig()),
        "http, no read-ahead": (url, StorageConfig(read_ahead="off")),
        "http": (url, StorageConfig()),
        "http, cache empty at first": (url, cache),
        "http, cache full": (url, cache),
    }
    rows = []
    for name, (root, config) in places.items():
        manifest = open_manifest(below(root, "train"), storage=config)
        rows.append((name, *measure(manifest, num_clips)))
    return rows


def measure(manifest: Manifest, num_clips: int) -> tuple[str, ...]:
    """Clips a second of one worker, and what a clip cost, after a first batch."""
    costs: dict[str, float] = {}
    loader = LoaderConfig(num_workers=1)
    with ClipLoader(manifest, clip=ClipConfig(), loader=loader, training=True, global_batch_clips=BATCH) as made:
        batches = made.batches(0, BATCH + num_clips // BATCH * BATCH)
        next(batches)
        started = perf_counter()
        for batch in batches:
            for name, value in batch.costs.items():
                costs[name] = costs.get(name, 0.0) + value
        seconds = perf_counter() - started
    count = num_clips // BATCH * BATCH
    return (
        f"{count / seconds:.1f}",
        f"{costs['read_seconds'] / count * 1e3:.1f}",
        f"{costs['decode_seconds'] / count * 1e3:.1f}",
        f"{costs['read_remote_bytes'] / count / 1e3:.0f}",
        f"{costs['read_cache_bytes'] / count / 1e3:.0f}",
    )


@contextmanager
def served(folder: Path, latency_seconds: float) -> Iterator[str]:
    """URL of a server of the folder, in its own process."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder, latency_seconds, there))
    server.start()
    try:
        yield here.recv()
    finally:
        here.send("stop")
        server.join()


def _serve(folder: Path, latency_seconds: float, parent: Connection) -> None:
    with serving(folder) as files:
        files.fault_of = lambda path, _number: Fault("slow", seconds=latency_seconds) if path.endswith(".tar") else None
        parent.send(files.url)
        parent.recv()


if __name__ == "__main__":
    main()
