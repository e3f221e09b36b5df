"""Step time of the engine's strategies against PyTorch's DistributedDataParallel: the program of one rank.

`benchmarks.engine` starts it as two or four ranks. In the same processes every arm has its own copy of the same model
(TSM on a ResNet-50), trains on the same clips with the same optimizer, and takes turns with the baseline, a few steps
each, behind a barrier: a pair is a block of steps of the baseline and the block of the arm beside it. A block's time is
that of the slowest rank.

The baseline is DDP at its fastest (gradients as views of its buckets, no broadcast of buffers), without this project.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pairs import Ratio
from dist_train.collectives import Collectives
from dist_train.phases import Phase
from dist_train.placement import find_placement
from dist_train.rendezvous import make_world, process_group
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.world import World
from models.video import tsm_resnet18, tsm_resnet50

MODELS = {"tsm_resnet50": tsm_resnet50, "tsm_resnet18": tsm_resnet18}
SEGMENTS, CLASSES = 4, 10


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Something to be timed."""

    name: str
    exchange: dict[str, Any] | None = None
    """`ExchangeConfig`'s arguments; None: PyTorch's DDP by itself."""
    against: str = "DDP"
    """The arm that it is compared with."""
    pairs: int = 8
    micro_batches: int = 1
    """Parts in which a rank computes its clips."""
    exchange_each: bool = False
    """Exchange gradients after each part, as a loop without gradient accumulation does."""
    warm_up: int = 3
    """Steps before the clock runs; buckets are planned in the first, a threshold is tuned in some more."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every arm does in a step."""

    model: str = "tsm_resnet50"
    width: int = 32
    clips: int = 2
    """Of each rank."""
    size: int = 56
    """Height and width of a clip in pixels."""
    steps: int = 2
    """In a block."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An arm against its baseline: the ratios, and the medians behind them."""

    name: str
    against: str
    wall: Ratio
    cpu: Ratio
    """Processor time of all ranks, the transport's threads included; not the kernel's network stack."""
    step_ms: float
    baseline_ms: float
    megabytes: float
    """Of gradients."""

    @classmethod
    def load(cls, data: dict[str, Any]) -> Compared:
        """From `asdict`."""
        return cls(**{**data, "wall": Ratio(**data["wall"]), "cpu": Ratio(**data["cpu"])})


@dataclass
class _Blocks:
    """Seconds of this rank in the blocks of an arm and of its baseline beside them."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main() -> None:
    """Times the arms given as JSON and prints, on rank 0, what came out as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", required=True)
    parser.add_argument("--work", default="{}")
    arguments = parser.parse_args()
    arms = [Arm(**arm) for arm in json.loads(arguments.arms)]
    torch.set_num_threads(1)
    placement = find_placement(os.environ)
    world = make_world(placement, "cpu")
    with process_group(world, placement):
        compared = compare(arms, Work(**json.loads(arguments.work)), world)
        if world.is_first:
            print(json.dumps([asdict(arm) for arm in compared]))


def compare(arms: Sequence[Arm], work: Work, world: World) -> list[Compared]:
    """Every arm that has an `against`-arm other than itself, timed in turn with it. All ranks call it."""
    collectives = Collectives(world)
    steps = {arm.name: _make_step(arm, work, world) for arm in arms}
    for arm in arms:
        for _ in range(arm.warm_up):
            steps[arm.name]()
    turns = [(number, arm) for arm in arms if arm.name != arm.against for number in range(arm.pairs)]
    turns.sort(key=lambda turn: turn[0])  # each arm's pairs are spread over the whole run
    blocks: dict[str, tuple[_Blocks, _Blocks]] = {arm.name: (_Blocks(), _Blocks()) for _, arm in turns}
    for number, arm in turns:
        pair = [(steps[arm.name], blocks[arm.name][0]), (steps[arm.against], blocks[arm.name][1])]
        for step, noted in pair if number % 2 else reversed(pair):
            collectives.barrier()
            begun, used = time.perf_counter(), _processor_seconds()
            for _ in range(work.steps):
                step()
            noted.wall.append(time.perf_counter() - begun)
            noted.cpu.append(_processor_seconds() - used)
    megabytes = sum(p.numel() * p.element_size() for p in _make_model(work).parameters()) / 1e6
    compared = []
    for arm in arms:
        if arm.name not in blocks:
            continue
        ours, theirs = (_over_ranks(side, world) for side in blocks[arm.name])
        compared.append(
            Compared(
                name=arm.name,
                against=arm.against,
                wall=Ratio.of(ours.wall, theirs.wall),
                cpu=Ratio.of(ours.cpu, theirs.cpu),
                step_ms=_median(ours.wall) / work.steps * 1e3,
                baseline_ms=_median(theirs.wall) / work.steps * 1e3,
                megabytes=megabytes,
            )
        )
    return compared


def _make_step(arm: Arm, work: Work, world: World) -> Callable[[], None]:
    """A function that trains the arm's own model for one step."""
    model = _make_model(work)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(world.rank)
    clips = torch.randn(work.clips, SEGMENTS, 3, work.size, work.size, generator=generator)
    labels = torch.randint(CLASSES, (work.clips,), generator=generator)

    parts = list(zip(clips.chunk(arm.micro_batches), labels.chunk(arm.micro_batches), strict=True))
    exchanged = [arm.exchange_each or number == len(parts) for number in range(1, len(parts) + 1)]

    def loss_of(module: torch.nn.Module, part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(module(part[0]), part[1]) / len(parts)

    if arm.exchange is None:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)

        def step_of_ddp() -> None:
            optimizer.zero_grad(set_to_none=True)
            for part, exchange in zip(parts, exchanged, strict=True):
                with nullcontext() if exchange else wrapped.no_sync():
                    loss_of(wrapped, part).backward()
            optimizer.step()

        return step_of_ddp

    strategy = make_strategy(ExchangeConfig(**arm.exchange), Collectives(world))
    (phase,) = strategy.prepare([Phase(name="classify", module=model, optimizer=optimizer)])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part, exchange in zip(parts, exchanged, strict=True):
            with strategy.micro_batch(phase, synchronize=exchange):
                strategy.backward(phase, loss_of(phase.module, part))
        strategy.finish(phase)
        strategy.optimizer_step(phase)

    return step


def _make_model(work: Work) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[work.model](num_classes=CLASSES, width=work.width, num_segments=SEGMENTS, dropout=0.0)
    return model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # not in PyTorch's stubs


def _over_ranks(mine: _Blocks, world: World) -> _Blocks:
    """Wall time of the slowest rank and processor time of all, block by block."""
    every: list[Any] = [None] * world.world_size
    dist.all_gather_object(every, (mine.wall, mine.cpu))
    return _Blocks(
        wall=[max(block) for block in zip(*(wall for wall, _ in every), strict=True)],
        cpu=[sum(block) for block in zip(*(cpu for _, cpu in every), strict=True)],
    )


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _median(seconds: Sequence[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
