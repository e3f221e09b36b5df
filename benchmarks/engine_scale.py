"""The exchange of one rank among 1,536, on this machine: a process group that carries nothing (PyTorch's `fake`).

    python -m benchmarks.engine_scale --world-size 1536 --ranks-per-node 8 --exchange '{"bucket_megabytes": 25}'

Builds TSM on a ResNet-50, prepares the strategy `allreduce` as that rank, and runs some steps on a small clip with its
hooks. What is real: the plan of the buckets, their buffers, the groups, every call that a step makes, and so the
seconds and the memory of this rank. What is not: nothing is sent, and `KnownRanks` gives the other ranks' answers.
Bytes and rounds on the network are a ring's by formula; none of them was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import nn

from dist_train.collectives import Collectives
from dist_train.ledger.recorder import NullLedger
from dist_train.phases import Phase
from dist_train.strategies import ExchangeConfig, make_strategy
from dist_train.world import World
from models.video import tsm_resnet18, tsm_resnet50

MODELS = {"tsm_resnet18": tsm_resnet18, "tsm_resnet50": tsm_resnet50}
SEGMENTS, STEPS = 2, 5


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one rank does and holds."""

    world_size: int
    ranks_per_node: int
    exchange: dict[str, Any]
    gradient_megabytes: float
    buckets_megabytes: list[float]
    """Payload of each exchange of gradients that a step starts, in order."""
    node_megabytes: float
    """That a ring sends out of each node in a step."""
    rounds: int
    """That a bucket takes, one message after the other."""
    prepare_seconds: float
    """The groups made and the parameters hooked."""
    first_step_seconds: float
    """Backward and exchange: learns the order of the gradients, makes buckets and buffers."""
    exchange_milliseconds: float
    """Processor time that a step costs more with the exchange than without, the collectives taking none."""
    buffer_megabytes: float
    """Of tensors that the strategy keeps."""
    peak_megabytes: float
    """The process's resident memory at its highest."""


class KnownRanks(Collectives):
    """Collectives over a group that carries nothing: answers for the other ranks where objects are exchanged."""

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's item, where it is the rank's place; else this rank's, from everyone."""
        world = self.world
        if item == (world.node_rank, world.rank):
            return [(rank // world.local_world_size, rank) for rank in range(world.world_size)]
        return [item] * world.world_size

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0 says what this rank says."""
        return item


def main() -> None:
    """Runs one rank and prints what was seen as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=1536)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--exchange", default="{}", help="ExchangeConfig's arguments as JSON")
    parser.add_argument("--model", default="tsm_resnet50", choices=sorted(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seen = exchange_of_one_rank(
        world_size=arguments.world_size,
        ranks_per_node=arguments.ranks_per_node,
        exchange=json.loads(arguments.exchange),
        model=arguments.model,
    )
    print(json.dumps(asdict(seen)))


def exchange_of_one_rank(
    *,
    world_size: int,
    ranks_per_node: int,
    exchange: Mapping[str, Any],
    model: str = "tsm_resnet50",
) -> Seen:
    """Some steps of the last rank of a world that is not there.

    The last, because an all-gather of the group that carries nothing repeats the rank's own part: so the flags at the
    end of the last bucket are as it set them, and no bucket counts as one that has to be exchanged again. An all-to-all
    of that group leaves its output as it was; here it is given the rank's own part from everyone.
    """
    world = _last_rank(world_size, ranks_per_node)
    phase = _phase_of(model)
    module = phase.module
    clip = torch.randn(1, SEGMENTS, 3, 32, 32)
    dist.init_process_group("fake", store=dist.HashStore(), rank=world.rank, world_size=world_size)
    answering = mock.patch.object(dist, "all_to_all_single", _own_part_from_everyone)
    answering.start()
    try:
        launched = _Launches()
        collectives = KnownRanks(world, launched)
        before = _tensors_bytes()
        begun = time.perf_counter()
        config = ExchangeConfig(**exchange)
        strategy = make_strategy(config, collectives)
        (phase,) = strategy.prepare([phase])
        prepared = time.perf_counter() - begun

        def backward(*, exchange: bool) -> float:
            """Processor seconds of this process."""
            phase.optimizer.zero_grad(set_to_none=True)
            loss = phase.module(clip).sum()
            begun = time.process_time()
            if not exchange:
                loss.backward()
                return time.process_time() - begun
            launched.buckets.clear()
            with strategy.micro_batch(phase, synchronize=True):
                strategy.backward(phase, loss)
            strategy.finish(phase)
            return time.process_time() - begun

        begun = time.perf_counter()
        backward(exchange=True)
        planned = time.perf_counter() - begun
        with_exchange, without = zip(
            *((backward(exchange=True), backward(exchange=False)) for _ in range(STEPS)), strict=True
        )
        phase.optimizer.zero_grad(set_to_none=True)
        kept = _tensors_bytes() - before
        strategy.close()
    finally:
        answering.stop()
        dist.destroy_process_group()
    gradients = sum(p.numel() * p.element_size() for p in module.parameters()) / 1e6
    nodes = world.num_nodes if config.hierarchical == "on" else world_size
    within = ranks_per_node if config.hierarchical == "on" else 1
    return Seen(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        exchange=dict(exchange),
        gradient_megabytes=gradients,
        buckets_megabytes=[num_bytes / 1e6 for num_bytes in launched.buckets],
        node_megabytes=2 * (nodes - 1) / nodes * gradients,
        rounds=2 * (nodes - 1) + 2 * (within - 1),
        prepare_seconds=prepared,
        first_step_seconds=planned,
        exchange_milliseconds=(min(with_exchange) - min(without)) * 1e3,
        buffer_megabytes=kept / 1e6,
        peak_megabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    )


def _last_rank(world_size: int, ranks_per_node: int) -> World:
    rank = world_size - 1
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=rank % ranks_per_node,
        local_world_size=ranks_per_node,
        node_rank=rank // ranks_per_node,
        num_nodes=world_size // ranks_per_node,
    )


def _phase_of(model: str) -> Phase:
    """The phase that trains `model`, the same weights on every call."""
    torch.manual_seed(0)
    module: nn.Module = MODELS[model](num_classes=400, num_segments=SEGMENTS).train()
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in PyTorch's stubs
    return Phase(name="classify", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


class _Launches(NullLedger):
    """Notes the bytes of the buckets that leave."""

    def __init__(self) -> None:
        self.buckets: list[int] = []

    def launch(self, name: str, **facts: Any) -> None:
        """See `Recorder`."""
        if "bucket" in name:
            self.buckets.append(facts["num_bytes"])


def _own_part_from_everyone(output: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """`[n, ...]` for n ranks."""
    output.copy_(tensor[group.rank()].expand_as(output))


def _tensors_bytes() -> int:
    """Of all tensors that are alive in this process; a memory that several share counts once."""
    gc.collect()
    found = (item for item in gc.get_objects() if issubclass(type(item), torch.Tensor))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


if __name__ == "__main__":
    main()
