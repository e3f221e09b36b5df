"""How fast a collective was, by nccl-tests' definitions, and how many bytes its algorithm sends from each rank.

`payload` is nccl-tests' S: the size of the whole array, that is of all ranks' parts together for an all-gather and a
reduce-scatter. Algorithm bandwidth is S/t; bus bandwidth is S/t times a factor of the number of ranks n, which makes
it comparable with the hardware's at any n (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

`sent_bytes` was compared with an interface's counters, headers taken off (66 bytes a packet), for torch 2.13's Gloo on
2, 3 and 4 ranks: all-reduce, all-gather and broadcast within 0.3 % from 400 kB on. Gloo's reduce-scatter is a whole
all-reduce (torch 2.13), which is counted so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "gather", "exchange"]


def bus_factor(op: str, num_ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: 2(n-1)/n for an all-reduce, (n-1)/n for its halves, 1 for a broadcast."""
    if num_ranks < 2:
        return 0.0
    if op == "all_reduce":
        return 2 * (num_ranks - 1) / num_ranks
    if op == "broadcast":
        return 1.0
    return (num_ranks - 1) / num_ranks


def sent_bytes(op: str, payload: int, num_ranks: int, *, backend: str, steps_from_root: int = 0) -> float:
    """Bytes of `payload` that one rank hands to its interface, without the transport's headers.

    Args:
        backend: "gloo", "nccl", ...: Gloo's reduce-scatter is an all-reduce, and its broadcast a binomial tree.
        steps_from_root: of a broadcast: (rank - root) modulo the number of ranks.
    """
    if op == "broadcast":
        return payload * (_tree_sends(steps_from_root, num_ranks) if backend == "gloo" else num_ranks > 1)
    if op == "gather":  # everybody but the root sends its part
        return 0.0 if steps_from_root == 0 else payload / num_ranks
    if op == "reduce_scatter" and backend == "gloo":
        op = "all_reduce"
    return payload * bus_factor(op, num_ranks)


def _tree_sends(position: int, num_ranks: int) -> int:
    """Sends of the rank at `position` in a binomial tree: in round i the first 2^i ranks send to the next 2^i."""
    rounds = range((num_ranks - 1).bit_length())
    return sum(position < 2**i and position + 2**i < num_ranks for i in rounds)


def bus_bytes(entries: Iterable[Mapping[str, Any]]) -> float:
    """Payload times bus factor of ledger entries (`flights.summarize`): over seconds this is their bus bandwidth.

    An exchange of several stages counts with what its stages send, which for ring algorithms is the same.
    """
    return sum(
        entry.get("sent", 0.0)
        if entry["op"] == "exchange"
        else entry.get("bytes", 0) * bus_factor(entry["op"], entry["ranks"])
        for entry in entries
    )
