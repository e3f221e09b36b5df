"""`reelscale COMMAND ...`: finds the command, and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from data_shards.worker_process import start_worker_server
from dist_train.placement import find_placement
from launch import __version__
from launch.console import set_up_logging
from launch.errors import EXIT_USER, Failure, describe, write_failure
from launch.local import FAILURES_FOLDER
from launch.parsing import closest

COMMANDS = {
    "demo": ("the whole main job on the embedded data set", "launch.commands.demo"),
    "make-data": ("write the embedded data set: make-data motion DIR", "launch.commands.make_data"),
    "pack": ("videos to shards: pack SRC DST", "launch.commands.pack"),
    "verify": ("is a packed set whole: verify DST [--decode all]", "launch.commands.verify"),
    "inspect": ("what a packed set holds, and a page to look at: inspect DST", "launch.commands.inspect"),
    "experiments": ("list the experiments", "launch.commands.experiments"),
    "train": ("train an experiment: train motion_tsm [--nproc 2]", "launch.commands.train"),
    "ledger": ("where a run's time went: ledger RUN", "launch.commands.ledger"),
    "certify": ("was each sample seen exactly once: certify RUN", "launch.commands.certify"),
    "report": ("report.html of runs: report RUN [RUN ...]", "launch.commands.report"),
}


def run_command(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"reelscale {__version__}\n")
        return 0
    set_up_logging()
    try:
        return _run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error)


def _run(name: str, arguments: Sequence[str]) -> int:
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}{closest(name, COMMANDS)}; see reelscale --help")
    if name == "train" and _wants_workers(arguments):
        start_worker_server()  # before anything imports PyTorch: the server's imports overlap with ours
    return importlib.import_module(COMMANDS[name][1]).run(arguments)


def _wants_workers(arguments: Sequence[str]) -> bool:
    """Whether `train` with these arguments loads clips in workers of this process: it may only supervise or print."""
    flags = {argument.split("=")[0] for argument in arguments}
    supervises = "--nproc" in flags and find_placement(os.environ).launcher == "single"
    without_workers = "--data.loader.num-workers=0" in arguments
    return not (supervises or without_workers or flags & {"--dry-run", "-h", "--help"})


def end_process(error: Exception) -> None:
    """Ends this process with `error`, which a thread has found while the main thread hangs."""
    code = _fail(error, first_speaks=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(error: Exception, *, first_speaks: bool = True) -> int:
    """Says in one line what went wrong, once for the whole job, and keeps the traceback for who wants it."""
    try:
        placement = find_placement(os.environ)
    except ValueError as unplaced:
        sys.stderr.write(f"reelscale: error: {unplaced}\n")
        return EXIT_USER
    failure = describe(error, rank=placement.rank)
    if os.environ.get("REELSCALE_TRACEBACK"):
        traceback.print_exc()
    folder = os.environ.get(FAILURES_FOLDER)
    if folder and placement.launcher == "local" and write_failure(Path(folder), failure):
        pass  # the process that started this one says it
    elif (first_speaks and placement.rank == 0) or not _told_to_all(error):
        say(failure, show_rank=placement.world_size > 1)
    return failure.exit_code


def say(failure: Failure, *, show_rank: bool = False) -> None:
    """Prints a failure's one line on standard error."""
    rank = (
        f"rank {failure.rank}: " if show_rank and failure.rank and not (failure.consequence or failure.of_all) else ""
    )
    sys.stderr.write(f"reelscale: error: {rank}{failure.message}\n")


def _told_to_all(error: Exception) -> bool:
    """True for errors that every rank raises alike: rank 0 speaks for all."""
    return getattr(error, "on_every_rank", False)


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items())
    return (
        "reelscale: data-parallel training of video models, from a laptop to a cluster\n\n"
        f"usage: reelscale COMMAND ...\n\n{rows}\n\nreelscale COMMAND --help lists a command's flags.\n"
        "exit codes: 0 done, 2 bad input, 1 the machine, 75 stopped (go on with --resume)\n"
    )
