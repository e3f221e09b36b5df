"""What a rank is doing now: written by its main thread, read by its watchdog's thread, published to the other ranks.

Writing is plain attribute writes without a lock (well below a microsecond); a reader may see a change half done,
which costs a wrong word in an error message at worst.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_train.ledger.rows import EVALUATION, LOADER_WAIT

_STANDARD_LIBRARY = str(Path(os.__file__).parent)
# What says nothing about where a rank is: PyTorch, and the engine's own waiting.
_PLUMBING = (
    str(Path(torch.__file__).parent),
    *(str(Path(__file__).with_name(f"{name}.py")) for name in ("collectives", "watchdog")),
)


class Ticket(NamedTuple):
    """One collective, as its ranks count it: the `number`-th that a rank starts on `channel`."""

    channel: str
    number: int
    name: str
    members: tuple[int, ...] = ()
    """Ranks of the channel; empty: all."""


class _Channel:
    """How many collectives this rank has started on a process group."""

    __slots__ = ("members", "name", "started")

    def __init__(self, group: Any) -> None:
        self.name = "" if group is None else str(group.group_name)
        self.members = () if group is None else tuple(dist.get_process_group_ranks(group))
        self.started = 0


class Activity:
    """What this rank is doing now."""

    __slots__ = ("_channels", "loader", "phase", "step", "waiting", "waiting_since")

    def __init__(self) -> None:
        self.step: int | None = None
        """The step under way."""
        self.phase = ""
        """The phase under way."""
        self.loader: Callable[[], str] | None = None
        """Says what the loader in use is doing; called from another thread."""
        self.waiting: Ticket | None = None
        """The collective that this rank is blocked in."""
        self.waiting_since = 0.0
        """On the host's monotonic clock, in seconds."""
        self._channels: dict[Any, _Channel] = {}

    def started(self, name: str, group: Any = None) -> Ticket:
        """Counts a collective that this rank has just started on process group `group` (None: the default one)."""
        channel = self._channels.get(group)
        if channel is None:
            channel = self._channels[group] = _Channel(group)
        channel.started += 1
        return Ticket(channel.name, channel.started, name, channel.members)

    def counts(self) -> dict[str, int]:
        """Collectives started, by channel."""
        return {channel.name: channel.started for channel in list(self._channels.values())}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a rank publishes about itself; `seconds` are ages at the time of publication."""

    rank: int
    host: str
    pid: int
    node: str
    """Identifies the machine (and the container) whose process table `pid` is in."""
    beat: int
    """Counts the records of a rank."""
    unix_seconds: float
    step: int | None = None
    phase: str = ""
    stage: str = ""
    """The ledger's row."""
    stage_seconds: float = 0.0
    """Since when nothing has changed: step, phase, stage, and collectives started."""
    started: dict[str, int] = field(default_factory=dict)
    """Collectives started, by channel."""
    waiting: Ticket | None = None
    waiting_seconds: float = 0.0
    loader: str = ""
    """What the loader is doing, where the rank waits for it."""
    code: str = ""
    """File, line and function that the main thread is in."""
    ended: str | None = None
    """Why the rank's run has ended, where it has: an error, or "" at its normal end."""

    def to_json(self) -> str:
        """As it goes into the store."""
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """The reverse."""
        fields = json.loads(text)
        if fields["waiting"] is not None:
            channel, number, name, members = fields["waiting"]
            fields["waiting"] = Ticket(channel, number, name, tuple(members))
        return cls(**fields)

    @property
    def who(self) -> str:
        """`rank 2 (host n3, pid 123)`."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        """`step 12, phase main`."""
        parts = [f"step {self.step}" if self.step is not None else "", f"phase {self.phase}" if self.phase else ""]
        return ", ".join(part for part in parts if part)

    @property
    def doing(self) -> str:
        """`in loader_wait of step 12, phase main (worker 1: ...; at users.py:31 in forward)`, without for how long."""
        stage = f"waiting in {self.waiting.name}" if self.waiting is not None else self.stage and f"in {self.stage}"
        of = f"of {self.place}" if stage else f"in {self.place}"
        where = "; ".join(part for part in (self.loader, self.code and f"at {self.code}") if part)
        return " ".join(part for part in (stage, of if self.place else "", where and f"({where})") if part) or "at work"

    @property
    def doing_seconds(self) -> float:
        """For how long it had been doing that."""
        return self.waiting_seconds if self.waiting is not None else self.stage_seconds


def spell_ranks(ranks: Sequence[int]) -> str:
    """`rank 2`, `ranks 0-2, 7`."""
    ranks = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts)


def spell_seconds(seconds: float) -> str:
    """`71 s`, `2.5 s`."""
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


class Observer:
    """Makes this rank's records: called at intervals, from the watchdog's thread.

    Args:
        rank: of this process.
        activity: what the main thread writes.
        stage: names the stage that the main thread is in (the ledger's row).
    """

    def __init__(self, rank: int, activity: Activity, stage: Callable[[], str]) -> None:
        self._activity, self._stage = activity, stage
        self._identity: dict[str, Any] = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "node": node_id(),
        }
        self._beat = 0
        self._last: Any = None
        self._unchanged_since = time.perf_counter()

    def record(self, *, ended: str | None = None) -> Record:
        """What the main thread is doing now."""
        activity, now = self._activity, time.perf_counter()
        stage, counts, waiting, since = self._stage(), activity.counts(), activity.waiting, activity.waiting_since
        state = (activity.step, activity.phase, stage, counts)
        if state != self._last:
            self._last, self._unchanged_since = state, now
        self._beat += 1
        in_loader = waiting is None and stage in ("", LOADER_WAIT, EVALUATION)
        return Record(
            **self._identity,
            beat=self._beat,
            unix_seconds=time.time(),
            step=activity.step,
            phase=activity.phase,
            stage=stage,
            stage_seconds=now - self._unchanged_since,
            started=counts,
            waiting=waiting,
            waiting_seconds=now - since if waiting is not None else 0.0,
            loader=_said_by(activity.loader) if in_loader else "",
            code=main_thread_code(),
            ended=ended,
        )


def _said_by(loader: Callable[[], str] | None) -> str:
    """What the loader, whoever wrote it, is doing: nothing that it raises may end the records of this rank."""
    try:
        return "" if loader is None else loader()
    except Exception as error:
        return f"its loader does not say what it does: {type(error).__name__}: {error}"


def main_thread_code() -> str:
    """`users.py:31 in forward`: the innermost line of the main thread that is not a library's; "" where all are."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and _is_plumbing(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else _spell_line(frame, frame.f_lineno)


def spell_error(error: BaseException) -> str:
    """`ValueError: no such layer (at users.py:31 in forward)`, in one line of bounded length."""
    words = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    lines = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    own = [_spell_line(frame, number) for frame, number in lines if not _is_plumbing(frame.f_code.co_filename)]
    return f"{words} (at {own[-1]})" if own else words


def _spell_line(frame: FrameType, number: int) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{number} in {frame.f_code.co_name}"


def _is_plumbing(filename: str) -> bool:
    standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    return standard or filename.startswith(("<", *_PLUMBING))


def node_id() -> str:
    """Names the machine and the process table of this process: processes with the same can look at each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_fault(pid: int) -> str | None:
    """How process `pid` of this node is unable to go on: None where it runs."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "its process is gone"
    except (OSError, IndexError):
        return None
    if state in "ZX":
        return "its process has died"
    return "its process is stopped (SIGSTOP, or a debugger)" if state in "Tt" else None
