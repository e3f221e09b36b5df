"""One request for a range of a remote file: fsspec does it, and here its answer is checked.

An fsspec file system that is configured outside (its environment variables, `~/.config/fsspec`, AWS's and Google's own
files) is taken as it is; only its own retries are turned off, where it has a switch, for `retries` does that.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

from data_shards.storage.retries import UselessAnswerError
from data_shards.storage.urls import below

Result = TypeVar("Result")

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}


class CutAnswerError(ConnectionError):
    """The answer ended before all bytes had come."""


class RemoteFiles:
    """Ranges of the files below a URL, by any file system of fsspec."""

    def __init__(self, file_system: Any, path: str) -> None:
        self._fs, self._path = file_system, path
        self._sizes: dict[str, int | None] = {}

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on fsspec's event loop, in its own thread, and wait for it; any thread may."""
        from fsspec.asyn import get_loop

        return asyncio.run_coroutine_threadsafe(coroutine, get_loop()).result()

    async def fetch(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop - 1`, fewer only where the file ends before.

        Raises what the file system does, CutAnswerError, or UselessAnswerError where the server does not do ranges.
        """
        try:
            content = await self._fetch(name, start, stop)
        except (OSError, ValueError) as error:
            if "range" in str(error).lower() and start >= (await self.size(name) or stop):
                return b""  # the file ends before `start`
            raise
        if len(content) > stop - start:
            raise UselessAnswerError(
                f"the server sent {len(content)} bytes where {stop - start} were asked for: it ignores range requests; "
                "serve the set from one that does them, or copy it here"
            )
        if len(content) < stop - start:
            size = await self.size(name)
            if size is not None and len(content) < min(stop, size) - start:
                raise CutAnswerError(f"the answer ended after {len(content)} of {min(stop, size) - start} bytes")
        return content

    async def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where the server does not say."""
        if name not in self._sizes:
            self._sizes[name] = await self._size(below(self._path, name))
        return self._sizes[name]

    async def _fetch(self, name: str, start: int, stop: int) -> bytes:
        path = below(self._path, name)
        if self._fs.async_impl:
            return await self._fs._cat_file(path, start=start, end=stop)
        return await asyncio.to_thread(self._fs.cat_file, path, start=start, end=stop)

    async def _size(self, path: str) -> int | None:
        if self._fs.async_impl:
            return (await self._fs._info(path)).get("size")
        return (await asyncio.to_thread(self._fs.info, path)).get("size")


class HttpFiles(RemoteFiles):
    """The same over http, where a server may answer a request for a range with the whole file or another range."""

    async def _fetch(self, name: str, start: int, stop: int) -> bytes:
        path = below(self._path, name)
        session = await self._fs.set_session()
        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._fs.encode_url(path), headers=headers, **options) as response:
            if response.status == 416:  # the file ends before `start`
                return b""
            if response.status == 404:
                raise FileNotFoundError(path)
            response.raise_for_status()
            length = response.content_length
            if response.status == 200 and start == 0 and length is not None and length <= stop:
                self._sizes[name] = length
                return await response.read()
            sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if response.status != 206 or sent is None or int(sent[1]) != start:
                raise UselessAnswerError(
                    f"the server answered a request for bytes {start} to {stop - 1} with HTTP {response.status} and "
                    f"Content-Range {response.headers.get('Content-Range')!r}: it ignores range requests; serve the "
                    "set from one that does them, or copy it here"
                )
            if sent[3] != "*":
                self._sizes[name] = int(sent[3])
            content = await response.read()
            if len(content) != int(sent[2]) + 1 - start:
                raise CutAnswerError(f"the answer ended after {len(content)} of {int(sent[2]) + 1 - start} bytes")
            return content

    async def _size(self, path: str) -> int | None:
        try:
            return await super()._size(path)
        except FileNotFoundError as error:  # fsspec's word for any answer but a good one
            if error.__cause__ is None or getattr(error.__cause__, "status", 404) == 404:
                raise
            raise error.__cause__ from None


def open_remote_files(root: str, *, num_connections: int) -> RemoteFiles:
    """The files below `root`, a URL, over `num_connections` connections; no request is made.

    Raises ValueError where fsspec does not know the kind of URL, or the package for it is missing.
    """
    import fsspec

    scheme = root.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        retries = {"mode": "standard", "total_max_attempts": 1}
        options["config_kwargs"] = {"retries": retries, "max_pool_connections": num_connections}
    try:
        file_system, path = fsspec.core.url_to_fs(root, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        hint = f"pip install {package}" if package else " ".join(str(error).split())
        raise ValueError(f"{root}: reading {scheme}:// needs a package that is not installed: {hint}") from None
    except ValueError as error:
        raise ValueError(f"{root}: {' '.join(str(error).split())}; use s3://, gs://, https:// or a folder") from None
    if scheme in ("http", "https"):
        return HttpFiles(file_system, root)
    if scheme in ("s3", "s3a"):
        file_system.retries = 1  # s3fs's own, on top of botocore's
    return RemoteFiles(file_system, path)
