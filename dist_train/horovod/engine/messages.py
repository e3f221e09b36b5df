"""What the ranks and the coordinator say to each other, and how it travels."""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

REDUCE_OPS = ("Average", "Sum", "Adasum", "Min", "Max", "Product")
"""Names of Horovod's reduce ops, by number."""

Key = tuple[int, str, str]
"""What the ranks' requests for one collective have in common: process set, kind and name."""


class Request(NamedTuple):
    """One rank asks for one collective, over one tensor or a group of them. Comparable and hashable."""

    kind: str
    """allreduce, allgather, broadcast, alltoall, reducescatter, barrier, add_process_set or remove_process_set."""
    name: str
    process_set: int = 0
    dtypes: tuple[str, ...] = ()
    """One per tensor, such as `float32`."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """One per tensor; the ranks of the set, in the requests that add one."""
    op: int = -1
    """The reduce op's number, in a reduction."""
    root: int = -1
    """The root's rank in the world, in a broadcast; the set's number, in the request that removes one."""
    prescale: float = 1.0
    postscale: float = 1.0
    device: str = "cpu"
    """`cpu` or `cuda`."""
    problem: str = ""
    """Why this rank cannot take part, so that the others do not wait for it."""

    @property
    def key(self) -> Key:
        """What this request is matched by."""
        return self.process_set, self.kind, self.name


class Response(NamedTuple):
    """What all ranks of a process set do next, at the same place in the same order."""

    kind: str
    """A request's kind, `join`, or `error`."""
    process_set: int
    requests: tuple[Request, ...] = ()
    """Requests to exchange together; each as its first rank made it."""
    first_dims: tuple[tuple[int, ...], ...] = ()
    """Per tensor of an allgather, the first dimension on each rank of the set."""
    error: str = ""
    """Why the requests failed, where kind is `error`."""
    value: int = 0
    """The rank that joined last, or the new process set's number."""


class Channel:
    """A stream of pickled objects over a connected socket. Both ends have proved that they are of this job."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._received = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For `selectors`."""
        return self.socket.fileno()

    def send(self, *message: Any) -> None:
        """Sends one message.

        Raises:
            OSError: the other end is gone.
        """
        self.send_packed(pack(message))

    def send_packed(self, packed: bytes) -> None:
        """Sends a message that `pack` made."""
        with self._sending:
            self.socket.sendall(packed)

    def receive(self) -> Iterator[Any]:
        """The messages that one read completes; blocks where nothing has arrived.

        Raises:
            EOFError: the other end is gone.
        """
        try:
            data = self.socket.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        while len(self._received) >= 4:
            end = 4 + struct.unpack_from("!I", self._received)[0]
            if len(self._received) < end:
                return
            message = pickle.loads(memoryview(self._received)[4:end])
            del self._received[:end]
            yield message

    def end(self) -> None:
        """Ends the stream in both directions."""
        with contextlib.suppress(OSError):  # the other end was first
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back."""
        self.socket.close()


def pack(message: Any) -> bytes:
    """A message with its length in front."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return struct.pack("!I", len(data)) + data
