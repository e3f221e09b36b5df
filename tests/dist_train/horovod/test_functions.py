"""States and objects from rank to rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dist_train.horovod as hvd
from tests.dist_train.horovod.test_optimizer import ranks

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, betas=(0.8, 0.9), amsgrad=True),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


def broadcast_states(wrapped: bool) -> None:
    for kind, make in OPTIMIZERS.items():
        torch.manual_seed(hvd.rank())
        model = nn.Linear(3, 2)
        optimizer: Any = make(model.parameters())
        if wrapped:
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
        if wrapped or hvd.rank() == 1:  # else a resumed root and ranks that start afresh
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        if hvd.rank() == 1:
            optimizer.param_groups[0]["lr"] = 0.7
        hvd.broadcast_parameters(model.state_dict(), root_rank=1)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        hvd.broadcast_optimizer_state(optimizer, root_rank=1)
        assert optimizer.param_groups[0]["lr"] == 0.7
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)), (
            f"{kind}: a step was made"
        )
        states = hvd.allgather_object((optimizer.state_dict(), model.state_dict()))
        torch.testing.assert_close(*states, rtol=0, atol=0, msg=kind)


@pytest.mark.parametrize("wrapped", [True, False])
def test_every_optimizers_state_and_options_become_those_of_the_root(wrapped):
    ranks(broadcast_states, 2, wrapped)


def broadcast_the_rest() -> None:
    rank = hvd.rank()
    tensors = [("a", torch.full((2,), float(rank))), ("none", None), ("long", torch.full((), rank))]
    hvd.broadcast_parameters(tensors, root_rank=1)
    assert tensors[0][1].tolist() == [1, 1]
    assert tensors[2][1].item() == 1
    image = torch.arange(24.0).view(1, 2, 3, 4).add(rank).to(memory_format=torch.channels_last)
    hvd.broadcast_parameters({"image": image}, root_rank=2)
    assert image.flatten().tolist() == [value + 2.0 for value in range(24)]
    unnamed = [torch.full((2,), float(rank)) for _ in range(2)]
    hvd.broadcast_parameters(unnamed, root_rank=0)
    assert all(tensor.tolist() == [0, 0] for tensor in unnamed)
    fresh = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert not optimizer.state
    assert torch.equal(fresh.weight.grad, torch.zeros(2, 2))

    assert hvd.broadcast_object({"rank": rank, "list": [1, None]}, root_rank=1) == {"rank": 1, "list": [1, None]}
    assert hvd.broadcast_object("kept" if rank == 0 else None, name="named") == "kept"
    assert hvd.allgather_object(["x"] * (rank * 1000)) == [[], ["x"] * 1000, ["x"] * 2000]
    pair = hvd.add_process_set([1, 2])
    if pair.included():
        assert hvd.broadcast_object(rank, root_rank=2, process_set=pair) == 2
        assert hvd.allgather_object(rank, process_set=pair) == [1, 2]
        tensor = torch.full((2,), float(rank))
        hvd.broadcast_parameters({"a": tensor}, root_rank=1, process_set=pair)
        assert tensor.tolist() == [1, 1]


def test_parameters_and_objects_become_those_of_the_root():
    ranks(broadcast_the_rest, 3)


def test_what_cannot_be_broadcast_raises():
    with pytest.raises(ValueError, match="invalid params of type"):
        hvd.broadcast_parameters(nn.Linear(2, 2).parameters(), root_rank=0)
    with pytest.raises(ValueError, match=r"cannot broadcast torch\.optim\.LBFGS state"):
        hvd.broadcast_optimizer_state(torch.optim.LBFGS(nn.Linear(2, 2).parameters()), root_rank=0)


def test_the_compressors_cast_floating_point_only():
    for compressor, wire in ((hvd.Compression.fp16, torch.float16), (hvd.Compression.bf16, torch.bfloat16)):
        sent, context = compressor.compress(torch.ones(3, dtype=torch.float64))
        assert sent.dtype == wire
        assert compressor.decompress(sent, context).dtype == torch.float64
        integers, context = compressor.compress(torch.ones(3, dtype=torch.int32))
        assert compressor.decompress(integers, context).dtype == integers.dtype == torch.int32
