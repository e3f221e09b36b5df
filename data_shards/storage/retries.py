"""What to do when a request fails: again after a pause, or at once an error that says why.

Pauses grow and are drawn at random ("full jitter", M. Brooker, Exponential backoff and jitter, AWS Architecture Blog,
2015), so that the ranks of a job that were refused together do not come back together.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

Result = TypeVar("Result")

_PASSING_STATUSES = (408, 425, 429)  # of the 4xx, those that another attempt can turn
_HOPELESS = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")
_NETWORK_PACKAGES = ("aiohttp", "aiobotocore", "botocore", "s3fs", "gcsfs", "adlfs", "azure", "google", "asyncio")


class UselessAnswerError(OSError):
    """The server answers, but not with what was asked for; another attempt would get the same."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to pause: before attempt k + 1 a random part of min(cap, base * 2**(k - 1)) seconds."""

    base_seconds: float = 0.5
    """The first pause at most."""
    cap_seconds: float = 30.0
    """Any pause at most."""
    generator: random.Random = field(default_factory=random.Random)
    """Draws the pauses; a seeded one makes them repeatable."""

    def seconds(self, attempt: int) -> float:
        """The pause after failed attempt number `attempt`, from 1."""
        return self.generator.uniform(0, self._most_seconds(attempt))

    def longest_seconds(self, num_attempts: int) -> float:
        """All pauses of so many attempts at most."""
        return sum(self._most_seconds(attempt) for attempt in range(1, num_attempts))

    def _most_seconds(self, attempt: int) -> float:
        return min(self.cap_seconds, self.base_seconds * 2 ** min(attempt - 1, 60))


async def retried(
    request: Callable[[], Awaitable[Result]],
    *,
    num_attempts: int,
    timeout_seconds: float,
    backoff: Backoff,
    slots: asyncio.Semaphore,
) -> Result:
    """What `request` gives, within `num_attempts` of `timeout_seconds` each.

    It ends after the time of all attempts and the longest pauses between them at the latest, so that many requests for
    one slot at a server that no longer answers fail together and not one after the other.

    Args:
        slots: bounds how many requests are under way; waiting for one is not in the timeout, pausing takes none.

    Raises:
        OSError: the last attempt's reason in `strerror`, and how long was tried; at once, and as FileNotFoundError or
            PermissionError where it is that, for what will not pass.
    """
    started = perf_counter()
    tried, reason = 0, ""
    last: Exception | None = None
    with suppress(TimeoutError):  # of the whole; an attempt's own is caught inside
        async with asyncio.timeout(num_attempts * timeout_seconds + backoff.longest_seconds(num_attempts)):
            while tried < num_attempts:
                if tried:
                    await asyncio.sleep(backoff.seconds(tried))
                async with slots:
                    tried, reason = tried + 1, "no answer"
                    try:
                        return await asyncio.wait_for(request(), timeout_seconds)
                    except Exception as error:
                        if not _is_of_the_network(error):
                            raise
                        last, reason = error, _reason(error, timeout_seconds)
                        if not _may_pass(error):
                            raise _as_os_error(error, reason) from error
    seconds = f"{perf_counter() - started:.1f} s"
    if not tried:
        raise OSError(errno.EIO, f"no connection was free for {seconds}, other requests wait for their answers")
    raise OSError(errno.EIO, f"{tried} attempts in {seconds}, the last: {reason}") from last


def _is_of_the_network(error: Exception) -> bool:
    """Not a mistake in our own code."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (FileNotFoundError, PermissionError, UselessAnswerError)):
        return False
    if type(error).__name__ in _HOPELESS:
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUSES)


def _reason(error: Exception, timeout_seconds: float) -> str:
    """One line."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_seconds:g} s"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if type(error) is OSError and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _as_os_error(error: Exception, reason: str) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file")
    status = getattr(error, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, reason)
    if isinstance(error, UselessAnswerError):
        return OSError(errno.ENOTSUP, str(error))
    return OSError(errno.EIO, reason)
