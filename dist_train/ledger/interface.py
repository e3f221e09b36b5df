"""What the engine asks of a ledger, what a ledger asks of the ranks, and the ledger that does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ContextManager, Protocol  # noqa: UP035

from dist_train.ledger.flights import Flight


class Peers(Protocol):
    """How the members of a channel compare moments; `Collectives` does it."""

    def first_and_last(self, moments: Sequence[float], channel: int) -> tuple[list[float], list[float]]:
        """Element-wise minimum and maximum over the ranks of channel number `channel`; each of them calls it."""


class Recorder(Protocol):
    """What the engine asks of a ledger; `Ledger` does it, `NullLedger` does nothing."""

    def row(self, name: str, *, absorb: bool = False) -> ContextManager[Any]: ...
    def launch(
        self,
        name: str,
        *,
        op: str,
        num_bytes: int,
        sent_bytes: float,
        num_ranks: int,
        channel: int = 0,
        on_host: bool = False,
    ) -> Flight | None: ...
    def add_untimed(self, name: str, *, op: str, num_bytes: int, sent_bytes: float, num_ranks: int) -> None: ...
    def waiting(self, flight: Flight | None) -> ContextManager[Any]: ...
    def stamp(self) -> Any: ...
    def current(self) -> str: ...
    def add_bytes(self, row: str, num_bytes: int) -> None: ...
    def add_worker_costs(self, costs: Mapping[str, float]) -> None: ...
    def split_row(self, row: str, parts: Mapping[str, float]) -> None: ...
    def close_span(self, name: str, *, step: int, clips_seen: int) -> None: ...
    def training_begins(self) -> None: ...
    def note(self, kind: str, content: Mapping[str, Any]) -> None: ...
    def flush(self, peers: Peers | None = None) -> list[dict[str, Any]]: ...
    def end(self, exit_status: str) -> None: ...


class NullLedger:
    """A ledger that records nothing (`--monitor.ledger off`), to measure what the ledger costs."""

    _nothing = nullcontext()

    def row(self, name: str, *, absorb: bool = False) -> ContextManager[Any]:  # noqa: ARG002
        """A block that is not recorded."""
        return self._nothing

    def launch(self, name: str, **_: Any) -> None:
        """Not recorded."""

    def add_untimed(self, name: str, **_: Any) -> None:
        """Not recorded."""

    def waiting(self, flight: Flight | None) -> ContextManager[Any]:  # noqa: ARG002
        """A wait that is not recorded."""
        return self._nothing

    def stamp(self) -> None:
        """No stamp."""

    def current(self) -> str:
        """Unknown."""
        return ""

    def add_bytes(self, row: str, num_bytes: int) -> None:
        """Not recorded."""

    def add_worker_costs(self, costs: Mapping[str, float]) -> None:
        """Not recorded."""

    def split_row(self, row: str, parts: Mapping[str, float]) -> None:
        """Not recorded."""

    def close_span(self, name: str, *, step: int, clips_seen: int) -> None:
        """Not recorded."""

    def training_begins(self) -> None:
        """Not recorded."""

    def note(self, kind: str, content: Mapping[str, Any]) -> None:
        """Not recorded."""

    def flush(self, peers: Peers | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """Nothing was recorded: an empty list."""
        return []

    def end(self, exit_status: str) -> None:
        """Not recorded."""
