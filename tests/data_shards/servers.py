"""Servers on loopback for tests of remote reading: HTTP with ranges and with faults, and S3."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest


@dataclass
class Fault:
    """What a server does wrong with one request."""

    kind: str
    """"status", "slow", "cut" (the answer ends early), "short" (and says so), "drop" (no answer), "whole" (the Range is
    ignored), "shifted" (another range)."""
    status: int = 500
    seconds: float = 0.0


@dataclass
class FileServer:
    """Serves a folder with range requests, and can be told to fail."""

    folder: Path
    fault_of: Callable[[str, int], Fault | None] = lambda _path, _number: None
    """Called with the path and the number of requests for it so far; its fault is what the request gets."""
    fails_heads: bool = False
    """Faults are for HEAD requests too, not only for GET."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range header) of all requests."""
    url: str = ""

    def gets(self, ending: str = "") -> list[str]:
        """Range headers of the GET requests for paths that end so."""
        return [sent for method, path, sent in self.requests if method == "GET" and path.endswith(ending)]


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """A real HTTP server of the files in a folder, on a free port of loopback."""
    files = FileServer(folder)
    counts: dict[str, int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            with lock:
                files.requests.append((self.command, self.path, self.headers.get("Range", "")))
                number = counts[self.path] = counts.get(self.path, -1) + 1
            fault = files.fault_of(self.path, number) if body or files.fails_heads else None
            path = files.folder / unquote(self.path).lstrip("/")
            if fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            if fault is not None and fault.kind == "drop":
                self.close_connection = True
                return
            if fault is not None and fault.kind == "status":
                self._send(fault.status, b"injected", {}, body=body)
                return
            if not path.is_file():
                self._send(404, b"no such file", {}, body=body)
                return
            size = path.stat().st_size
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or (fault is not None and fault.kind == "whole"):
                self._send(200, path.read_bytes(), {}, body=body)
                return
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
            if start >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"}, body=body)
                return
            if fault is not None and fault.kind == "shifted":
                start += 1
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
            self._send(206, content, headers, body=body, cut=fault is not None and fault.kind == "cut")

        def _send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True

    with _running(Handler) as port:
        files.url = f"http://127.0.0.1:{port}"
        yield files


@contextmanager
def bucket_of(folder: Path, prefix: str) -> Iterator[FileServer]:
    """The files below `folder` as s3://bucket/PREFIX/..., in moto's server behind a proxy that can be told to fail.

    AWS's environment variables lead every client of this process, and of those it starts, there.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch, proxying(port) as proxy:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_ENDPOINT_URL": proxy.url,
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="bucket")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder)}")
        client.close()
        yield proxy
    server.stop()


@contextmanager
def proxying(upstream_port: int) -> Iterator[FileServer]:
    """Passes requests on to another server of loopback, and can be told to fail instead."""
    files = FileServer(Path())
    counts: dict[str, int] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            with lock:
                files.requests.append((self.command, self.path, self.headers.get("Range", "")))
                number = counts[self.path] = counts.get(self.path, -1) + 1
            fault = files.fault_of(self.path, number) if self.command == "GET" else None
            if fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            if fault is not None and fault.kind == "drop":
                self.close_connection = True
                return
            upstream = HTTPConnection("127.0.0.1", upstream_port)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream.request(self.command, self.path, body=body, headers=dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            status = fault.status if fault is not None and fault.kind == "status" else answer.status
            if fault is not None and fault.kind == "short":
                content = content[: len(content) // 2]
            self.send_response(status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "content-length", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            cut = fault is not None and fault.kind == "cut"
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = cut
            upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = _pass_on

    with _running(Handler) as port:
        files.url = f"http://127.0.0.1:{port}"
        yield files


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server on a free port of loopback, while the block runs."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that has gone away is what some tests are about."""

    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
