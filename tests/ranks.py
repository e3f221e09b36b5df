"""Runs a function as several ranks: real processes with a real Gloo group.

    results = run_ranks(function, 2, argument)     # function(world, argument) in each; results in rank order

A rank that raises fails the test with its traceback; a rank that hangs is killed after `timeout` seconds. Processes
come from a fork server that has imported torch once, so a rank costs milliseconds, not an import.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_train.world import World

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "tests.dist_train.toy", "pytest", "tests.ranks"])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    enter: Callable[[int], None] | None = None,
    may_die: int | None = None,
) -> list[Any]:
    """Runs `function(world, *args)` on `world_size` ranks and returns what each returned, in rank order.

    `enter(rank)` is called first in each process (`tests/cluster/hosts.py` moves it onto a host of its own). The result
    of rank `may_die` is None where it died. A function that leaves the ranks out of step destroys the process group.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, world_size, folder, args, enter), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        results = []
        for rank in range(world_size):
            path = Path(folder) / f"result_{rank}"
            if not path.exists() and rank == may_die and rank not in hung:
                results.append(None)
                continue
            if not path.exists():
                pytest.fail(f"rank {rank} {'hung' if rank in hung else 'died'} (hung: {hung})")
            ok, value = pickle.loads(path.read_bytes())
            if not ok:
                pytest.fail(f"rank {rank} raised:\n{value}")
            results.append(value)
        return results


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    args: tuple[Any, ...],
    enter: Callable[[int], None] | None,
) -> None:
    torch.set_num_threads(1)
    if enter is not None:
        enter(rank)
    world = World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, launcher="test")
    try:
        if world_size > 1:
            store = dist.FileStore(str(Path(folder) / "store"), world_size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
            )
        outcome = (True, function(world, *args))
        if world_size > 1 and dist.is_initialized():
            dist.barrier()  # a rank that leaves early would break the connections of those still forming theirs
    except BaseException:
        outcome = (False, traceback.format_exc())
    aside = Path(folder) / f"partial_{rank}"
    aside.write_bytes(pickle.dumps(outcome))
    aside.rename(Path(folder) / f"result_{rank}")
    if dist.is_initialized():
        dist.destroy_process_group()
