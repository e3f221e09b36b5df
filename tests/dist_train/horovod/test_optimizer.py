"""DistributedOptimizer: ranks that share a batch step like one process with the whole batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dist_train.horovod as hvd
from dist_train.horovod.basics import leave_world
from dist_train.world import World
from tests.ranks import run_ranks

BATCH = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))


def ranks(check: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Runs `check(*args)` on ranks where Horovod is initialised."""
    return run_ranks(_within, world_size, check, args)


def _within(world: World, check: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    hvd.init()
    try:
        return check(*args)
    finally:
        hvd.shutdown()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def mine(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[hvd.rank() :: hvd.size()]


def loss_of(model: nn.Module, batch: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(batch), target)


def whole_batch(steps: int, **options: Any) -> nn.Module:
    """What one process makes of the whole batch."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, BATCH, TARGET).backward()
        optimizer.step()
    return model


def difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def train(options: dict[str, Any], tolerance: float) -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    if options.get("groups") == "lists":
        options = {**options, "groups": [[model[0].weight, model[2].bias], [model[0].bias]]}
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), **options)
    assert isinstance(optimizer, torch.optim.SGD)
    assert type(optimizer).__name__ == "SGD"
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, mine(BATCH), mine(TARGET)).backward()
        optimizer.step()
    assert difference(model, whole_batch(3, lr=0.1, momentum=0.9, weight_decay=0.01)) < tolerance


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({}, 1e-6),
        ({"groups": 2, "gradient_predivide_factor": 2.0}, 1e-6),
        ({"groups": "lists", "compression": hvd.Compression.fp16}, 1e-3),
        ({"compression": hvd.Compression.bf16}, 1e-2),
    ],
)
def test_ranks_step_like_one_process_with_the_whole_batch(options, tolerance):
    ranks(train, 2, options, tolerance)


def accumulate() -> None:
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), backward_passes_per_step=2)
    batch, target = mine(BATCH), mine(TARGET)
    for half in (slice(0, 2), slice(2, 4)):
        loss_of(model, batch[half], target[half]).backward()
    with pytest.raises(AssertionError, match="more than backward_passes_per_step"):
        loss_of(model, batch, target).backward()
    with pytest.raises(AssertionError, match="race condition"):
        optimizer.zero_grad()
    optimizer.synchronize()
    for parameter in model.parameters():
        parameter.grad = None
    optimizer.set_backward_passes_per_step(3)
    for half in (slice(0, 2), slice(2, 4)):  # stepped before the third pass: exchanged then
        loss_of(model, batch[half], target[half]).backward()
    with optimizer.skip_synchronize():  # nothing is clipped here: the gradients are simply not exchanged twice
        optimizer.synchronize()
        optimizer.step()
    assert difference(model, whole_batch(1, lr=0.1)) < 1e-6


def test_passes_are_added_up_before_the_exchange_and_one_too_many_raises():
    ranks(accumulate, 2)


def train_channels_last(op: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), op=op)
    pictures = torch.randn(2, 3, 6, 6)
    alone = torch.optim.SGD(plain.parameters(), lr=0.1)
    # The same picture on every rank: Average and Adasum of equal gradients are that gradient.
    model(pictures.to(memory_format=torch.channels_last)).square().mean().backward()
    assert not model.weight.grad.is_contiguous()
    plain(pictures).square().mean().backward()
    optimizer.step()
    alone.step()
    assert difference(model, plain) < 1e-6


@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_channels_last_models_train(op):
    ranks(train_channels_last, 2, op)


class Branches(nn.Module):
    """Rank 0 trains one branch, rank 1 the other; nobody uses `unused`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.unused = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.left(batch) if hvd.rank() == 0 else self.right(batch)


def use_different_parameters(groups: int | None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Branches()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), groups=groups
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert torch.equal(model.unused.weight.grad, torch.zeros(2, 2))
    assert torch.equal(model.left.weight.grad, torch.full((2, 2), 0.5))
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("groups", [None, 2])
def test_a_parameter_without_a_gradient_on_a_rank_takes_part_with_zeros(groups):
    first, second = ranks(use_different_parameters, 2, groups)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def freeze_and_unfreeze() -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = make_model()
    added = nn.Linear(3, 3)
    model[0].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for step in range(3):
        if step == 1:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(added.parameters())})
        optimizer.zero_grad()
        loss_of(nn.Sequential(model, added), mine(BATCH), mine(TARGET)).backward()
        optimizer.step()
    return [parameter.detach() for parameter in (*model.parameters(), *added.parameters())]


def test_parameters_unfrozen_or_added_later_are_exchanged_too():
    first, second = ranks(freeze_and_unfreeze, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train_embedding(as_dense: bool) -> torch.Tensor:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 3, sparse=True)
    inner = torch.optim.SparseAdam(list(embedding.parameters()), lr=0.1)
    optimizer = hvd.DistributedOptimizer(inner, sparse_as_dense=as_dense)
    whole = copy.deepcopy(embedding)
    alone = torch.optim.SparseAdam(list(whole.parameters()), lr=0.1)
    batches = [torch.tensor([1, 2, 4, 4]), torch.tensor([1, 3, 9])]
    for step in range(3):
        used = batches if step < 2 else batches[:1]  # in the last step, rank 1 looks nothing up
        optimizer.zero_grad()
        if hvd.rank() < len(used):
            embedding(used[hvd.rank()]).square().sum().backward()
        optimizer.step()
        alone.zero_grad()
        sum(whole(batch).square().sum() / 2 for batch in used).backward()
        alone.step()
    torch.testing.assert_close(embedding.weight, whole.weight)
    return embedding.weight.detach()


@pytest.mark.parametrize("as_dense", [False, True])
def test_sparse_gradients_are_those_of_the_whole_batch(as_dense):
    first, second = ranks(train_embedding, 2, as_dense)
    assert torch.equal(first, second)


def step_with_helpers() -> None:
    """Schedulers made before and after, a gradient scaler, clipping, a closure."""
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters())
    after = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, mine(BATCH), mine(TARGET))).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 100.0)
    with optimizer.skip_synchronize():
        scaler.step(optimizer)
    scaler.update()
    assert hooked == [1]
    assert difference(model, whole_batch(1, lr=0.1)) < 1e-6
    whole = make_model()
    loss_of(whole, BATCH, TARGET).backward()
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(whole.parameters(), 100.0))
    before.step()
    after.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    optimizer.load_state_dict(optimizer.state_dict())  # lets PyTorch wrap the class's step with its hooks, if it would
    optimizer.step()
    assert hooked == [1, 1]

    model = make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, mine(BATCH), mine(TARGET))
        loss.backward()
        return loss

    for _ in range(2):
        assert isinstance(optimizer.step(closure), torch.Tensor)
    assert difference(model, whole_batch(2, lr=0.1)) < 1e-6


def test_schedulers_a_scaler_clipping_and_closures_work_without_a_warning():
    ranks(step_with_helpers, 2)


def step_after_synchronize() -> list[str]:
    model = make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    loss_of(model, mine(BATCH), mine(TARGET)).backward()
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught]


def test_step_after_synchronize_warns():
    for messages in ranks(step_after_synchronize, 2):
        assert len(messages) == 1
        assert "optimizer.step() called without optimizer.skip_synchronize()" in messages[0]


def combine_updates(compression: Any) -> None:
    model = make_model()
    starts = [parameter.detach().clone() for parameter in model.parameters()]
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), op=hvd.Adasum, compression=compression)
    loss_of(model, mine(BATCH), mine(TARGET)).backward()
    with pytest.raises(AssertionError, match="race condition"):
        optimizer.zero_grad()
    optimizer.step()
    updates = []
    for rank in range(2):
        alone = make_model()
        loss_of(alone, BATCH[rank::2], TARGET[rank::2]).backward()
        updates.append([-0.1 * parameter.grad for parameter in alone.parameters()])
    for parameter, start, a, b in zip(model.parameters(), starts, *updates, strict=True):
        dot = float((a * b).sum())
        adasum = (1 - dot / (2 * float(a.square().sum()))) * a + (1 - dot / (2 * float(b.square().sum()))) * b
        torch.testing.assert_close(parameter - start, adasum, rtol=1e-2 if compression else 1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="not supported"), optimizer.skip_synchronize():
        pass


@pytest.mark.parametrize("compression", [hvd.Compression.none, hvd.Compression.fp16])
def test_adasum_combines_the_updates(compression):
    ranks(combine_updates, 2, compression)


def leave_a_rank_out() -> float:
    pair = hvd.add_process_set([0, 1])
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), process_set=pair
    )
    loss_of(model, BATCH[hvd.rank() :: 2], TARGET[hvd.rank() :: 2]).backward()
    optimizer.step()
    return difference(model, whole_batch(1, lr=0.1))


def test_ranks_outside_the_process_set_step_by_themselves():
    inside, also_inside, outside = ranks(leave_a_rank_out, 3)
    assert max(inside, also_inside) < 1e-6 < outside


@pytest.fixture
def alone():
    hvd.init()
    yield
    leave_world()


def test_wrapping_keeps_state_and_options(alone):
    model = make_model()
    inner = torch.optim.Adam(model.parameters(), lr=0.3)
    loss_of(model, BATCH, TARGET).backward()
    inner.step()
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters())
    assert optimizer.state_dict() == inner.state_dict()
    loss_of(model, BATCH, TARGET).backward()
    loss_of(model, BATCH, TARGET).backward()  # nobody to exchange with: no guard
    optimizer.zero_grad()
    optimizer.synchronize()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"named_parameters": [("a", 0), ("a", 1)]}, "duplicates: a"),
        ({"named_parameters": [("a", 0)]}, "were not named: parameter 1 of parameter group 0"),
        ({"named_parameters": [0, 1]}, "sequence of tuples"),
        ({"gradient_predivide_factor": 2.0, "op": hvd.Sum}, "gradient_predivide_factor not supported"),
        ({"backward_passes_per_step": 0}, "must be > 0"),
        ({"groups": -1}, "positive integer"),
        ({"groups": [[0], [0]]}, "only appear once"),
        ({"groups": [["weight"]]}, "consist of torch.Tensor"),
    ],
)
def test_bad_arguments_raise(alone, options, message):
    layer = nn.Linear(2, 2)
    parameters = list(layer.parameters())

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, tuple):
            return (value[0], parameters[value[1]])
        return parameters[value] if isinstance(value, int) else value

    options = {key: filled(value) if isinstance(value, list) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), **options)


def test_num_groups_is_deprecated(alone):
    layer = nn.Linear(2, 2)
    with pytest.warns(DeprecationWarning, match="num_groups"):
        hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), num_groups=2)
