"""How far each host's monotonic clock is from rank 0's, by ping-pong.

One rank of each node asks rank 0 for its time a few times; the answer of the shortest round trip counts, at its middle,
and is right to half that round trip whatever the network does (D. L. Mills, RFC 5905, section 8, of NTP's on-wire
protocol). Nodes take turns, so a reading costs `ROUNDS` round trips a node: some 0.2 s for 192 nodes at 0.1 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from dist_train.collectives import Collectives
from dist_train.ledger.clock import ClockReading

ROUNDS = 8


class Clocks:
    """Reads this host's clock against rank 0's. Every rank makes one at the same time and reads at the same times.

    Args:
        collectives: the ranks.
        now: the clock to compare: seconds, monotonic.
    """

    def __init__(self, collectives: Collectives, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._collectives, self._world, self._now = collectives, collectives.world, now
        self.leaders = [0]
        """One rank of each node, by the node's number."""
        if self._world.num_nodes > 1:
            mine = torch.full((self._world.num_nodes,), -1, dtype=torch.int64)
            if self._world.local_rank == 0:
                mine[self._world.node_rank] = self._world.rank
            self.leaders = collectives.max_(mine.to(self._world.device), name="ledger: hosts").tolist()

    def read(self) -> ClockReading:
        """A reading on every rank: that of its node. A collective; zero where all ranks share a node, and its clock."""
        if self._world.num_nodes == 1:
            return ClockReading(at=self._now(), offset=0.0, uncertainty=0.0)
        found = torch.zeros(self._world.num_nodes, 2, dtype=torch.float64)
        with self._collectives.watch.blocking("ledger: clocks"):
            if self._world.is_first:
                self._answer()
            elif self._world.rank == self.leaders[self._world.node_rank]:
                found[self._world.node_rank] = torch.tensor(self._ask(), dtype=torch.float64)
        at = self._now()
        table = self._collectives.sum_(found.to(self._world.device), name="ledger: clocks")
        offset, uncertainty = table[self._world.node_rank].tolist()
        return ClockReading(at=at, offset=offset, uncertainty=uncertainty)

    def _ask(self) -> tuple[float, float]:
        """Offset and uncertainty of the shortest of some round trips to rank 0."""
        message = torch.zeros(1, dtype=torch.float64)
        trips = []
        for _ in range(ROUNDS):
            asked = self._now()
            dist.send(message, 0)
            dist.recv(message, 0)
            answered = self._now()
            trips.append((answered - asked, (asked + answered) / 2 - float(message)))
        shortest, offset = min(trips)
        return offset, shortest / 2

    def _answer(self) -> None:
        message = torch.zeros(1, dtype=torch.float64)
        for leader in self.leaders:
            for _ in range(ROUNDS if leader != 0 else 0):
                dist.recv(message, leader)
                message[0] = self._now()
                dist.send(message, leader)
