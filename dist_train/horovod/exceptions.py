"""The two errors that Horovod's programs catch."""

from __future__ import annotations


class HorovodInternalError(RuntimeError):
    """A collective failed: every rank that took part raises it, and an elastic run restores and starts anew."""


class HostsUpdatedInterrupt(RuntimeError):
    """The set of hosts changed: an elastic run starts anew from where it stands."""

    def __init__(self, skip_sync: bool) -> None:
        super().__init__(skip_sync)
        self.skip_sync = skip_sync
        """True when the state need not be broadcast again."""
