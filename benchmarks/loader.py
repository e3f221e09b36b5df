"""The loader against its peers and against the limit: the same clips, the same work, in turns within one run.

    .venv/bin/python -m benchmarks.loader --make-peers build/peers            # once: a venv of the peers' own
    .venv/bin/python -m benchmarks.loader --peers-python build/peers/bin/python --markdown

The work of every arm is `benchmarks.loader_peers.work`: 8 frames of a clip (TSN's segments), TSM's multi-scale crop, to
224x224, batches of 8 clips of uint8. An arm is a process of its own with `--workers` worker processes. A turn makes its
pipeline anew, warms it until its buffers were filled and emptied once, and times whole rounds of its workers; arms take
turns, so noise longer than a turn hits all of them, and ratios are of turns of the same round. The limit decodes and
frames the payloads in memory in as many processes, with no pipeline at all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.loader_peers.run import ARMS
from benchmarks.loader_peers.work import BATCH_CLIPS, Place
from benchmarks.loader_sets import make_kinetics_like, make_real
from benchmarks.pairs import Ratio, Row, table

REPOSITORY = Path(__file__).resolve().parent.parent
FOOTAGE = REPOSITORY.parent / "shared" / "data" / "tennis7"
PEERS = ("torchcodec", "webdataset", "litdata", "mosaicml-streaming", "decord", "pillow")
PINNED = ("torch", "numpy", "av", "webdataset", "torchcodec")
"""What the peers' venv must have at our version: the comparison is of loaders."""
FORMS = {
    "mp4": [],
    "gop8": ["--as", "mp4", "--short-side", "256", "--gop", "8"],
    "jpeg": ["--as", "jpeg"],
}
"""How `reelscale pack` is told to store the clips."""
NAMES = {
    "ours": "ours",
    "limit": "the limit: decode and frame in a loop",
    "webdataset_pyav": "webdataset + PyAV",
    "webdataset_torchcodec": "webdataset + TorchCodec",
    "litdata_torchcodec": "LitData + TorchCodec",
    "mosaicml_torchcodec": "mosaicml-streaming + TorchCodec",
    "files_decord": "files + decord",
    "files_torchcodec": "files + TorchCodec",
}
OUR_SIDE = ("ours", "limit")
_FOLDERS = {"files": "files", "litdata": "litdata", "mosaicml": "mds"}
_PATIENCE_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and for how long."""

    folder: Path
    """Where the sets are made and kept."""
    footage: Path
    """Real clips with a labels.csv."""
    peers_python: Path | None
    """The Python of the peers' venv; without it only ours and the limit are measured."""
    num_clips: int = 128
    """Clips of the Kinetics-like set."""
    workers: int = 2
    """Worker processes of each arm."""
    rounds: int = 7
    """Turns of each arm."""
    seconds: float = 6.0
    """Length of a turn's timed part, about."""


class Arm:
    """One loader on one form, in a process group of its own; `error` says why it has ended."""

    def __init__(self, name: str, form: str, place: Place, options: Options) -> None:
        self.name, self.form = name, form
        self._folder = getattr(place, _FOLDERS.get(name.partition("_")[0], "shards"))
        self.error = ""
        python = Path(sys.executable) if name in OUR_SIDE else options.peers_python
        assert python is not None
        values = json.dumps({key: str(value) for key, value in asdict(place).items()})
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [str(python), "-P", "-m", "benchmarks.loader_peers.run", name, values, str(options.workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        )
        self._answer()

    @property
    def title(self) -> str:
        """For people."""
        return f"{NAMES[self.name]}, {self.form}"

    def warm_cache(self) -> None:
        """Bring what the arm reads into the machine's page cache: turns are about loaders, not about the disk."""
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass

    def ask(self, **request: Any) -> dict[str, float] | None:
        """The answer to one request; None where the arm has failed (then, and from then on)."""
        if self.error:
            return None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                file.close()

    def _answer(self) -> dict[str, float] | None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _PATIENCE_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        answer = json.loads(line) if line else {"error": "no answer" if not ready else self._last_words()}
        if "error" in answer:
            self.error = answer["error"]
            return None
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().splitlines()
        return lines[-1][:300] if lines else "it ended without a word"


def measure(arms: Sequence[Arm], options: Options) -> dict[Arm, list[dict[str, float]]]:
    """The turns of each arm, those of a round next to each other; an arm that fails has none."""
    batches: dict[Arm, int] = {}
    turns: dict[Arm, list[dict[str, float]]] = {arm: [] for arm in arms}
    step = 2 * options.workers  # whole rounds of the workers, which deliver about at once
    for round_number in range(-1, options.rounds):
        shift = round_number % len(arms)
        for arm in [*arms[shift:], *arms[:shift]]:
            arm.warm_cache()
            seen = arm.ask(do="turn", batches=batches.get(arm, step), seconds=options.seconds)
            if seen is None:
                continue
            if round_number < 0:  # to know how much is enough
                wanted = seen["clips_per_second"] * options.seconds / BATCH_CLIPS
                batches[arm] = max(1, round(wanted / step)) * step
            else:
                turns[arm].append(seen)
            print(f"{arm.title}: {seen['clips_per_second']:.1f} clips/s", file=sys.stderr, flush=True)
    return {arm: [] if arm.error else of_arm for arm, of_arm in turns.items()}


def rows_of(set_name: str, turns: dict[Arm, list[dict[str, float]]]) -> list[Row]:
    """A row for each arm, with ours at the same form against it; then our cheaper forms against the peers' default."""
    ours = {arm.form: of_arm for arm, of_arm in turns.items() if arm.name == "ours" and of_arm}
    rows = []
    for arm, of_arm in turns.items():
        what = f"{set_name}, {arm.form}: {NAMES[arm.name]}"
        if not of_arm:
            rows.append(Row(what=what, seen=f"not measured: {arm.error}"))
            continue
        seen = describe(of_arm, reads=arm.name != "limit")
        if arm.name == "ours" or arm.form not in ours:
            rows.append(Row(what=what, seen=seen))
            continue
        ratio = ratio_of(ours[arm.form], of_arm)
        goal = "at least 0.95" if arm.name == "limit" else "above 1"
        rows.append(Row(what=what, seen=f"{seen}; ours / it {ratio}", goal=goal))
    for form in ("gop8", "jpeg"):
        peers = [(arm, of_arm) for arm, of_arm in turns.items() if arm.name not in OUR_SIDE and arm.form == "mp4"]
        for arm, of_arm in peers:
            if form in ours and of_arm:
                ratio = ratio_of(ours[form], of_arm)
                rows.append(
                    Row(what=f"{set_name}: ours, {form} / {arm.title}", seen=str(ratio), goal="several times 1")
                )
    return rows


def describe(turns: Sequence[dict[str, float]], *, reads: bool) -> str:
    """The medians of an arm's turns."""
    rate, cpu, read = (
        statistics.median(turn[name] for turn in turns)
        for name in ("clips_per_second", "cpu_milliseconds", "read_bytes")
    )
    seen = f"{rate:.1f} clips/s, {cpu:.1f} ms CPU a clip"
    if not reads:
        return seen
    return f"{seen}, {read / 1e3:,.0f} kB read a clip" if read > 5e3 else f"{seen}, reads through a memory map"


def ratio_of(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> Ratio:
    """Ours over theirs, turn by turn."""
    return Ratio.of([turn["clips_per_second"] for turn in ours], [turn["clips_per_second"] for turn in theirs])


def throughput(set_name: str, places: dict[str, Place | str], options: Options) -> list[Row]:
    """All arms on one set."""
    wanted: list[tuple[str, str]] = []
    for form in places:
        peers = [name for name in ARMS if name not in OUR_SIDE] if form == "mp4" else ["webdataset_torchcodec"]
        if form == "jpeg" or options.peers_python is None:
            peers = []
        wanted += [(name, form) for name in (*OUR_SIDE, *peers)]
    rows = [
        Row(what=f"{set_name}, {form}", seen=f"not packed: {place}")
        for form, place in places.items()
        if isinstance(place, str)
    ]
    arms = []
    try:
        for name, form in wanted:
            place = places[form]
            if isinstance(place, Place):
                arms.append(Arm(name, form, place, options))
        return rows + rows_of(set_name, measure(arms, options))
    finally:
        for arm in arms:
            arm.close()


def resume_rows(place: Place, num_clips: int, options: Options) -> list[Row]:
    """Seconds to the first batch at 90 % of an epoch."""
    position = num_clips * 9 // 10 // BATCH_CLIPS * BATCH_CLIPS
    names = [name for name in ARMS if name != "limit" and (name == "ours" or options.peers_python is not None)]
    rows = []
    seconds: dict[str, list[float]] = {}
    for name in names:
        arm = Arm(name, "mp4", place, options)
        try:
            answers = [arm.ask(do="resume", position=position) for _ in range(3)]
        finally:
            arm.close()
        what = f"kinetics, first batch at clip {position} of {num_clips}: {NAMES[name]}"
        seconds[name] = [answer["seconds"] for answer in answers if answer is not None]
        if not seconds[name]:
            rows.append(Row(what=what, seen=f"not measured: {arm.error}"))
            continue
        seen = f"{statistics.median(seconds[name]):.2f} s"
        if name != "ours" and seconds["ours"]:
            seen += f", {statistics.median(seconds[name]) / statistics.median(seconds['ours']):.1f} times ours"
        rows.append(Row(what=what, seen=seen))
    return rows


def make_peers(folder: Path) -> None:
    """A venv at `folder` with the peers, at this environment's versions of what both use."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = "".join(f"{name}=={importlib.metadata.version(name).partition('+')[0]}\n" for name in _installed(PINNED))
    (folder / "constraints.txt").write_text(pins)
    pip = [str(folder / "bin" / "pip"), "install", "-q", "-c", str(folder / "constraints.txt")]
    for name in ("torch", *PEERS, "av"):
        if subprocess.run([*pip, name], check=False).returncode:
            print(f"{name} cannot be installed: its rows will say so", file=sys.stderr)


def _installed(names: Sequence[str]) -> list[str]:
    return [name for name in names if any(importlib.metadata.distributions(name=name))]


def make_places(
    name: str, videos: Path, folder: Path, options: Options, forms: Sequence[str]
) -> dict[str, Place | str]:
    """The set in every form that a loader reads, made once; a string says why a form is not there."""
    litdata, mds = folder / "litdata", folder / "mds"
    if options.peers_python is not None:
        for target, writer in ((litdata, "write_litdata"), (mds, "write_mds")):
            if not target.is_dir():
                _write_for_peer(options.peers_python, writer, videos, target)
    places: dict[str, Place | str] = {}
    for form in forms:
        shards = folder / f"shards-{form}"
        if not shards.is_dir():
            print(f"packing {name} as {form}", file=sys.stderr, flush=True)
            command = [sys.executable, "-P", "-m", "launch.entry", "pack", str(videos), str(shards), *FORMS[form]]
            small = "400" if form == "jpeg" else "8"  # a tar or more for each worker
            done = subprocess.run(
                [*command, "--val-fraction", "0", "--max-shard-megabytes", small],
                cwd=REPOSITORY,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                check=False,
            )
            if done.returncode:
                places[form] = (done.stderr.splitlines() or ["no reason given"])[-1][:300]
                continue
        places[form] = Place(files=videos, shards=shards / "train", litdata=litdata, mds=mds)
    return places


def _write_for_peer(python: Path, writer: str, videos: Path, target: Path) -> None:
    """Have a peer write its own format; where it cannot, its arm says why."""
    code = (
        "import sys, pathlib; from benchmarks.loader_peers import peers\n"
        "if __name__ == '__main__': getattr(peers, sys.argv[1])(*map(pathlib.Path, sys.argv[2:]))"
    )
    subprocess.run(
        [str(python), "-c", code, writer, str(videos), str(target)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def run(sections: Sequence[str], options: Options) -> list[Row]:
    """The rows of the sections asked for."""
    rows: list[Row] = []
    workers = os.cpu_count() or 1
    if "kinetics" in sections or "resume" in sections:
        folder = options.folder / "kinetics"
        videos = make_kinetics_like(options.footage, folder / "videos", num_clips=options.num_clips, workers=workers)
        forms = tuple(FORMS) if "kinetics" in sections else ("mp4",)
        places = make_places("kinetics", videos, folder, options, forms)
        if "kinetics" in sections:
            rows += throughput("kinetics", places, options)
        if "resume" in sections and isinstance(places["mp4"], Place):
            rows += resume_rows(places["mp4"], options.num_clips, options)
    if "real" in sections:
        folder = options.folder / "real"
        videos = make_real(options.footage, folder / "videos", num_clips=10**6)
        rows += throughput("real", make_places("real", videos, folder, options, ("mp4",)), options)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=["kinetics", "real", "resume"])
    parser.add_argument("--make-peers", type=Path, help="make the peers' venv there, and do nothing else")
    parser.add_argument("--peers-python", type=Path, help="python of that venv; without it no peer is measured")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "benchmarks", help="where sets are kept")
    parser.add_argument("--footage", type=Path, default=FOOTAGE, help="real clips with a labels.csv (file,label)")
    for name in ("num_clips", "workers", "rounds"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Options, name))
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="timed part of a turn")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if given.make_peers is not None:
        make_peers(given.make_peers)
        return
    unknown = set(given.sections) - {"kinetics", "real", "resume"}
    if unknown:
        parser.error(f"unknown section {sorted(unknown)[0]!r}; there are kinetics, real, resume")
    if given.peers_python is not None and not given.peers_python.is_file():
        parser.error(f"{given.peers_python} is not there; make it with --make-peers FOLDER")
    values = {name: getattr(given, name) for name in Options.__dataclass_fields__}
    options = replace(Options(**values), folder=given.folder.resolve())
    try:
        print(table(run(given.sections, options), markdown=given.markdown))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
