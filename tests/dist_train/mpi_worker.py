"""What the ranks of the MPI tests run: `mpirun -n N python -P -m tests.dist_train.mpi_worker OUT.json all`.

It runs the table of collectives and the scenarios. This file imports no MPI, so that a test may list cases.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.dist_train.mpi_scenarios import SCENARIOS, Scenarios
from tests.dist_train.mpi_table import DTYPES, MOVES, OPS, REDUCTIONS, Table, fits


def case_names(dtypes: str) -> list[str]:
    """Every case: `collective-dtype` for all ops, sync and async, or the name of a scenario; `all` dtypes or `some`."""
    chosen = DTYPES if dtypes == "all" else (torch.float32, torch.bfloat16)
    table = [f"{name}-{str(dtype).removeprefix('torch.')}" for name in REDUCTIONS + MOVES for dtype in chosen]
    return table + list(SCENARIOS)


def run_case(mpi: Any, gloo: Any, name: str) -> None:
    """Runs one case; raises where it fails."""
    method, _, dtype_name = name.partition("-")
    if method in SCENARIOS:
        getattr(Scenarios(mpi, gloo), method)()
        return
    run = getattr(Table(mpi, gloo), method)
    dtype = getattr(torch, dtype_name)
    for is_async in (False, True):
        if method in MOVES:
            run(dtype, is_async)
            continue
        for op in OPS:
            if fits(dtype, op) and (op == "SUM" or not is_async):
                run(dtype, op, is_async)


def main(output: Path, dtypes: str) -> None:
    """Runs every case; rank 0 writes what went wrong on which rank."""
    import dist_train.mpi_backend  # noqa: F401

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)  # a hang ends in a picture of it
    dist.init_process_group("mpi4py", timeout=timedelta(seconds=20))
    group = dist.group.WORLD
    assert group is not None
    gloo = dist.new_group(backend="gloo")
    results = {}
    for name in case_names(dtypes):
        problem = None
        try:
            run_case(group, gloo, name)
        except Exception:
            problem = traceback.format_exc()
        if problem:
            sys.stderr.write(f"rank {group.rank()}, {name}: {problem}\n")
        results[name] = problem
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, results, gloo)
    if group.rank() == 0:
        output.write_text(json.dumps({name: [results[name] for results in everyone] for name in results}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
