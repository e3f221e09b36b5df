"""What the whole training loop costs at world size 1, against the same steps written by hand.

`dist_train.loop.train` runs with its ledger on, and after each of its steps, in the callback that it offers, one step
of a bare PyTorch loop runs on the same batch with a second copy of the same model. So the two take turns step by step.
A pair is a block of steps that ends with the loop's own logging (the ledger's file written, the loss fetched).
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.pairs import Ratio
from benchmarks.small_run import LOG_EVERY_STEPS, random_batch, small_model, small_optimizer, small_run
from data_shards.batch import Batch
from dist_train.ledger import Ledger
from dist_train.loop import train
from dist_train.tasks.clip_input import normalize


def loop_against_bare(*, pairs: int, clips: int = 16, size: int = 56, width: int = 16) -> tuple[Ratio, float]:
    """The ratio of the loop's time to the bare loop's, and milliseconds of a bare step."""
    torch.manual_seed(0)
    batch = random_batch(clips, size=size)
    turns = _Turns(batch, width)
    num_steps = LOG_EVERY_STEPS * (pairs + 1) + 1  # the first block is warm-up
    with tempfile.TemporaryDirectory() as name:
        ledger = Ledger(Path(name) / "rank_00000.jsonl", identity={"rank": 0})
        train(
            small_run(batch, num_steps=num_steps, width=width, ledger=ledger, folder=Path(name), on_step=turns.on_step)
        )
        ledger.end("ok")
    blocks = [slice(start, start + LOG_EVERY_STEPS) for start in range(LOG_EVERY_STEPS, num_steps - 1, LOG_EVERY_STEPS)]
    bare = [sum(turns.bare[block]) for block in blocks]
    ratio = Ratio.of([sum(turns.loop[block]) for block in blocks], bare)
    return ratio, sorted(bare)[len(bare) // 2] / LOG_EVERY_STEPS * 1e3


@dataclass
class _Turns:
    """Takes the time of the loop between two callbacks, and of a bare step inside each."""

    batch: Batch
    width: int
    loop: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._model = small_model(self.width).train()
        self._optimizer = small_optimizer(self._model)
        self._resumed: float | None = None

    def on_step(self, step: int) -> None:  # noqa: ARG002
        """The loop has finished a step: note it, and run a bare one."""
        begun = time.perf_counter()
        if self._resumed is not None:
            self.loop.append(begun - self._resumed)
        self._bare_step()
        self._resumed = time.perf_counter()
        if len(self.loop) > len(self.bare):
            self.bare.append(self._resumed - begun)

    def _bare_step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self._model(normalize(self.batch.clips)), self.batch.labels)
        loss.backward()
        self._optimizer.step()
