"""What `dist_train.horovod`'s coordinator needs for many ranks.

    python -m benchmarks.horovod_scale --ranks 1536 --tensors 160

One process runs the coordinator, another plays all ranks over real sockets: each announces the same named all-reduces,
first in full, then, as in every later training step, by number. Reported is the coordinator's own processor time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import secrets
import socket
import statistics
import struct
import time
from multiprocessing.connection import Connection

from dist_train.horovod.engine.coordinator import TOKEN_BYTES, Coordinator
from dist_train.horovod.engine.known import KnownRequests
from dist_train.horovod.engine.messages import Channel, Request, pack
from dist_train.horovod.settings import Settings


def main() -> None:
    """Plays the ranks and prints a line for the first step and one for the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1536)
    parser.add_argument("--tensors", type=int, default=160)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batches", type=int, default=4, help="messages in which a rank announces its tensors")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < options.ranks + 256:
        resource.setrlimit(resource.RLIMIT_NOFILE, (options.ranks + 256, hard))
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    token = secrets.token_bytes(TOKEN_BYTES)
    told, tell = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_coordinate, args=(listener, token, options.ranks, tell), daemon=True
    )
    process.start()
    channels = [_connect(listener.getsockname()[1], token, rank) for rank in range(options.ranks)]
    for channel in channels:
        assert list(channel.receive()) == [("welcome",)]
    requests = [
        Request("allreduce", f"layer.{i}", dtypes=("float32",), shapes=((512, 512),), op=1)
        for i in range(options.tensors)
    ]
    table = KnownRequests(len(requests))
    for step in range(options.steps + 1):
        started, ready = _processor_seconds(told), 0
        if step == 0:
            messages = [pack(("requests", {}, requests[i :: options.batches])) for i in range(options.batches)]
        elif step == 1:
            bits = [sum(map(table.bit, requests[i :: options.batches])) for i in range(options.batches)]
            messages = [pack(("requests", {0: some}, [])) for some in bits]
            seconds: list[float] = []
        for message in messages:
            for channel in channels:
                channel.send_packed(message)
        while ready < options.tensors:
            ready += sum(len(table.decode(one).requests) for _, found in channels[0].receive() for one in found)
        for channel in channels[1:]:
            answered = 0
            while answered < ready:
                answered += sum(len(one[2]) for _, found in channel.receive() for one in found)
        spent = _processor_seconds(told) - started
        if step == 0:
            print(f"{options.ranks} ranks, {options.tensors} tensors: first step {spent:.2f} s of processor time")
        else:
            seconds.append(spent)
    print(
        f"later steps {1000 * statistics.median(seconds):.0f} ms of processor time "
        f"({1e6 * statistics.median(seconds) / options.ranks:.0f} us a rank)"
    )


def _coordinate(listener: socket.socket, token: bytes, size: int, tell: Connection) -> None:
    Coordinator(listener, token, size, Settings(cache_capacity=10**6)).start()
    while True:
        tell.recv()
        tell.send(time.process_time())


def _processor_seconds(told: Connection) -> float:
    told.send(None)
    return float(told.recv())


def _connect(port: int, token: bytes, rank: int) -> Channel:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(token + struct.pack("!I", rank))
    return Channel(connection)


if __name__ == "__main__":
    main()
