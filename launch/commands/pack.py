"""`reelscale pack SRC DST`: videos or images to WebDataset shards with a manifest."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_shards.durable import beside
from data_shards.forms.encoding import EncodingConfig
from data_shards.pack import PackConfig, PackProgress, PackResult, pack, read_config_source
from data_shards.parallel import num_usable_cpus
from launch.console import ProgressLine
from launch.parsing import parse

logger = logging.getLogger(__name__)

_PLAN_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Encoding(EncodingConfig):
    """In which form samples are stored."""

    store_as: Annotated[Literal["mp4", "jpeg", "raw"], tyro.conf.arg(name="as")] = "mp4"
    """A video file (untouched unless short_side, gop or crf is given), or frames with an offset table, each a JPEG
    picture or uint8 RGB."""


@dataclass(frozen=True, kw_only=True)
class Pack(PackConfig):
    """Packs labelled videos or images into shards that any WebDataset reader opens; run it again to go on."""

    source: Annotated[Path, tyro.conf.Positional]
    """Class folders, a CSV or a folder with labels.csv, TSN lists, WebDataset tars, MNIST's idx files, pictures."""
    destination: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist yet. What is not finished is in DST.partial: the same command goes on."""
    encoding: Annotated[Encoding, tyro.conf.arg(name="")] = field(default_factory=Encoding)
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write nothing: measure each form on a few samples, print what it costs and which one to take."""
    cores: int = 0
    """For --plan: processor cores that will decode, of all nodes together; 0: those of this machine."""
    storage_megabytes_per_second: float | None = None
    """For --plan: what the storage gives to all readers together."""
    target_clips_per_second: float | None = None
    """For --plan: clips that the training takes."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    command = parse(Pack, arguments, program="reelscale pack")
    encoding = EncodingConfig(**_fields(command.encoding, EncodingConfig))
    config = PackConfig(**_fields(command, PackConfig) | {"encoding": encoding})
    if command.plan:
        return _plan(command, config)
    try:
        with _sigterm_as_interrupt(), ProgressLine("packing", unit="samples") as line:
            result = pack(config, progress=_Rate(line))
    except KeyboardInterrupt as stop:
        partial = beside(config.destination, ".partial")
        kept = f"finished shards are kept in {partial}, the same command goes on from there"
        sys.stderr.write(f"stopped; {kept if partial.exists() else 'no shard was begun'}\n")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    for warning in result.warnings:
        logger.warning("%s", warning)
    sys.stdout.write(_summary(result))
    return 0


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """In the block SIGTERM, which schedulers send, ends the work as Ctrl-C does: KeyboardInterrupt(SIGTERM)."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would only disturb the tidying up
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fields(command: Any, kind: type) -> dict[str, Any]:
    """The fields of `command` that `kind` has too."""
    return {item.name: getattr(command, item.name) for item in dataclasses.fields(kind)}


class _Rate:
    """Shows how far it is, with samples and megabytes a second since the start."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self._started = time.monotonic()

    def __call__(self, at: PackProgress) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate, megabytes = (at.done - at.earlier) / seconds, at.num_bytes / 1e6 / seconds
        self._line.annotate(f"{rate:,.1f}/s {megabytes:,.1f} MB/s")
        self._line.update(at.done, at.total)


def _plan(command: Pack, config: PackConfig) -> int:
    """Measures the forms and prints the table."""
    from data_shards.forms.plan_table import describe_plan  # these import PyTorch, for the transforms
    from data_shards.forms.planning import Needs, plan_forms

    needs = Needs(
        cores=command.cores or num_usable_cpus(),
        storage_megabytes_per_second=command.storage_megabytes_per_second,
        target_clips_per_second=command.target_clips_per_second,
    )
    source = read_config_source(config)
    count = min(_PLAN_SAMPLES, len(source.samples))
    chosen = [source.samples[place * len(source.samples) // count].content.read for place in range(count)]
    with ProgressLine("measuring", unit="samples") as line:
        plan = plan_forms(
            chosen, encoding=config.encoding, needs=needs, num_samples=len(source.samples), progress=line.update
        )
    sys.stdout.write(describe_plan(plan))
    return 0


def _summary(result: PackResult) -> str:
    classes = len(result.classes)
    lines = [f"{result.destination}: {classes:,} {'class' if classes == 1 else 'classes'}"]
    for name, split in result.splits.items():
        lines.append(
            f"  {name:<6} {split.num_samples:>9,} {result.unit}  {split.num_shards:>6,} "
            f"{'shard' if split.num_shards == 1 else 'shards'}  "
            f"{split.num_bytes / 1e6:>10,.1f} MB"
        )
    if result.rejected:
        listed = result.destination / "rejected.csv"
        lines.append(f"  left out: {len(result.rejected):,} {result.unit}, listed in {listed}")
    return "\n".join(lines) + "\n"
