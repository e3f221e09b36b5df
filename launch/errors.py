"""Errors as a user sees them: one line, and an exit code.

2: the user's input (ValueError), a full disk among it; 1: the machine (RuntimeError, OSError); 75: stopped on
request, to be continued. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

EXIT_USER, EXIT_MACHINE, EXIT_STOPPED = 2, 1, 75

_PEER_GONE = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "recv failed",
    "socket timeout",
    "ncclremoteerror",
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a process ends with an error."""

    exit_code: int
    message: str
    rank: int = 0
    consequence: bool = False
    """True when it only says that another rank has gone."""
    of_all: bool = False
    """True when every rank says the same."""
    seconds: float = 0.0
    """When, for telling which came first."""


def describe(error: BaseException, *, rank: int = 0) -> Failure:
    """The failure that `error` means to a user."""
    from dist_train.checkpoint import CheckpointError

    text = " ".join(str(error).split())
    code = EXIT_USER if isinstance(error, (ValueError, CheckpointError)) else EXIT_MACHINE
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # the user can make room, nobody else
        code = EXIT_USER
    code = getattr(error, "exit_code", code)
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
    consequence = getattr(error, "consequence", None)  # a CollectiveError knows
    if consequence is None:
        consequence = isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _PEER_GONE)
        if consequence:
            text = f"rank {rank}: another rank is gone ({text[-160:]}); its own output says why"
    return Failure(
        exit_code=code,
        message=text,
        rank=rank,
        consequence=consequence,
        of_all=hasattr(error, "on_every_rank"),
        seconds=time.time(),
    )


def write_failure(folder: Path, failure: Failure) -> bool:
    """Leaves a rank's failure where the supervising process looks for it; False where it cannot (a full disk)."""
    path = folder / f"rank_{failure.rank:05d}.json"
    aside = path.with_suffix(".partial")
    try:
        aside.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        aside.replace(path)
    except OSError:
        return False
    return True


def read_failures(folder: Path) -> list[Failure]:
    """The failures that ranks left in `folder`, the earliest first."""
    found = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank_*.json")]
    return sorted(found, key=lambda failure: failure.seconds)
