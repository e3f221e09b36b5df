"""What Horovod's environment variables ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The variables of Horovod's that have a meaning here, with Horovod's defaults. Every rank needs the same ones."""

    fusion_threshold_bytes: int = 128 * 2**20
    """HOROVOD_FUSION_THRESHOLD: requests that are ready together are exchanged together up to this size; 0: never."""
    cycle_seconds: float = 0.001
    """HOROVOD_CYCLE_TIME (there in ms): how long a request may wait for company before its rank announces it."""
    cache_capacity: int = 1024
    """HOROVOD_CACHE_CAPACITY: how many named requests are announced by number once all ranks know them."""
    stall_warning_seconds: float = 60.0
    """HOROVOD_STALL_CHECK_TIME_SECONDS: when to warn of a request that some ranks did not make; 0: never."""
    stall_shutdown_seconds: float = 0.0
    """HOROVOD_STALL_SHUTDOWN_TIME_SECONDS: when to give up on it, on every rank; 0: never."""
    timeline: str = ""
    """HOROVOD_TIMELINE: the file that rank 0 writes its trace to; empty or DYNAMIC: none until start_timeline."""
    mark_cycles: bool = False
    """HOROVOD_TIMELINE_MARK_CYCLES: whether the trace shows each arrival of the coordinator's answers."""
    connect_seconds: float = 600.0
    """HOROVOD_GLOO_TIMEOUT_SECONDS: how long ranks look for each other in init()."""


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in an environment.

    Raises:
        ValueError: a value is not a number, or negative.
    """
    default = Settings()
    timeline = environ.get("HOROVOD_TIMELINE", "")
    stall_check = environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") in ("", "0")
    return Settings(
        fusion_threshold_bytes=int(_number(environ, "HOROVOD_FUSION_THRESHOLD", default.fusion_threshold_bytes)),
        cycle_seconds=_number(environ, "HOROVOD_CYCLE_TIME", default.cycle_seconds * 1000) / 1000,
        cache_capacity=int(_number(environ, "HOROVOD_CACHE_CAPACITY", default.cache_capacity)),
        stall_warning_seconds=_number(environ, "HOROVOD_STALL_CHECK_TIME_SECONDS", default.stall_warning_seconds)
        if stall_check
        else 0.0,
        stall_shutdown_seconds=_number(environ, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", default.stall_shutdown_seconds),
        timeline="" if timeline == "DYNAMIC" else timeline,
        mark_cycles=environ.get("HOROVOD_TIMELINE_MARK_CYCLES", "0") not in ("", "0"),
        connect_seconds=_number(environ, "HOROVOD_GLOO_TIMEOUT_SECONDS", default.connect_seconds),
    )


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value < 0:
        raise ValueError(f"{name}={text!r} is not a number of 0 or more: change it or unset it")
    return value
