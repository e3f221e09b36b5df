"""Elastic runs: states that go back, samplers that share anew, and worlds that form again around real deaths."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_train.horovod as hvd
from dist_train.horovod.basics import leave_world
from dist_train.horovod.elastic import rendezvous
from dist_train.horovod.elastic import sampler as sampler_module
from tests.dist_train.horovod.test_optimizer import ranks
from tests.ranks import _CONTEXT

# --- in one process, or on ranks that live


def share_an_epoch(monkeypatch, worlds: list[tuple[int, int]], length: int) -> Counter[int]:
    """Goes through worlds of (ranks, batches of 2 on each) and counts how often each index was processed."""
    state, seen = {"epoch": 3, "processed_num": 0}, Counter[int]()
    for size, batches in worlds:
        for rank in range(size):
            monkeypatch.setattr(sampler_module, "size", lambda size=size: size)
            monkeypatch.setattr(sampler_module, "rank", lambda rank=rank: rank)
            sampler = hvd.elastic.ElasticSampler(range(length), seed=5)
            sampler.load_state_dict(state)
            seen.update(list(sampler)[: 2 * batches])
            assert len(list(sampler)) == len(sampler)
            for batch in range(batches):
                sampler.record_batch(batch, 2)
        state = sampler.state_dict()
    return seen


def test_a_sampler_repeats_and_loses_nothing_when_the_number_of_ranks_changes(monkeypatch):
    seen = share_an_epoch(monkeypatch, [(4, 2), (3, 1), (2, 2), (1, 2)], 34)
    assert seen == Counter(range(34))


def test_a_sampler_fills_the_last_round_up(monkeypatch):
    seen = share_an_epoch(monkeypatch, [(4, 1)], 2)
    assert sum(seen.values()) == 4
    assert set(seen) == {0, 1}


def go_back_and_go_on() -> None:
    rank = hvd.rank()
    torch.manual_seed(rank)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (rank + 1), momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    sampler = hvd.elastic.ElasticSampler(range(8))
    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, batch=rank, mode="first")
    events: list[Any] = []
    state.register_reset_callbacks([lambda: events.append("reset")])

    def weights() -> list[float]:
        return [round(float(value), 6) for value in model.weight.detach().flatten()]

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        sampler.record_batch(state.batch, 1)
        state.batch += 1

    @hvd.elastic.run
    def train(state: Any, argument: str) -> str:
        assert argument == "given"
        events.append((state.mode, state.batch, sampler.processed_num))
        if state.mode == "first":
            assert (state.batch, optimizer.param_groups[0]["lr"]) == (0, 0.1)
            step()
            state.commit()
            committed = weights()
            step()
            step()
            train.committed = committed
            state.restore()
            state.mode = "failed"
            state.save()
            raise hvd.HorovodInternalError("a collective failed")
        if state.mode == "failed":
            assert weights() == train.committed
            assert not optimizer._under_way
            step()
            state.mode = "updated"
            state.on_hosts_updated(time.time(), hvd.elastic.HostUpdateResult.added)
            state.check_host_updates()  # without a commit: nothing is undone
        return "done"

    assert train(state, "given") == "done"
    assert events == [("first", 0, 0), "reset", ("failed", 1, 2), "reset", ("updated", 2, 4)]
    everyone = hvd.allgather_object((weights(), state.batch, optimizer.state_dict()["param_groups"]))
    assert everyone[0] == everyone[1]


def test_a_run_goes_back_to_the_commit_after_a_failure_and_goes_on_after_an_update():
    ranks(go_back_and_go_on, 2)


def test_a_state_restores_what_it_saved_again_and_again():
    hvd.init()
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0)

    def step() -> list[Any]:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        state.step += 1
        return [model.weight.tolist(), optimizer.state[model.weight]["exp_avg"].tolist(), state.step]

    step()
    state.commit()
    optimizer.zero_grad()
    first = step()
    for _ in range(2):  # an optimizer changes the tensors it has loaded
        optimizer.zero_grad()
        state.restore()
        assert step() == first
    state.model = nn.Linear(3, 1)
    assert state.model.in_features == 3
    state.restore()
    leave_world()


def test_other_errors_pass():
    hvd.init()

    @hvd.elastic.run
    def train(state):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(hvd.elastic.ObjectState(lambda value: value, lambda: 0, batch=1))
    leave_world()
    assert not rendezvous.is_elastic()


# --- the agreement on a world, between doors in one process


def agree(doors: list[rendezvous._Door]) -> list[list[rendezvous.Member] | None]:
    results: list[Any] = [None] * len(doors)

    def one(index: int) -> None:
        try:
            rendezvous._agree(doors[index])
            results[index] = doors[index].members
        except rendezvous.NoWorldError:
            pass

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(doors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def doors(monkeypatch):
    """Three processes of one world, and its members; the first has died."""
    monkeypatch.setenv("HOROVOD_ELASTIC_TIMEOUT", "10")
    found = [rendezvous._Door("127.0.0.1") for _ in range(3)]
    members = [door.me for door in found]
    for door in found:
        door.members = list(members)
    dead = found.pop(0)
    del dead.store, dead
    return found


def test_survivors_agree_in_their_old_order(doors):
    survivors = [door.me for door in doors]
    assert agree(doors) == [survivors, survivors]
    assert agree(doors) == [survivors, survivors]  # and again, over the same stores
    place = rendezvous._placement(doors[1])
    assert (place.rank, place.world_size, place.local_rank, place.num_nodes) == (1, 2, 1, 1)


def test_a_newcomer_waits_until_the_others_come_and_is_the_last(doors, monkeypatch):
    newcomer = rendezvous._Door("127.0.0.1")
    newcomer.members = [doors[0].me, doors[1].me]
    monkeypatch.setattr(rendezvous, "_door", doors[0])
    assert not rendezvous.somebody_waits()
    waiting = threading.Thread(target=rendezvous._agree, args=(newcomer,))
    waiting.start()
    while not rendezvous.somebody_waits():
        time.sleep(0.01)
    monkeypatch.setenv("HOROVOD_ELASTIC_MAX_NP", "2")
    assert not rendezvous.somebody_waits()  # no room for it
    monkeypatch.setenv("HOROVOD_ELASTIC_MAX_NP", "3")
    everyone = [doors[0].me, doors[1].me, newcomer.me]
    assert agree(doors) == [everyone, everyone]
    waiting.join()
    assert newcomer.members == everyone


def test_too_few_survivors_give_up_in_time(doors, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC_TIMEOUT", "0.5")
    monkeypatch.setenv("HOROVOD_ELASTIC_MIN_NP", "3")
    assert agree(doors) == [None, None]


def test_a_process_that_does_not_come_is_waited_for_until_the_time_is_up(doors, monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC_TIMEOUT", "0.5")
    assert agree(doors[:1]) == [None]


# --- real processes, killed


def job(folder: Path, rank: int, world_size: int, steps: int) -> None:
    """One worker: counts steps, adds up what all ranks contribute, and dies where its file says so."""
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "REELSCALE_JOB_KEY": str(folder),
            "HOROVOD_ELASTIC_FILE": str(folder / "doors"),
            "HOROVOD_ELASTIC_TIMEOUT": "30",
        }
    )
    torch.set_num_threads(1)
    hvd.init()
    torch.manual_seed(os.getpid())
    model = nn.Linear(1, 1, bias=False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    state = hvd.elastic.TorchState(model, optimizer, step=0, sizes=[])

    @hvd.elastic.run
    def train(state: Any) -> None:
        while state.step < steps:
            if (folder / f"die_{rank}").exists() and state.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            state.step, state.sizes = state.step + 1, [*state.sizes, hvd.size()]
            if state.step % 2 == 0:
                state.commit()
            if (folder / f"hold_{state.step}").exists():
                (folder / "held").touch()
                while not rendezvous.somebody_waits():
                    time.sleep(0.02)

    train(state)
    assert (hvd.local_rank(), hvd.local_size()) == (hvd.rank(), hvd.size())  # whatever the launcher said
    outcome = {"rank": hvd.rank(), "size": hvd.size(), "sizes": state.sizes, "weight": float(model.weight)}
    (folder / f"result_{rank}").write_text(json.dumps(outcome))
    leave_world()


def outcomes(folder: Path, workers: dict[int, Any]) -> dict[int, Any]:
    for worker in workers.values():
        worker.join(60)
        alive = worker.is_alive()
        worker.kill()
        assert not alive, "a worker hung"
    files = {rank: folder / f"result_{rank}" for rank in workers}
    return {rank: json.loads(path.read_text()) for rank, path in files.items() if path.exists()}


def start(folder: Path, rank: int, world_size: int, steps: int) -> Any:
    worker = _CONTEXT.Process(target=job, args=(folder, rank, world_size, steps), daemon=True)
    worker.start()
    return worker


@pytest.mark.parametrize("victim", [0, 2])
def test_survivors_go_on_in_a_smaller_world_from_the_last_commit(tmp_path, victim):
    (tmp_path / f"die_{victim}").touch()
    results = outcomes(tmp_path, {rank: start(tmp_path, rank, 3, 6) for rank in range(3)})
    survivors = [rank for rank in range(3) if rank != victim]
    assert sorted(results) == survivors
    assert [results[rank]["rank"] for rank in survivors] == [0, 1]
    for result in results.values():  # the third step was made by three and undone
        assert result["sizes"] == [3, 3, 2, 2, 2, 2]
        assert result["weight"] == results[survivors[0]]["weight"]


def test_a_worker_that_comes_later_takes_part_from_where_the_others_are(tmp_path):
    (tmp_path / "hold_2").touch()
    workers = {0: start(tmp_path, 0, 1, 6)}
    while not (tmp_path / "held").exists():
        time.sleep(0.02)
    workers[1] = start(tmp_path, 1, 1, 6)
    results = outcomes(tmp_path, workers)
    assert results[0]["sizes"] == results[1]["sizes"] == [1, 1, 1, 1, 2, 2]
    assert results[0]["weight"] == results[1]["weight"]
    assert [results[rank]["size"] for rank in (0, 1)] == [2, 2]


def test_a_replacement_makes_the_world_as_large_as_it_was(tmp_path):
    (tmp_path / "die_0").touch()
    (tmp_path / "hold_4").touch()
    workers = {rank: start(tmp_path, rank, 2, 8) for rank in range(2)}
    while not (tmp_path / "held").exists():
        time.sleep(0.02)
    (tmp_path / "die_0").unlink()
    workers[0].join()
    workers[0] = start(tmp_path, 0, 2, 8)
    results = outcomes(tmp_path, workers)
    assert [results[rank]["rank"] for rank in (0, 1)] == [1, 0]
    assert results[0]["sizes"] == results[1]["sizes"] == [2, 2, 1, 1, 1, 1, 2, 2]
    assert results[0]["weight"] == results[1]["weight"]
