"""`reelscale train EXPERIMENT`: one process, `--nproc N` of them, or this rank of a torchrun, srun or mpirun job."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_shards.storage import is_url
from dist_train.placement import Placement, find_placement
from dist_train.rendezvous import Transport, check_transport
from launch.cli import say
from launch.config import Experiment, check
from launch.console import set_up_logging
from launch.errors import EXIT_STOPPED
from launch.experiments import make_experiment
from launch.local import die_with_parent, run_local
from launch.parsing import parse


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Experiment):
    """Trains an experiment. Every field of its configuration is a flag."""

    nproc: int = 1
    """Processes to start on this machine; leave it out under torchrun, srun and mpirun."""
    run_dir: Path | None = None
    """Folder of the run; by default runs/NAME."""
    resume: bool = False
    """Continue the run in the run folder from its last whole checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    transport: Transport = "auto"
    """What carries the collectives: `auto` is NCCL between GPUs and Gloo between hosts; `mpi` needs mpirun."""
    dry_run: bool = False
    """Print the plan (batch arithmetic, shards, buckets, memory) and start nothing."""
    memory_gigabytes: float = 0.0
    """Memory of a device (10^9 bytes) that --dry-run plans for; 0: this machine's."""
    report: Literal["on", "off"] = "on"
    """Write report.html and print the ledger at the end."""

    def experiment(self) -> Experiment:
        """The experiment alone, with the data's place made absolute."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Experiment)}
        data, storage = self.data, self.data.storage
        if storage.cache_folder is not None:
            storage = dataclasses.replace(storage, cache_folder=storage.cache_folder.expanduser().resolve())
        roots = tuple(map(_absolute, (data.root, *data.more_roots)))
        data = dataclasses.replace(data, root=roots[0], more_roots=roots[1:], storage=storage)
        return Experiment(**{**fields, "data": data})


def _absolute(root: str) -> str:
    """A folder from wherever the command was called; a URL as it is."""
    return root if is_url(root) else str(Path(root).expanduser().resolve())


def run(arguments: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if not arguments or arguments[0].startswith("-"):
        if "-h" in arguments or "--help" in arguments:
            sys.stdout.write(
                "usage: reelscale train EXPERIMENT [flags]; reelscale train EXPERIMENT --help lists them\n"
            )
            return 0
        raise ValueError("which experiment? reelscale train EXPERIMENT; `reelscale experiments` lists them")
    try:
        job = _prepare(arguments)
    except ValueError as error:
        error.on_every_rank = True  # type: ignore[attr-defined]  # the same words on each: the same mistake
        raise
    if job.command.dry_run:
        from launch.memory_plan import available_bytes
        from launch.plan import print_plan

        if job.placement.rank == 0:
            here = job.command.nproc if job.placement.launcher == "single" else job.placement.local_world_size
            memory = available_bytes(
                gigabytes=job.command.memory_gigabytes, device=job.command.device, processes_here=here
            )
            print_plan(job.experiment, world_size=job.world_size, memory_bytes=memory)
        return 0
    if job.placement.launcher == "single" and job.command.nproc > 1:
        return _supervise(arguments, job)
    return _run_rank(job)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the command line and the launcher's environment say."""

    command: TrainCommand
    experiment: Experiment
    run_dir: Path
    placement: Placement
    world_size: int


def _prepare(arguments: Sequence[str]) -> _Job:
    """Reads and checks the command line; ValueError for all that is wrong with it."""
    base = make_experiment(arguments[0])
    default = TrainCommand(**{f.name: getattr(base, f.name) for f in dataclasses.fields(Experiment)})
    command = parse(TrainCommand, arguments[1:], program=f"reelscale train {arguments[0]}", default=default)
    placement = find_placement(os.environ)
    if command.nproc < 1:
        raise ValueError(f"--nproc is {command.nproc}: use 1 or more")
    if placement.launcher not in ("single", "local") and command.nproc > 1:
        raise ValueError(
            f"--nproc {command.nproc} under {placement.launcher}, which starts processes itself: leave it out"
        )
    experiment = command.experiment()
    world_size = command.nproc if placement.launcher == "single" else placement.world_size
    check_transport(command.transport, placement, world_size=world_size)
    check(experiment, world_size=world_size)
    return _Job(
        command=command,
        experiment=experiment,
        run_dir=command.run_dir or Path("runs") / experiment.name,
        placement=placement,
        world_size=world_size,
    )


def _supervise(arguments: Sequence[str], job: _Job) -> int:
    """Checks what can be checked, starts the ranks, and reports for all of them."""
    from launch.run_folder import check_claim
    from launch.training import open_splits

    command, run_dir = job.command, job.run_dir
    open_splits(job.experiment)
    check_claim(run_dir, resume=command.resume)
    failure = run_local(["train", *arguments], num_processes=command.nproc, logs=run_dir / "logs")
    if failure is not None and failure.exit_code != EXIT_STOPPED:
        say(failure, show_rank=True)
        return failure.exit_code
    _report(command, run_dir)
    if failure is not None:
        sys.stderr.write(f"reelscale: {failure.message}\n")
        return failure.exit_code
    return 0


def _run_rank(job: _Job) -> int:
    """Trains as one rank; rank 0 reports, unless a supervising process does."""
    from dist_train.rendezvous import make_world
    from launch.training import run_rank

    command, run_dir, supervised = job.command, job.run_dir, job.placement.launcher == "local"
    if supervised:
        die_with_parent()
    if command.training.deterministic:  # cuBLAS reads it when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    world = make_world(job.placement, command.device)
    set_up_logging(rank=world.rank)
    outcome = run_rank(
        job.experiment,
        run_dir=run_dir,
        resume=command.resume,
        world=world,
        placement=job.placement,
        transport=command.transport,
    )
    if outcome.stopped:
        raise StoppedOnRequest(
            f"stopped on request after step {outcome.step}: continue with --resume --run-dir {run_dir}"
        )
    if world.is_first and not supervised:
        _report(command, run_dir)
    return 0


class StoppedOnRequest(RuntimeError):
    """A rank ended early because it was asked to; the supervising process says so."""

    exit_code = EXIT_STOPPED
    on_every_rank = True


def _report(command: TrainCommand, run_dir: Path) -> None:
    if command.report == "off":
        return
    from launch.reporting import print_ledger, report_runs

    if command.monitor.ledger == "on":
        print_ledger(run_dir)
    path = report_runs([run_dir], run_dir / "report.html")
    sys.stdout.write(f"report: {path}\n")
