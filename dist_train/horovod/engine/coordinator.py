"""The thread on rank 0 that hears every rank's requests and tells all what to do next, in one order.

It sleeps in `select` while nobody asks for anything. Its answers to one rank travel over one stream, so two ranks see
the collectives that they share in the same order, whatever process sets those belong to.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import selectors
import socket
import struct
import threading
import time
from typing import Any

from dist_train.horovod.engine.matching import span
from dist_train.horovod.engine.messages import Channel, Response, pack
from dist_train.horovod.engine.negotiation import Negotiation
from dist_train.horovod.settings import Settings

logger = logging.getLogger(__name__)

TOKEN_BYTES = 32
_CHECK_SECONDS = 1.0
"""How often to look for stalls while something is waited for."""
_LAST_WORDS_SECONDS = 5.0
"""How long a rank may take to read why all has ended."""


class Coordinator(threading.Thread):
    """Serves until every rank has left, or one has gone without leaving, which ends it for all."""

    def __init__(self, listener: socket.socket, token: bytes, size: int, settings: Settings) -> None:
        super().__init__(name="horovod-coordinator", daemon=True)
        self._listener = listener
        self._token = token
        self._settings = settings
        self._size = size
        self._negotiation = Negotiation(
            size, fusion_threshold_bytes=settings.fusion_threshold_bytes, cache_capacity=settings.cache_capacity
        )
        self._channels: dict[int, Channel] = {}
        self._arrived = 0
        self._aborted = ""
        self._next_check = 0.0
        self._close_at = 0.0
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Answers until the last rank is gone."""
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        while self._channels or self._arrived < self._size:
            ready = self._selector.select(_CHECK_SECONDS if self._negotiation.waiting or self._aborted else None)
            for key, _ in ready:
                if key.data is None:
                    self._accept()
                elif key.data in self._channels:
                    self._hear(key.data)
            self._tell(self._negotiation.decide())
            self._check_stalls(time.monotonic())
            if self._aborted and time.monotonic() > self._close_at:
                for rank in list(self._channels):
                    self._forget(rank)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        connection, address = self._listener.accept()
        connection.settimeout(10)
        try:
            greeting = connection.recv(TOKEN_BYTES + 4, socket.MSG_WAITALL)
        except OSError:
            greeting = b""
        if not hmac.compare_digest(greeting[:TOKEN_BYTES], self._token) or len(greeting) != TOKEN_BYTES + 4:
            logger.warning("a connection from %s did not know this job's secret: it was refused", address)
            connection.close()
            return
        rank = struct.unpack("!I", greeting[TOKEN_BYTES:])[0]
        self._channels[rank] = Channel(connection)
        self._selector.register(connection, selectors.EVENT_READ, rank)
        self._arrived += 1
        if self._aborted:
            self._abort(self._aborted)
        elif self._arrived == self._size:
            for one in list(self._channels):
                self._send(one, pack(("welcome",)))

    def _hear(self, rank: int) -> None:
        try:
            for word, *content in self._channels[rank].receive():
                if not self._aborted:
                    self._heed(rank, word, *content)
        except EOFError:
            lost = rank in self._channels and not self._aborted
            if rank in self._channels:
                self._forget(rank)
            if lost:
                self._abort(f"rank {rank} is gone: its process ended, or its connection to rank 0 broke")

    def _heed(self, rank: int, word: str, *content: Any) -> None:
        now = time.monotonic()
        if word == "requests":
            known, requests = content
            for process_set, bits in known.items():
                self._negotiation.add_known(rank, process_set, bits, now)
            for request in requests:
                self._negotiation.add(rank, request, now)
        elif word == "join":
            self._negotiation.join(rank)
        elif word == "leave":
            self._negotiation.leave(rank, "has shut down")
            self._tell(self._negotiation.decide())
            self._send(rank, pack(("bye",)))
            self._forget(rank)
        elif word == "broken":
            self._abort(content[0])

    def _tell(self, responses: list[Response]) -> None:
        """Every rank gets the responses of the process sets it is in."""
        if not responses:
            return
        members = {response.process_set: set(self._negotiation.members(response.process_set)) for response in responses}
        told = [(response.process_set, self._negotiation.encode(response)) for response in responses]
        packed: dict[tuple[bool, ...], bytes] = {}
        for rank in list(self._channels):
            mine = tuple(rank in members[process_set] for process_set, _ in told)
            if any(mine):
                if mine not in packed:
                    chosen = [response for (_, response), is_mine in zip(told, mine, strict=True) if is_mine]
                    packed[mine] = pack(("responses", chosen))
                self._send(rank, packed[mine])

    def _send(self, rank: int, packed: bytes) -> None:
        with contextlib.suppress(OSError):  # the end of its stream is read next, and ends the job
            self._channels[rank].send_packed(packed)

    def _check_stalls(self, now: float) -> None:
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_SECONDS
        self._tell(self._negotiation.disagreements(now))
        limit, warn = self._settings.stall_shutdown_seconds, self._settings.stall_warning_seconds
        if limit and (lost := self._negotiation.overdue(now, limit)):
            self._abort(f"not all ranks asked for a collective in {limit:g} s: {_missing(lost)}")
        elif warn and (late := self._negotiation.overdue(now, warn, once=True)):
            logger.warning(
                "Some ranks have waited more than %g s for collectives that others have not asked for. The ranks may "
                "call different collectives, or one of them is stuck or gone. %s",
                warn,
                _missing(late),
            )

    def _abort(self, reason: str) -> None:
        self._negotiation.clear()
        self._aborted = reason
        self._close_at = time.monotonic() + _LAST_WORDS_SECONDS
        packed = pack(("abort", reason))
        for rank, channel in self._channels.items():
            self._send(rank, packed)
            with contextlib.suppress(OSError):
                channel.socket.shutdown(socket.SHUT_WR)  # closed once the rank has read this and closed its end

    def _forget(self, rank: int) -> None:
        channel = self._channels.pop(rank)
        self._selector.unregister(channel.socket)
        channel.close()


def _missing(stalled: dict[str, list[int]]) -> str:
    return "; ".join(f"{what} waits for {span(ranks)}" for what, ranks in stalled.items())
