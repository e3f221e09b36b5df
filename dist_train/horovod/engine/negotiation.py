"""What the coordinator decides: which requests are ready, which contradict each other, what is exchanged together.

A pure state machine without sockets, threads or clocks, so that every rule of Horovod's is tested as a function.

Requests arrive in two forms. A new one is tallied by rank under its key and compared when it is complete. One that all
ranks have made before arrives as a bit (see `known`); the set of ready ones is the AND of the ranks' bits, so that a
training step costs the coordinator one operation a rank and not one a tensor and rank. A bit whose name somebody asks
for in another form, or that waits for long, is moved to the tallies.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from dist_train.horovod.engine.fusion import fuse
from dist_train.horovod.engine.known import KnownRequests
from dist_train.horovod.engine.matching import mismatch, span
from dist_train.horovod.engine.messages import Key, Request, Response

_WORLD = 0
_DISAGREE_SECONDS = 5.0
"""How long the ranks may ask for different kinds of collective under one name before it is taken for a mistake."""


@dataclass
class _Tally:
    """The requests of one collective so far."""

    since: float
    requests: dict[int, Request] = field(default_factory=dict)
    told: bool = False


@dataclass
class _Announced:
    """The known requests of one process set that some ranks have made and that are not ready yet."""

    by_rank: dict[int, int] = field(default_factory=dict)
    """Bits of the ranks that have any."""
    since: dict[Request, float] = field(default_factory=dict)
    seen: int = 0
    """Bits that some rank has."""
    tallied: int = 0
    """Bits of those whose key has a tally now."""


class Negotiation:
    """The coordinator's state. Process set 0 is the world."""

    def __init__(self, size: int, *, fusion_threshold_bytes: int, cache_capacity: int) -> None:
        self._fusion_threshold_bytes = fusion_threshold_bytes
        self._members: dict[int, tuple[int, ...]] = {_WORLD: tuple(range(size))}
        self._sets_made = 1
        self._tallies: dict[Key, _Tally] = {}
        self._touched: dict[Key, None] = {}
        self._known: defaultdict[int, KnownRequests] = defaultdict(lambda: KnownRequests(cache_capacity))
        self._announced: defaultdict[int, _Announced] = defaultdict(_Announced)
        self._joined: dict[int, None] = {}
        self._gone: dict[int, str] = {}

    @property
    def waiting(self) -> bool:
        """Whether some rank waits for a collective."""
        return bool(self._tallies) or any(announced.since for announced in self._announced.values())

    def members(self, process_set: int) -> tuple[int, ...]:
        """The ranks of a process set, in order; nobody where there is no such set."""
        return self._members.get(process_set, ())

    def add(self, rank: int, request: Request, now: float) -> None:
        """Rank `rank` asks for a collective at time `now`, in seconds."""
        key = request.key
        if key not in self._tallies:
            self._tallies[key] = _Tally(now)
            if mask := self._known[key[0]].mask(key):
                self._announced[key[0]].tallied |= mask
                self._move_to_tallies(key[0], mask)
        self._tallies[key].requests[rank] = request
        self._touched.pop(key, None)  # to the end: in the order of completion
        self._touched[key] = None

    def add_known(self, rank: int, process_set: int, bits: int, now: float) -> None:
        """Rank `rank` asks for every known request whose bit is set."""
        known, announced = self._known[process_set], self._announced[process_set]
        for request in known.of(bits & announced.tallied):
            self.add(rank, request, now)
        if bits := bits & ~announced.tallied:
            announced.by_rank[rank] = announced.by_rank.get(rank, 0) | bits
            announced.since.update(dict.fromkeys(known.of(bits & ~announced.seen), now))
            announced.seen |= bits

    def join(self, rank: int) -> None:
        """Rank `rank` has no more data: until all have joined it takes part in all-reduces with zeros."""
        self._joined[rank] = None
        self._touched.update(dict.fromkeys(self._tallies))

    def leave(self, rank: int, reason: str) -> None:
        """Rank `rank` takes part in nothing any more; `reason` continues a sentence that starts with its name."""
        self._gone[rank] = reason
        self._touched.update(dict.fromkeys(self._tallies))

    def clear(self) -> None:
        """Forgets all that is waited for."""
        self._tallies.clear()
        self._announced.clear()
        self._joined.clear()

    def encode(self, response: Response) -> tuple[Any, ...]:
        """A response as it travels."""
        return self._known[response.process_set].encode(response)

    def decide(self) -> list[Response]:
        """What has become ready or impossible since the last call, in the order in which every rank carries it out."""
        responses = []
        for process_set in self._announced:
            responses += self._decide_known(process_set)
        touched, self._touched = self._touched, {}
        for key in touched:
            if key in self._tallies and (response := self._decide(key, self._tallies[key].requests)):
                self._close(key)
                responses.append(response)
        if self._joined and (response := self._decide_join()):
            responses.append(response)
        return fuse(responses, self._fusion_threshold_bytes)

    def overdue(self, now: float, seconds: float, *, once: bool = False) -> dict[str, list[int]]:
        """Collectives that some ranks have waited for longer than `seconds`, each with the ranks that are missing.

        Args:
            now: the time, in seconds.
            seconds: how long is too long.
            once: leave out what an earlier call with `once` has told.
        """
        self._move_old_to_tallies(now, seconds)
        found = {}
        for key, tally in self._tallies.items():
            if now - tally.since > seconds and not (once and tally.told):
                tally.told = tally.told or once
                found[f"{key[1]}.{key[2]}"] = [
                    rank for rank in self.members(key[0]) if rank not in tally.requests and rank not in self._joined
                ]
        return found

    def disagreements(self, now: float) -> list[Response]:
        """Errors for names under which the ranks have asked for different kinds of collective, and all wait."""
        self._move_old_to_tallies(now, _DISAGREE_SECONDS)
        by_name: defaultdict[tuple[int, str], list[Key]] = defaultdict(list)
        for key, tally in self._tallies.items():
            if now - tally.since > _DISAGREE_SECONDS:
                by_name[key[0], key[2]].append(key)
        responses = []
        for (process_set, name), keys in by_name.items():
            asking = sorted(rank for key in keys for rank in self._tallies[key].requests)
            if len(keys) < 2 or asking != sorted(set(self.members(process_set)) - self._joined.keys()):
                continue
            kinds = "; ".join(f"{span(self._tallies[key].requests)} asked for {key[1]}" for key in keys)
            requests = tuple(next(iter(self._close(key).requests.values())) for key in keys)
            text = f"Mismatched operations under the name {name!r}: {kinds}."
            responses.append(Response("error", process_set, requests, error=text))
        return responses

    def _decide_known(self, process_set: int) -> list[Response]:
        known, announced = self._known[process_set], self._announced[process_set]
        if not announced.by_rank:
            return []
        members = self.members(process_set)
        if any(rank in self._gone for rank in members):
            self._move_to_tallies(process_set, -1)
            return []
        joined = [rank for rank in self._joined if process_set == _WORLD]
        asked = [rank for rank in members if rank not in joined]
        if not asked or len(announced.by_rank) < len(asked):
            return []
        ready = -1
        for rank in asked:
            ready &= announced.by_rank.get(rank, 0)
        if not ready:
            return []
        self._drop(announced, ready)
        responses = []
        for request in known.of(ready):
            del announced.since[request]
            error = _unjoinable(request, joined)
            kind = "error" if error else request.kind
            responses.append(Response(kind, process_set, (request,), error=error))
        return responses

    def _decide(self, key: Key, by_rank: dict[int, Request]) -> Response | None:
        process_set, kind, _ = key
        members = self.members(process_set)
        first = next(iter(by_rank.values()))
        if lost := self._lost(members):
            return Response("error", process_set, (first,), error=lost)
        joined = [rank for rank in self._joined if process_set == _WORLD and rank not in by_rank]
        if len(by_rank) + len(joined) < len(members):
            return None
        requests = dict(sorted(by_rank.items()))
        if error := _unjoinable(first, joined) or mismatch(requests):
            return Response("error", process_set, (first,), error=error)
        if kind == "add_process_set":
            return self._add_process_set(first)
        if kind == "remove_process_set":
            return self._remove_process_set(first)
        first_dims: tuple[tuple[int, ...], ...] = ()
        if kind == "allgather":
            by_tensor = zip(*(request.shapes for request in requests.values()), strict=True)
            first_dims = tuple(tuple(shape[0] for shape in shapes) for shapes in by_tensor)
        return Response(kind, process_set, (first,), first_dims)

    def _add_process_set(self, request: Request) -> Response:
        ranks = request.shapes[0]
        if ranks in self._members.values():
            return Response(request.kind, _WORLD, (request,), value=-1)
        number = self._sets_made
        self._sets_made += 1
        self._members[number] = ranks
        return Response(request.kind, _WORLD, (request,), value=number)

    def _remove_process_set(self, request: Request) -> Response:
        found = self._members.pop(request.root, None)
        for key in [key for key in self._tallies if key[0] == request.root]:
            del self._tallies[key]
        self._announced.pop(request.root, None)
        return Response(request.kind, _WORLD, (request,), value=-1 if found is None else request.root)

    def _decide_join(self) -> Response | None:
        everyone = self._members[_WORLD]
        if lost := self._lost(everyone):
            self._joined.clear()
            return Response("error", _WORLD, (Request("join", ""),), error=lost)
        if len(self._joined) < len(everyone):
            return None
        last = next(reversed(self._joined))
        self._joined.clear()
        return Response("join", _WORLD, (Request("join", ""),), value=last)

    def _lost(self, members: tuple[int, ...]) -> str:
        gone = [f"rank {rank} {self._gone[rank]}" for rank in members if rank in self._gone] if self._gone else []
        return f"Horovod has been shut down: {'; '.join(gone)}." if gone else ""

    def _close(self, key: Key) -> _Tally:
        self._announced[key[0]].tallied &= ~self._known[key[0]].mask(key)
        return self._tallies.pop(key)

    def _move_old_to_tallies(self, now: float, seconds: float) -> None:
        for process_set, announced in self._announced.items():
            known = self._known[process_set]
            for request in [request for request, since in announced.since.items() if now - since > seconds]:
                self._move_to_tallies(process_set, known.bit(request))

    def _move_to_tallies(self, process_set: int, mask: int) -> None:
        """Replaces announced bits by tallied requests."""
        known, announced = self._known[process_set], self._announced[process_set]
        moved = {rank: bits & mask for rank, bits in announced.by_rank.items() if bits & mask}
        self._drop(announced, mask)
        for rank, bits in moved.items():
            for request in known.of(bits):
                tally = self._tallies.setdefault(request.key, _Tally(announced.since[request]))
                tally.since = min(tally.since, announced.since[request])
                tally.requests[rank] = request
                announced.tallied |= known.mask(request.key)
                self._touched[request.key] = None
        for bits in moved.values():
            for request in known.of(bits):
                announced.since.pop(request, None)

    @staticmethod
    def _drop(announced: _Announced, mask: int) -> None:
        announced.by_rank = {rank: rest for rank, bits in announced.by_rank.items() if (rest := bits & ~mask)}
        announced.seen &= ~mask


def _unjoinable(request: Request, joined: list[int]) -> str:
    if request.kind in ("allreduce", "barrier") or not joined:
        return ""
    return f"{request.kind} {request.name!r} cannot be done while {span(joined)} has joined: only allreduce can."
