"""Requests that all ranks of a process set have made before, and from then on announce as bits of a number.

The table grows in the order of the responses, which every member sees alike, so all agree on it without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_train.horovod.engine.messages import Key, Request, Response

UNNAMED = "noname."
"""Where the name of a request starts that its caller gave none; such a name never comes again."""
_LASTING = ("allreduce", "broadcast", "reducescatter", "barrier")
"""Kinds whose requests are the same on every rank."""


class KnownRequests:
    """The numbered requests of one process set: the first `capacity` of them, of which none is forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._requests: list[Request] = []
        self._numbers: dict[Request, int] = {}
        self._masks: dict[Key, int] = {}

    def bit(self, request: Request) -> int:
        """The request's bit, or 0 where it has none."""
        number = self._numbers.get(request)
        return 0 if number is None else 1 << number

    def mask(self, key: Key) -> int:
        """The bits of all requests under one key (the same name with another shape is another request)."""
        return self._masks.get(key, 0)

    def of(self, bits: int) -> Iterator[Request]:
        """The requests whose bits are set, in order of their numbers."""
        while bits:
            lowest = bits & -bits
            yield self._requests[lowest.bit_length() - 1]
            bits ^= lowest

    def encode(self, response: Response) -> tuple[Any, ...]:
        """A response as it travels: with numbers in place of known requests. Learns the others."""
        requests = tuple(self._numbers.get(request, request) for request in response.requests)
        self._learn(response)
        return (response.kind, response.process_set, requests, *response[3:])

    def decode(self, encoded: tuple[Any, ...]) -> Response:
        """The response that `encode` was given, and learns alike."""
        kind, process_set, items, *others = encoded
        requests = tuple(self._requests[item] if isinstance(item, int) else item for item in items)
        response = Response(kind, process_set, requests, *others)
        self._learn(response)
        return response

    def _learn(self, response: Response) -> None:
        if response.kind not in _LASTING:
            return
        for request in response.requests:
            new = request not in self._numbers and not request.name.startswith(UNNAMED)
            if new and len(self._requests) < self._capacity:
                number = len(self._requests)
                self._numbers[request] = number
                self._requests.append(request)
                self._masks[request.key] = self._masks.get(request.key, 0) | 1 << number
