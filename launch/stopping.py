"""A request to stop: a signal sets a flag and nothing else; the loop agrees on it at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

# USR1 and USR2 are what SLURM's --signal is given; TERM is what pre-emption sends; INT is the user's Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Callable: was a stop requested? Handlers are in place inside its `with` block, the old ones after it."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _request(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self._signal = number
