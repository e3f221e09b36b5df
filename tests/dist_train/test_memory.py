"""The estimate of memory agrees with what the allocator hands out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.memory import ModelSize, activation_bytes, footprint
from dist_train.phases import Phase
from dist_train.recompute import apply_recomputation
from dist_train.strategies import STRATEGIES, ExchangeConfig, make_strategy
from dist_train.tasks.video_classification import VideoClassification
from models.video import build
from tests.dist_train.sharded import BlockModel
from tests.ranks import run_ranks


def _allocator_peak(prof) -> int:
    now = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _activations(device: str, mode: str) -> tuple[int, int]:
    """As `activation_bytes` counts them, and as PyTorch's allocator saw them."""
    with torch.device(device):
        model = apply_recomputation(build("tsm_resnet18", num_classes=10, num_segments=4, width=16), mode)
        task = VideoClassification(model, torch.optim.SGD(model.parameters(), lr=0.1))
        batch = SimpleNamespace(
            clips=torch.zeros(4, 4, 3, 64, 64, dtype=torch.uint8),
            labels=torch.zeros(4, dtype=torch.long),
            weights=torch.ones(4),
        )
        activation_bytes(task, batch)  # what is made once (the mean and the standard deviation) is not counted again
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            counted = activation_bytes(task, batch)
    return counted, _allocator_peak(prof)


@pytest.mark.parametrize("mode", ["off", "blocks"])
def test_activations_counted_on_meta_are_within_a_tenth_of_what_a_cpu_allocates(mode):
    on_meta, _ = _activations("meta", mode)
    on_cpu, allocated = _activations("cpu", mode)
    assert on_meta == on_cpu
    assert on_meta == pytest.approx(allocated, rel=0.1)


def test_activation_checkpointing_takes_a_third_of_the_memory_of_a_deep_network():
    plain, recomputed = (_count("tsm_resnet50", mode, size=112) for mode in ("off", "blocks"))
    assert recomputed < 0.35 * plain


def _count(name: str, mode: str, *, size: int) -> int:
    with torch.device("meta"):
        model = apply_recomputation(build(name, num_classes=4, num_segments=4), mode)
        task = VideoClassification(model, torch.optim.SGD(model.parameters(), lr=0.1))
        labels = torch.zeros(2, dtype=torch.long)
        clips = torch.zeros(2, 4, 3, size, size, dtype=torch.uint8)
        return activation_bytes(task, SimpleNamespace(clips=clips, labels=labels, weights=torch.ones(2)))


def test_sharded_strategies_keep_less_the_more_processes_there_are():
    size = ModelSize(trainable=1_000_000, fixed=1000, unit=100_000)

    def total(strategy, world_size):
        return footprint(strategy, size, world_size=world_size, bucket_bytes=50_000, optimizer_copies=2).total

    assert total("allreduce", 8) == pytest.approx(5_001_000)  # weights, gradients, two moments, buckets
    assert total("ddp", 8) == total("ddp", 2) == pytest.approx(4_001_000)
    for strategy in ("fsdp2", "zero1", "zero2", "zero3"):
        assert total(strategy, 64) < total(strategy, 8) < total(strategy, 4) < total("allreduce", 4)
    assert total("fsdp2", 64) < 500_000
    assert {total(strategy, 1) for strategy in STRATEGIES} == {4_001_000}


def _resident(world, strategy):
    """Bytes that a strategy's step leaves allocated, and the most it had at any time, beyond the plain model."""
    model = BlockModel(width=48)
    phase = Phase(name="p", module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    size = {"bucket_megabytes": 0.05} if strategy == "allreduce" else {}  # fsdp2 has no buckets
    strategy = make_strategy(ExchangeConfig(strategy=strategy, **size), _collectives(world))
    size = ModelSize.of(model)
    (phase,) = strategy.prepare([phase])
    inputs = torch.randn(1, 1, 3, 8, 8)

    def step() -> None:
        phase.optimizer.zero_grad()
        with strategy.micro_batch(phase, synchronize=True):
            strategy.backward(phase, phase.module(inputs).square().mean())
        strategy.finish(phase)
        strategy.optimizer_step(phase)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    return _allocator_peak(prof), size


def _collectives(world):
    from dist_train.collectives import Collectives

    return Collectives(world)


@pytest.mark.parametrize("strategy", ["allreduce", "fsdp2"])
def test_what_a_step_allocates_beside_the_state_is_within_the_estimate(strategy):
    """Gradients and what is gathered come and go in a step; weights, momenta and buckets are there before it."""
    peak, size = run_ranks(_resident, 2, strategy)[0]
    kept = footprint(strategy, size, world_size=2, bucket_bytes=50_000)
    comes_and_goes = kept.gradients + (kept.exchange + 2 * size.unit if strategy == "fsdp2" else 0)
    assert 0.4 * comes_and_goes < peak < 1.5 * comes_and_goes
