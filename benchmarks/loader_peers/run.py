"""One arm in a process of its own: turns asked for on standard input, their figures on standard output, as JSON lines.

python -m benchmarks.loader_peers.run webdataset_pyav PLACE_AS_JSON WORKERS
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.loader_peers.work import BATCH_CLIPS, PREFETCH_BATCHES, Place

ARMS = {
    "ours": "ours",
    "limit": "ours",
    "webdataset_pyav": "peers",
    "webdataset_torchcodec": "peers",
    "litdata_torchcodec": "peers",
    "mosaicml_torchcodec": "peers",
    "files_decord": "peers",
    "files_torchcodec": "peers",
}


def session_totals() -> tuple[float, int]:
    """Processor seconds and bytes asked of `read` by all processes of this session: this one and its workers."""
    session, tick = os.getsid(0), os.sysconf("SC_CLK_TCK")
    seconds, num_bytes = 0.0, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            seconds += (int(fields[11]) + int(fields[12])) / tick
            num_bytes += int((folder / "io").read_text().split("rchar: ")[1].split()[0])
        except (OSError, IndexError):  # it has just ended
            continue
    return seconds, num_bytes


def turn(arm: Callable[..., Any], place: Place, workers: int, num_batches: int) -> dict[str, float]:
    """A pipeline made, warmed until its buffers have been filled and emptied once, and `num_batches` of it timed."""
    with arm(place, workers) as stream:
        for _ in range(workers * PREFETCH_BATCHES):
            next(stream)
        cpu, read = session_totals()
        started = time.perf_counter()
        for _ in range(num_batches):
            next(stream)
        seconds = time.perf_counter() - started
        cpu_end, read_end = session_totals()
    clips = num_batches * BATCH_CLIPS
    return {
        "clips_per_second": clips / seconds,
        "cpu_milliseconds": 1e3 * (cpu_end - cpu) / clips,
        "read_bytes": (read_end - read) / clips,
    }


def limit_turn(place: Place, workers: int, seconds: float) -> dict[str, float]:
    """The limit's figures; what it reads it read before."""
    from benchmarks.loader_peers.ours import limit

    rate, cpu_seconds = limit(place, workers, seconds)
    return {"clips_per_second": rate, "cpu_milliseconds": 1e3 * cpu_seconds, "read_bytes": 0.0}


def resume(arm: Callable[..., Any], place: Place, workers: int, position: int) -> dict[str, float]:
    """Seconds from nothing to the first batch at `position`."""
    with arm(place, workers, position) as stream:  # once before: state that a peer needs is made, code is loaded
        next(stream)
        del stream
    gc.collect()
    started = time.perf_counter()
    with arm(place, workers, position) as stream:
        next(stream)
        return {"seconds": time.perf_counter() - started}


def main() -> None:
    """Answer requests until standard input ends."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    name, workers = sys.argv[1], int(sys.argv[3])
    place = Place(**{key: Path(value) for key, value in json.loads(sys.argv[2]).items()})
    try:
        arm = getattr(importlib.import_module(f"benchmarks.loader_peers.{ARMS[name]}"), name)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "resume":
                answer = resume(arm, place, workers, request["position"])
            elif name == "limit":
                answer = limit_turn(place, workers, request["seconds"])
            else:
                answer = turn(arm, place, workers, request["batches"])
            gc.collect()  # a pipeline's worker processes end with it
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:  # a peer may fail in any way: it is a line of the table
        words = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"error": words[:300]}), file=answers, flush=True)
        sys.stderr.write(words + "\n")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
