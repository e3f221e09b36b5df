"""What the engine costs and gains: every figure a ratio of two things measured in turn, in one run, on the same work.

    .venv/bin/python -m benchmarks.engine --all             # 10 minutes on 2 idle cores; as root, for the shaped links
    .venv/bin/python -m benchmarks.engine alone scale       # some sections
    .venv/bin/python -m benchmarks.engine --all --markdown  # the table of benchmarks/README.md

Sections: `loopback` (2 and 4 processes against DDP), `links` (the same across hosts with links of 1 Gbit/s, and what
buckets, compression, fewer exchanges and the hierarchy win there), `alone` (the whole loop against a bare one),
`mpi` (against Gloo), `scale` (one rank of 1,536) and `memory` (of a rank, by world size and buckets).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_alone import loop_against_bare
from benchmarks.engine_scale import Seen
from benchmarks.engine_step import Arm, Compared, Work
from benchmarks.pairs import Row, table
from tests.cluster.hosts import Hosts, missing, run_ranks_on_hosts
from tests.cluster.mpi import own_mpi

CHECKOUT = Path(__file__).resolve().parent.parent
DDP = Arm(name="DDP")
NOT_SLOWER = "at most 1.02"
FASTER = "below 1"


def main() -> None:
    """Runs the sections and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)}")
    parser.add_argument("--all", action="store_true", help="every section")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--pairs", type=int, default=24, help="pairs of blocks for a ratio")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown or not (arguments.sections or arguments.all):
        parser.error(f"unknown section {unknown[0]!r}" if unknown else "name sections, or --all")
    torch.set_num_threads(1)
    rows = []
    for name in SECTIONS if arguments.all else arguments.sections:
        begun = time.monotonic()
        rows += SECTIONS[name](arguments.pairs)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    print(table(rows, markdown=arguments.markdown))


def loopback(pairs: int) -> list[Row]:
    """`allreduce` and the strategy `ddp` against DDP, all ranks on this machine."""
    rows = []
    for ranks in (2, 4):
        arms = [
            DDP,
            Arm(name="allreduce", exchange={}, pairs=pairs),
            Arm(name="the strategy ddp", exchange={"strategy": "ddp"}, pairs=pairs // 2),
            Arm(name="a second DDP, for the noise", pairs=pairs // 2),
        ]
        rows += _rows(f"{ranks} processes, loopback", arms, _run_here(arms, Work(clips=4 // ranks), ranks))
    return rows


def links(pairs: int) -> list[Row]:
    """The same and the options of `allreduce`, on hosts with links of 1 Gbit/s."""
    if reason := missing():
        return [Row(what="across links of 1 Gbit/s", seen=f"not run: {reason}")]
    fewer = max(pairs // 3, 2)
    rows = []
    for hosts in (2, 4):
        arms = [
            DDP,
            Arm(name="allreduce", exchange={}, pairs=pairs // 2),
            Arm(name="allreduce, auto", exchange={"bucket_megabytes": "auto"}, pairs=fewer, warm_up=30),
            Arm(name="allreduce, bf16", exchange={"compression": "bf16"}, pairs=fewer),
            Arm(name="allreduce, fp16", exchange={"compression": "fp16"}, pairs=fewer),
            Arm(name="allreduce, powersgd", exchange={"compression": "powersgd"}, pairs=fewer),
        ]
        rows += _rows(f"{hosts} hosts, 1 Gbit/s", arms, _run_on_hosts(arms, Work(clips=8 // hosts), hosts, 1))
    return rows + _fewer_exchanges(fewer) + _through_nodes(fewer)


def _fewer_exchanges(pairs: int) -> list[Row]:
    """Fusion and local aggregation, against the same without it."""
    each = "DDP after each of 4 micro-batches"
    single = "allreduce, a bucket for each tensor"
    arms = [
        Arm(name=each, exchange_each=True, against=each, micro_batches=4),
        Arm(name="allreduce once after 4 micro-batches", exchange={}, against=each, micro_batches=4, pairs=pairs),
        Arm(name=single, exchange={"bucket_megabytes": 1e-6}, against=single),
        Arm(name="allreduce, fused", exchange={}, against=single, pairs=pairs),
    ]
    return _rows("2 hosts, 1 Gbit/s", arms, _run_on_hosts(arms, Work(clips=4), 2, 1))


def _through_nodes(pairs: int) -> list[Row]:
    """Two processes share a host's link."""
    arms = [
        DDP,
        Arm(name="allreduce", exchange={}, pairs=pairs),
        Arm(name="allreduce, hierarchical", exchange={"hierarchical": "on"}, pairs=pairs),
    ]
    return _rows("2 hosts x 2 processes, 1 Gbit/s", arms, _run_on_hosts(arms, Work(), 2, 2))


def alone(pairs: int) -> list[Row]:
    """The whole loop at world size 1."""
    ratio, milliseconds = loop_against_bare(pairs=pairs)
    what = f"world size 1, step of {milliseconds:.0f} ms: `dist_train.loop.train` / a bare PyTorch loop"
    return [Row(what=what, seen=str(ratio), goal=NOT_SLOWER)]


def mpi(pairs: int) -> list[Row]:  # noqa: ARG001  # `benchmarks.engine_mpi` has its own number of rounds
    """All-reduce by the backend `mpi4py` against Gloo, under mpirun."""
    launcher = own_mpi()
    if launcher is None:
        return [Row(what="all-reduce, mpi / Gloo", seen="not run: no mpirun beside this Python (extra 'dev')")]
    rows = []
    for ranks in (2, 4):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "out.json"
            done = launcher.run(ranks, "-m", "benchmarks.engine_mpi", "--json", path, timeout=300)
            if done.returncode:
                raise RuntimeError(f"benchmarks.engine_mpi ended with {done.returncode}:\n{done.stderr[-2000:]}")
            found = json.loads(path.read_text())
        sizes = ", ".join(f"{_size(row['bytes'])} {row['ratio']:.2f}" for row in found["rows"])
        hidden = f"hidden behind a computation: mpi {found['hidden']['mpi']:.0%}, Gloo {found['hidden']['gloo']:.0%}"
        rows.append(Row(what=f"all-reduce, {ranks} ranks, {found['library']}: mpi / Gloo", seen=f"{sizes}; {hidden}"))
    return rows


def scale(pairs: int) -> list[Row]:  # noqa: ARG001
    """One rank of 1,536: plan, seconds, memory."""
    rows = []
    for ranks_per_node, exchange in ((8, {}), (8, {"hierarchical": "on"}), (6, {"hierarchical": "on"})):
        seen = _rank_at_scale(1536, ranks_per_node, exchange)
        way = "through nodes" if exchange else "one ring"
        sizes = ", ".join(f"{megabytes:.1f}" for megabytes in seen.buckets_megabytes)
        rows.append(
            Row(
                what=f"{seen.world_size // ranks_per_node} nodes x {ranks_per_node}, TSM ResNet-50 "
                f"({seen.gradient_megabytes:.1f} MB of gradients), {way}",
                seen=f"buckets of {sizes} MB; {seen.node_megabytes:.0f} MB out of each node in {seen.rounds} rounds a "
                f"bucket; ready in {seen.prepare_seconds + seen.first_step_seconds:.2f} s; "
                f"{seen.exchange_milliseconds:.0f} ms of this rank's processor a step; "
                f"buffers {seen.buffer_megabytes:.1f} MB, process {seen.peak_megabytes:.0f} MB",
                goal="seconds and megabytes",
            )
        )
    return rows


def memory(pairs: int) -> list[Row]:  # noqa: ARG001
    """What the exchange keeps, by world size and by bucket size."""
    rows = []
    for world_size, megabytes in ((8, 25), (96, 25), (1536, 25), (1536, 1), (1536, 10)):
        seen = _rank_at_scale(world_size, 8, {"bucket_megabytes": megabytes})
        rows.append(
            Row(
                what=f"memory of the exchange, world size {world_size}, {len(seen.buckets_megabytes)} buckets",
                seen=f"{seen.buffer_megabytes:.1f} MB for {seen.gradient_megabytes:.1f} MB of gradients",
                goal="the same everywhere",
            )
        )
    return rows


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "loopback": loopback,
    "links": links,
    "alone": alone,
    "mpi": mpi,
    "scale": scale,
    "memory": memory,
}


def _size(num_bytes: int) -> str:
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.0f} {unit}"
    return f"{num_bytes} B"


def _rows(where: str, arms: Sequence[Arm], compared: Sequence[Compared]) -> list[Row]:
    plain: tuple[Any, ...] = (None, {}, {"strategy": "ddp"})
    gains = {arm.name for arm in arms if arm.exchange not in plain or arm.against != DDP.name}
    return [
        Row(
            what=f"{where}, {one.megabytes:.1f} MB, step of {one.baseline_ms:.0f} ms: {one.name} / {one.against}",
            seen=f"{one.wall}; CPU {one.cpu.median:.2f}",
            goal=FASTER if one.name in gains else NOT_SLOWER,
        )
        for one in compared
    ]


def _command(arms: Sequence[Arm], work: Work) -> list[str]:
    given = ["--arms", json.dumps([asdict(arm) for arm in arms]), "--work", json.dumps(asdict(work))]
    return [sys.executable, "-P", "-m", "benchmarks.engine_step", *given]


def _run_on_hosts(arms: Sequence[Arm], work: Work, num_hosts: int, ranks_per_host: int) -> list[Compared]:
    with Hosts(num_hosts, rate="1gbit") as hosts:
        environment = {"PYTHONPATH": str(CHECKOUT)}
        done = run_ranks_on_hosts(
            hosts, _command(arms, work), ranks_per_host=ranks_per_host, env=environment, timeout=600
        )
    return _read(done[0].stdout, [(rank.returncode, rank.stderr) for rank in done])


def _run_here(arms: Sequence[Arm], work: Work, num_ranks: int) -> list[Compared]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    starter = [sys.executable, "-P", "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone"]
    command = [*starter, "-m", *_command(arms, work)[3:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return _read(done.stdout, [(done.returncode, done.stderr)])


def _read(printed: str, ends: Sequence[tuple[int, str]]) -> list[Compared]:
    for status, said in ends:
        if status:
            raise RuntimeError(f"a rank of benchmarks.engine_step ended with {status}:\n{said[-2000:]}")
    return [Compared.load(one) for one in json.loads(printed.splitlines()[-1])]


def _rank_at_scale(world_size: int, ranks_per_node: int, exchange: dict[str, Any]) -> Seen:
    """In a process of its own: its peak of memory is nobody else's."""
    given = ["--world-size", str(world_size), "--ranks-per-node", str(ranks_per_node)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "benchmarks.engine_scale", *given, "--exchange", json.dumps(exchange)],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.engine_scale ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return Seen(**json.loads(done.stdout))


if __name__ == "__main__":
    main()
