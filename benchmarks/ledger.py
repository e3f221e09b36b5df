"""What the ledger costs, measured in three ways in one process.

    .venv/bin/python -m benchmarks.ledger --rounds 15

1. Replay: every call that a training step makes on the ledger is noted once, then played on a real ledger ten thousand
   steps long, flushes and files included: microseconds a step, against the step's own time. Not disturbed by noise.
2. Collectives: a step's buckets launched, completed on another thread as Gloo does, waited for, compared with peers
   that cost nothing, summed and written: CPU microseconds a collective, 12 buckets a step and a flush every 10 steps.
3. Pairs: the same steps with the ledger and without it, turn by turn: the median ratio of wall and of CPU seconds with
   its quartiles, which on a noisy machine are wider than what is measured.

The work is the demo's: TSM on a ResNet-18 of width 16, 32 clips of 8 x 56 x 56, a flush every 5 steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.small_run import random_batch, small_run
from dist_train.ledger import Ledger, NullLedger
from dist_train.ledger.recorder import Recorder
from dist_train.loop import train

BATCH_CLIPS, STEPS = 32, 10


def run_steps(ledger: Recorder, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `STEPS` steps."""
    begun: list[tuple[float, float]] = []
    ended: list[tuple[float, float]] = []

    def on_step(step: int) -> None:
        now = (time.perf_counter(), time.process_time())
        (begun if step == 1 else ended).append(now)

    torch.manual_seed(0)
    batch = random_batch(BATCH_CLIPS, size=56)
    train(small_run(batch, num_steps=STEPS, width=16, ledger=ledger, folder=folder, on_step=on_step))
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


class NoDistance:
    """Peers that arrive when this rank does."""

    def first_and_last(self, moments: Sequence[float], channel: int) -> tuple[list[float], list[float]]:  # noqa: ARG002
        """The moments themselves."""
        return list(moments), list(moments)


def microseconds_a_collective(folder: Path, *, steps: int, num_buckets: int = 12, flush_every: int = 10) -> float:
    """What the accounts of one collective cost, from its launch to its line in the file."""
    ledger = Ledger(folder / "collectives.jsonl", identity={"rank": 0})
    ledger.training_begins()
    names = [f"main bucket {number}" for number in range(num_buckets)]
    sizes = {"op": "all_reduce", "num_bytes": 25_000_000, "sent_bytes": 37_500_000.0, "num_ranks": 4, "on_host": True}
    begun = time.process_time()
    for step in range(1, steps + 1):
        flights = []
        for name in names:
            future: torch.futures.Future[None] = torch.futures.Future()
            flight = ledger.launch(name, **sizes)
            assert flight is not None
            future.add_done_callback(flight.finish)
            future.set_result(None)
            flights.append(flight)
        for flight in flights:
            with ledger.waiting(flight):
                pass
        ledger.close_span("step", step=step, clips_seen=step)
        if step % flush_every == 0:
            ledger.flush(NoDistance())
    spent = time.process_time() - begun
    ledger.end("ok")
    return spent / steps / num_buckets * 1e6


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
        each = microseconds_a_collective(folder, steps=2000)
        print(f"collectives: {each:.0f} us each: {100 * 12 * each / (step * 1e6):.3f} % of that step with 12 of them")
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
