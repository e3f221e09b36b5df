"""Horovod's own PyTorch tests, run against `dist_train.horovod`.

    git clone --branch v0.28.1 https://github.com/horovod/horovod /tmp/horovod
    python -m benchmarks.horovod_suite /tmp/horovod --nproc 2
    python -m benchmarks.horovod_suite /tmp/horovod --nproc 3 --launcher torchrun -k join

Every rank runs pytest on the same file, in the same order, with `horovod.torch` standing for `dist_train.horovod`. A
test counts as passed when it passed on every rank. Prints one line for each test that did not pass and the totals;
the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import types
import unittest.mock
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dist_train.horovod.basics import shutdown

SUITE = Path("test/parallel/test_torch.py")
LAUNCHERS = {
    "mpirun": [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "--allow-run-as-root", "-n"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"],
}
ALIASES = ("mpi_ops", "functions", "optimizer", "compression", "sync_batch_norm", "elastic", "elastic.sampler",
           "elastic.state")  # fmt: skip


def main() -> None:
    """Launches the ranks and prints what they found, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("horovod", type=Path, help="a checkout of Horovod")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="mpirun")
    parser.add_argument("--suite", type=Path, default=SUITE, help="the file of tests, within the checkout")
    parser.add_argument("-k", default="", help="as pytest's -k")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # given to the ranks
    options = parser.parse_args()
    if options.results:
        sys.exit(_rank(options))
    if not (options.horovod / options.suite).is_file():
        parser.error(f"{options.horovod / options.suite} is not there: name a checkout of Horovod")
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *LAUNCHERS[options.launcher], str(options.nproc), sys.executable, "-m", "benchmarks.horovod_suite",
            str(options.horovod), "--suite", str(options.suite), "--results", folder, "-k", options.k,
        ]  # fmt: skip
        # A test that fails on one rank alone leaves the others waiting: they are let go.
        environ = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "15", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "30", **os.environ}
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        by_rank = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    if len(by_rank) != options.nproc:
        print(done.stdout, done.stderr)
        sys.exit(f"only {len(by_rank)} of {options.nproc} ranks came to the end")
    sys.exit(_show(by_rank))


def _show(by_rank: list[dict[str, list[str]]]) -> int:
    totals: Counter[str] = Counter()
    for test in by_rank[0]:
        outcomes = [results.get(test, ["missing", ""]) for results in by_rank]
        worst = next((o for o in outcomes if o[0] in ("failed", "missing")), None)
        outcome, reason = worst or max(outcomes)  # one skip is a skip: some ranks had nothing to do
        totals[outcome] += 1
        if outcome != "passed":
            print(f"{outcome:8}{test}: {reason}")
    print(f"{len(by_rank)} ranks: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items())))
    return int(totals["failed"] + totals["missing"] > 0)


def _rank(options: argparse.Namespace) -> int:
    import pytest

    from dist_train.placement import find_placement

    placement = find_placement(os.environ)
    if placement.launcher == "torchrun":  # as horovodrun would have it
        os.environ |= {"HOROVOD_RANK": str(placement.rank), "HOROVOD_SIZE": str(placement.world_size)}
    _stand_in()
    recorder = Recorder()
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir=/", "-c", os.devnull]
    # Newer than the suite, which tries every optimizer of torch.optim on a model with biases; Muon takes none.
    torch.optim.Muon.__module__ = "newer"
    suite = str(options.horovod / options.suite)
    code = pytest.main([*arguments, "-k", options.k, suite], plugins=[recorder])
    aside = options.results / f".{placement.rank}"
    aside.write_text(json.dumps(recorder.outcomes))
    aside.rename(options.results / f"{placement.rank:05d}")
    return 0 if code in (0, 1) else int(code)


def _stand_in() -> None:
    """Makes `import horovod.torch as hvd` find `dist_train.horovod`, and what the suite's helpers import, something."""
    ours = importlib.import_module("dist_train.horovod")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in (
        "horovod", "horovod.common", "horovod.runner", "horovod.runner.util", "horovod.runner.util.threads",
    )}  # fmt: skip
    ours.mpi_enabled = lambda: True  # asked before tests of Adasum, which needs no MPI here
    modules["horovod"].torch = modules["horovod.torch"] = ours
    modules["horovod.runner.util.threads"].in_thread = None
    modules["horovod.common.exceptions"] = importlib.import_module("dist_train.horovod.exceptions")
    for name in ALIASES:
        modules[f"horovod.torch.{name}"] = importlib.import_module(f"dist_train.horovod.{name}")
    modules["mock"] = unittest.mock
    modules["cloudpickle"] = pickle
    for name, module in modules.items():
        if name in ("mock", "cloudpickle") and importlib.util.find_spec(name):
            continue
        sys.modules[name] = module


class Recorder:
    """A pytest plugin: what became of each test, and why."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Runs also what is marked to be skipped whatever the platform: Horovod's own timeline was not reliable."""
        for item in items:
            item.own_markers = [marker for marker in item.own_markers if marker.name != "skip"]

    def pytest_runtest_teardown(self, item: Any) -> None:  # noqa: ARG002
        """Shuts down after each test, so that one that failed on some ranks does not leave the next out of step."""
        shutdown()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keeps the worst of setup, call and teardown."""
        name = report.nodeid.rsplit("::", 1)[-1]
        if report.outcome == "passed" and (report.when != "call" or name in self.outcomes):
            return
        reason = ""
        if report.outcome == "failed":
            reason = str(report.longrepr.reprcrash.message).splitlines()[0] if report.longrepr else "?"
        elif report.outcome == "skipped":
            reason = str(report.longrepr[2])
        self.outcomes[name] = [report.outcome, reason]


if __name__ == "__main__":
    main()
