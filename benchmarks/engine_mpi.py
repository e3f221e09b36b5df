"""All-reduce over MPI against Gloo, in one run: the same processes, sizes taken in turns.

    mpirun -n 2 python -m benchmarks.engine_mpi             # under any MPI; prints a table
    mpirun -n 2 python -m benchmarks.engine_mpi --json out.json

Each round times one call of each backend, so that a neighbour's load meets both alike; a round's time is the slowest
rank's. The columns are medians over the rounds; the ratio is the median of the rounds' ratios, below 1 where MPI is
faster. The last line starts a reduction of 16 MB, computes for as long as one takes, then waits: the share of its time
that the computation hides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dist_train.mpi_backend

SIZES = tuple(4 * 8**power for power in range(9))  # 4 B to 64 MB
NUM_BYTES_OF_OVERLAP = 1 << 24


def rounds(num_bytes: int, groups: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of the slowest rank for each round, by backend."""
    num_rounds = 60 if num_bytes <= 1 << 20 else 12
    tensor = torch.ones(num_bytes // 4)
    times: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(num_rounds + 3):
        for name, group in groups.items():
            dist.barrier(group)
            begin = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            times[name].append(time.perf_counter() - begin)
            tensor.fill_(1.0)
    return {name: _slowest(values[3:], groups["gloo"]) for name, values in times.items()}


def overlap(group: Any, gloo: Any) -> float:
    """The share of an all-reduce that a computation of the same length hides, from 0 to 1; the worst rank's."""
    tensor, matrix = torch.ones(NUM_BYTES_OF_OVERLAP // 4), torch.ones(256, 256)
    shares = []
    for _ in range(8):
        dist.barrier(group)
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        alone = time.perf_counter() - begin
        dist.barrier(group)
        work = dist.all_reduce(tensor, group=group, async_op=True)
        begin = time.perf_counter()
        while time.perf_counter() - begin < alone:
            matrix @ matrix
        waited = time.perf_counter()
        work.wait()
        shares.append(min(max(1 - (time.perf_counter() - waited) / alone, 0.0), 1.0))
    return min(_all(statistics.median(shares), gloo))


def _slowest(values: list[float], gloo: Any) -> list[float]:
    table = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(table, dist.ReduceOp.MAX, group=gloo)
    return table.tolist()


def _all(value: float, gloo: Any) -> list[float]:
    everyone = [torch.zeros(1, dtype=torch.float64) for _ in range(gloo.size())]
    dist.all_gather(everyone, torch.tensor([value], dtype=torch.float64), gloo)
    return [float(part) for part in everyone]


def main() -> None:
    """Measures and, on rank 0, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py")
    groups = {"mpi": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    rows = []
    for num_bytes in SIZES:
        times = rounds(num_bytes, groups)
        rows.append(
            {
                "bytes": num_bytes,
                **{f"{name}_us": 1e6 * statistics.median(values) for name, values in times.items()},
                "ratio": statistics.median(m / g for m, g in zip(times["mpi"], times["gloo"], strict=True)),
            }
        )
    hidden = {name: overlap(group, groups["gloo"]) for name, group in groups.items()}
    if groups["gloo"].rank() == 0:
        library = dist_train.mpi_backend.MPI.Get_library_version().split(",")[0].splitlines()[0]
        print(f"{library}, {groups['gloo'].size()} ranks")
        print(f"{'bytes':>10} {'MPI us':>10} {'Gloo us':>10} {'MPI/Gloo':>9}")
        for row in rows:
            print(f"{row['bytes']:>10} {row['mpi_us']:>10.0f} {row['gloo_us']:>10.0f} {row['ratio']:>9.2f}")
        print(f"hidden behind a computation: MPI {hidden['mpi']:.0%}, Gloo {hidden['gloo']:.0%}")
        if arguments.json:
            arguments.json.write_text(json.dumps({"library": library, "rows": rows, "hidden": hidden}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
