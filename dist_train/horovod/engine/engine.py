"""This rank's end of the coordination: takes requests from the program, carries out what the coordinator answers.

Two threads. The listener talks to the coordinator: it sends what has been asked for in the last cycle and hands the
answers on. The executor carries them out one after the other on the process groups. The program's own thread only
queues a request, and sleeps in `Entry.wait`.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist

from dist_train.horovod.engine.entries import Entry
from dist_train.horovod.engine.execution import execute
from dist_train.horovod.engine.known import UNNAMED, KnownRequests
from dist_train.horovod.engine.messages import Channel, Key, Request, Response
from dist_train.horovod.engine.timeline import Timeline
from dist_train.horovod.exceptions import HorovodInternalError
from dist_train.horovod.settings import Settings

SHUT_DOWN = (
    "Horovod has been shut down. Either hvd.shutdown() was called, or a rank failed: look for the first error in the "
    "output of the ranks."
)
_STUCK_SECONDS = 5.0
"""How long shutdown waits, after a failure, for an exchange whose partners may be gone."""


class Engine:
    """Runs from init to shutdown. All methods are for the program's threads."""

    def __init__(
        self,
        channel: Channel,
        size: int,
        *,
        settings: Settings,
        timeline: Timeline,
        group_of: Callable[[tuple[int, ...]], dist.ProcessGroup],
        device: torch.device,
    ) -> None:
        """Takes over a channel that the coordinator has accepted.

        Args:
            channel: to the coordinator.
            size: ranks in the world.
            settings: Horovod's.
            timeline: written to while it is open.
            group_of: makes or finds the process group of these ranks. Called for a new one by the whole world, at the
                same place in the order of exchanges.
            device: the GPU of this rank, or the CPU.
        """
        self.members: dict[int, tuple[int, ...]] = {0: tuple(range(size))}
        """Ranks of each process set, by its number."""
        self._channel = channel
        self._settings = settings
        self._timeline = timeline
        self._group_of = group_of
        self._device = device
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._entries: dict[Key, Entry] = {}
        self._outbox: list[Request] = []
        self._known: defaultdict[int, KnownRequests] = defaultdict(lambda: KnownRequests(settings.cache_capacity))
        self._unnamed: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
        self._joins = 0
        self._closed = ""
        self._responses: queue.SimpleQueue[Response | None] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._listener = threading.Thread(target=self._listen, name="horovod-listener", daemon=True)
        self._executor = threading.Thread(target=self._execute_all, name="horovod-executor", daemon=True)
        self._listener.start()
        self._executor.start()

    @property
    def closed(self) -> str:
        """Why nothing can be asked for any more; empty while all is well."""
        return self._closed

    def submit(self, entry: Entry) -> None:
        """Asks for a collective; an empty name is replaced by the next number of the process set.

        Raises:
            ValueError: one of the same kind and name is under way.
            HorovodInternalError: the engine is shut down.
        """
        with self._lock:
            if not entry.request.name:
                number = next(self._unnamed[entry.request.process_set])
                entry.request = entry.request._replace(name=f"{UNNAMED}{self._joins}.{number}")
            request = entry.request
            if self._closed:
                raise HorovodInternalError(self._closed)
            if not request.problem:
                if request.key in self._entries:
                    raise ValueError(
                        f"{request.kind} {request.name!r} was asked for while another of that name is under way: "
                        "synchronize the first, or give the second another name"
                    )
                self._entries[request.key] = entry
            entry.asked = time.monotonic()
            wake = not self._outbox
            self._outbox.append(request)
        if wake:
            self._wake.send(b"\0")

    def join(self, device: torch.device | None) -> Entry:
        """Tells the coordinator that this rank has no more data; the entry's value will be the rank that came last.

        Args:
            device: where to make zeros when the others exchange tensors on a GPU; None: on this rank's.
        """
        entry = Entry(request=Request("join", ""))
        self._device = device or self._device
        self.flush()
        with self._lock:
            if self._closed:
                raise HorovodInternalError(self._closed)
            self._entries[entry.request.key] = entry
        self._send("join")
        return entry

    def flush(self) -> None:
        """Announces at once what has been asked for."""
        with self._sending:
            with self._lock:
                requests, self._outbox = self._outbox, []
                bits: dict[int, int] = {}
                others = []
                for request in requests:
                    if bit := self._known[request.process_set].bit(request):
                        bits[request.process_set] = bits.get(request.process_set, 0) | bit
                    else:
                        others.append(request)
            if requests:
                self._send("requests", bits, others)

    def close(self) -> None:
        """Leaves; other ranks may go on without this one. What is still waited for fails."""
        if not self._closed:
            self.flush()
            self._send("leave")
        self._listener.join()
        self._executor.join(None if self._closed == SHUT_DOWN else _STUCK_SECONDS)
        self._channel.close()
        self._wake.close()
        self._woken.close()

    @property
    def stuck(self) -> bool:
        """After `close`: whether an exchange still waits for ranks that are gone."""
        return self._executor.is_alive()

    def _send(self, *message: object) -> None:
        with contextlib.suppress(OSError):  # the listener reads why the connection has ended
            self._channel.send(*message)

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._channel.socket, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        flush_at: float | None = None
        listening = True
        while listening:
            timeout = None if flush_at is None else max(flush_at - time.monotonic(), 0)
            for key, _ in selector.select(timeout):
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                    flush_at = time.monotonic() + self._settings.cycle_seconds
                else:
                    listening = self._hear()
            if flush_at is not None and time.monotonic() >= flush_at:
                flush_at = None
                self.flush()
        selector.close()
        self._channel.end()
        self._responses.put(None)

    def _hear(self) -> bool:
        """Reads what has arrived; False at the end."""
        try:
            for word, *content in self._channel.receive():
                if word == "responses":
                    self._timeline.cycle()
                    for encoded in content[0]:
                        with self._lock:
                            response = self._known[encoded[1]].decode(encoded)
                        self._responses.put(response)
                elif word == "abort":
                    self._fail(f"Horovod has been shut down: {content[0]}.")
                    return False
                else:  # bye
                    self._fail(SHUT_DOWN, after_executor=True)
                    return False
        except EOFError:
            self._fail("Horovod has been shut down: rank 0 is gone.")
            return False
        return True

    def _fail(self, reason: str, after_executor: bool = False) -> None:
        """Nothing can be asked for any more, and what is waited for fails."""
        with self._lock:
            self._closed = self._closed or reason
            if not after_executor:
                entries, self._entries = list(self._entries.values()), {}
        if not after_executor:
            for entry in entries:
                entry.finish(self._closed)

    def _execute_all(self) -> None:
        while (response := self._responses.get()) is not None:
            with self._lock:
                entries = [self._entries.get(request.key) for request in response.requests]
            present = [entry for entry in entries if entry is not None]
            failure = ""
            try:
                self._execute(response, entries, present)
            except Exception as error:  # of the backend, of memory: whatever it is, the other ranks must not wait
                failure = f"{response.kind} {response.requests[0].name!r} failed: {error}"
                self._send("broken", f"on one rank {failure}")
            with self._lock:
                for entry in present:
                    self._entries.pop(entry.request.key, None)
            for entry in present:
                entry.finish(response.error or failure)
        self._fail(SHUT_DOWN)

    def _execute(self, response: Response, entries: list[Entry | None], present: list[Entry]) -> None:
        started = time.monotonic()
        for entry in present:
            entry.value = response.value
        if response.kind == "join":  # a rank that had joined has made fewer unnamed requests than others
            self._joins += 1
            self._unnamed.pop(response.process_set, None)
        elif response.kind in ("add_process_set", "remove_process_set"):
            self._change_process_sets(response)
        elif response.kind not in ("error", "barrier"):
            members = self.members[response.process_set]
            group = self._group_of(members)
            if response.requests[0].device == "cuda":
                self._execute_on_gpu(response, entries, present, members, group)
            else:
                execute(response, entries, members, group, self._device)
        ended = time.monotonic()
        for entry in present if self._timeline.is_open else ():
            tensor, activity = f"{entry.request.kind}.{entry.request.name}", entry.request.kind.upper()
            self._timeline.span(tensor, f"NEGOTIATE_{activity}", entry.asked, started)
            self._timeline.span(tensor, activity, started, ended)

    def _execute_on_gpu(
        self,
        response: Response,
        entries: list[Entry | None],
        present: list[Entry],
        members: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> None:
        """On a stream of its own, between the program's work that makes the inputs and what uses the outputs."""
        device = present[0].inputs[0].device if present else self._device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for entry in present:
                assert entry.inputs_ready is not None
                entry.inputs_ready.wait()
                for tensor in entry.inputs:
                    tensor.record_stream(stream)
            execute(response, entries, members, group, device)
            for entry in present:
                entry.outputs_ready = stream.record_event()

    def _change_process_sets(self, response: Response) -> None:
        if response.value < 0:
            return
        if response.kind == "add_process_set":
            ranks = response.requests[0].shapes[0]
            self._group_of(ranks)
            self.members[response.value] = ranks
            return
        self.members.pop(response.value, None)
        with self._lock:
            lost = [self._entries.pop(key) for key in list(self._entries) if key[0] == response.value]
        for entry in lost:
            entry.finish(f"{entry.request.kind} {entry.request.name!r}: its process set was removed")
