"""What the ledger costs, measured in two ways in one process.

    .venv/bin/python -m benchmarks.ledger --rounds 15

1. Replay: every call that a training step makes on the ledger is noted once, then played on a real ledger ten thousand
   steps long, flushes and files included: microseconds a step, against the step's own time. Not disturbed by noise.
2. Pairs: the same steps with the ledger and without it, turn by turn: the median ratio of wall and of CPU seconds with
   its quartiles, which on a noisy machine are wider than what is measured.

The work is the demo's: TSM on a ResNet-18 of width 16, 32 clips of 8 x 56 x 56, a flush every 5 steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_shards.batch import Batch
from dist_train.checkpoint import CheckpointConfig
from dist_train.collectives import Collectives
from dist_train.ledger import Ledger, NullLedger
from dist_train.ledger.recorder import Recorder
from dist_train.loop import Run, TrainingConfig, train
from dist_train.optimizers import SGDConfig, make_sgd
from dist_train.schedules import ScheduleConfig
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.tasks.video_classification import VideoClassification
from dist_train.world import World
from models.video import tsm_resnet18

BATCH_CLIPS, STEPS = 32, 10


class OneBatch:
    """Hands out the same batch again and again: no reading, no decoding, nothing to wait for."""

    num_samples = BATCH_CLIPS * STEPS

    def __init__(self) -> None:
        clips = torch.randint(0, 256, (BATCH_CLIPS, 8, 56, 56, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        ids = torch.arange(BATCH_CLIPS)
        self._batch = Batch(
            clips=clips,
            labels=ids % 10,
            weights=torch.ones(BATCH_CLIPS),
            sample_ids=ids,
            positions=ids,
            costs={},
            skipped=[],
        )

    def batches(self, start_position: int, stop_position: int) -> Iterator[Batch]:
        """A batch for each step."""
        for _ in range(start_position, stop_position, BATCH_CLIPS):
            yield self._batch

    def evaluation_batches(self) -> Iterator[Batch]:
        """The same batch, once."""
        yield self._batch

    def close(self) -> None:
        """Nothing to close."""


def run_steps(ledger: Recorder, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `STEPS` steps."""
    torch.manual_seed(0)
    model = tsm_resnet18(num_classes=10, width=16, dropout=0.0).to(memory_format=torch.channels_last)
    collectives = Collectives(World(), ledger)
    begun: list[tuple[float, float]] = []
    ended: list[tuple[float, float]] = []

    def on_step(step: int) -> None:
        now = (time.perf_counter(), time.process_time())
        (begun if step == 1 else ended).append(now)

    train(
        Run(
            task=VideoClassification(model, make_sgd(SGDConfig(), model, learning_rate=0.01)),
            loader=OneBatch(),
            evaluation_loader=OneBatch(),
            collectives=collectives,
            strategy=make_strategy(ExchangeConfig(), collectives),
            ledger=ledger,
            journal=None,
            monitors=(),
            run_dir=folder,
            attempt=0,
            training=TrainingConfig(
                batch_clips=BATCH_CLIPS, epochs=1, evaluate_every_epochs=0, log_every_steps=5, batch_norm="local"
            ),
            schedule=ScheduleConfig(),
            warmup_start_factor=1.0,
            checkpoint=CheckpointConfig(every_epochs=0),
            checkpoint_meta={},
            evaluation_split="none",
            on_step=on_step,
        )
    )
    return ended[-1][0] - begun[0][0], ended[-1][1] - begun[0][1]


class Notes:
    """Notes every call on a ledger, to be played again."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if name in ("row", "waiting"):
                return self._block()
            return [] if name == "flush" else None

        return note

    @contextmanager
    def _block(self) -> Iterator[None]:
        self.calls.append(("enter", (), {}))
        yield
        self.calls.append(("leave", (), {}))


def microseconds_a_step(folder: Path, *, times: int) -> float:
    """Plays the noted calls of a run of `STEPS` steps on a real ledger `times` times."""
    notes = Notes()
    run_steps(notes, folder)
    first = next(index for index, call in enumerate(notes.calls) if call[0] == "training_begins")
    last = max(index for index, call in enumerate(notes.calls) if call[0] == "close_span" and call[1] == ("step",))
    calls = notes.calls[first + 1 : last + 1]
    ledger = Ledger(folder / "replay.jsonl", identity={"rank": 0})
    begun = time.perf_counter()
    for _ in range(times):
        blocks: list[Any] = []
        for name, args, kwargs in calls:
            if name in ("row", "waiting"):
                blocks.append(getattr(ledger, name)(*args, **kwargs))
            elif name == "enter":
                blocks[-1].__enter__()
            elif name == "leave":
                blocks.pop().__exit__(None, None, None)
            elif name == "flush":
                ledger.flush()
            else:
                getattr(ledger, name)(*args, **kwargs)
        ledger.flush()
    spent = time.perf_counter() - begun
    ledger.end("ok")
    return spent / times / STEPS * 1e6


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs")
    rounds = parser.parse_args().rounds
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_steps(NullLedger(), folder)  # the first run pays for what is only paid once
        replay = microseconds_a_step(folder, times=1000)
        step = run_steps(NullLedger(), folder)[0] / (STEPS - 1)
        print(f"replay: {replay:.0f} us a step of {step * 1e3:.0f} ms: {100 * replay / (step * 1e6):.3f} %")
        for number in range(rounds):
            times = {}
            for kind in ("on", "off") if number % 2 else ("off", "on"):
                ledger: Recorder = NullLedger()
                if kind == "on":
                    ledger = Ledger(folder / f"rank_{number}.jsonl", identity={"rank": 0})
                times[kind] = run_steps(ledger, folder)
                ledger.end("ok")
            pairs.append(times)
    for number, kind in enumerate(("wall", "CPU")):
        ratios = sorted(times["on"][number] / times["off"][number] for times in pairs)
        quarters = statistics.quantiles(ratios, n=4)
        print(
            f"{kind}: with the ledger / without = {statistics.median(ratios):.4f} "
            f"(quartiles {quarters[0]:.4f} to {quarters[2]:.4f}, {rounds} pairs of {STEPS - 1} steps)"
        )


if __name__ == "__main__":
    main()
