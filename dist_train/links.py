"""Times the links between hosts, in pairs: for the question whose link is slow when the wire is.

One rank of each node sends `NUM_BYTES` to the node one further on and receives from the one before, then likewise two
further on, each twice, of which the faster counts. All others wait. It costs two megabytes a link: 0.2 s at 100
Mbit/s, 2 ms at 10 Gbit/s, whatever the number of nodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from dist_train.collectives import Collectives

NUM_BYTES = 512 * 1024
SHIFTS = (1, 2)
_REPEATS = 2


def time_links(collectives: Collectives, leaders: Sequence[int]) -> dict[tuple[int, int], float]:
    """Seconds of a message between pairs of nodes `(from, to)`, on every rank. A collective.

    Args:
        leaders: one rank of each node, by the node's number; `dist_train.clocks.Clocks.leaders`.
    """
    world, num_nodes = collectives.world, len(leaders)
    shifts = [shift for shift in SHIFTS if shift < num_nodes]
    seconds = torch.zeros(num_nodes, len(shifts), dtype=torch.float64)
    is_leader = num_nodes > 1 and leaders[world.node_rank] == world.rank
    outgoing = torch.zeros(NUM_BYTES, dtype=torch.uint8) if is_leader else torch.empty(0)
    incoming = torch.empty_like(outgoing)
    for column, shift in enumerate(shifts):
        for _ in range(_REPEATS):
            collectives.barrier(name="ledger: link times")
            if not is_leader:
                continue
            to = leaders[(world.node_rank + shift) % num_nodes]
            source = leaders[(world.node_rank - shift) % num_nodes]
            begun = time.perf_counter()
            with collectives.watch.blocking("ledger: links"):
                collectives.ledger.add_untimed(
                    "ledger: links", op="exchange", num_bytes=NUM_BYTES, sent_bytes=NUM_BYTES, num_ranks=num_nodes
                )
                sending = dist.isend(outgoing, to)
                dist.recv(incoming, source)
                taken = time.perf_counter() - begun
                assert sending is not None
                sending.wait()
            best = float(seconds[world.node_rank, column])
            seconds[world.node_rank, column] = min(taken, best) if best else taken
    table = collectives.sum_(seconds.to(world.device), name="ledger: link times").tolist()
    return {
        ((node - shift) % num_nodes, node): table[node][column]
        for column, shift in enumerate(shifts)
        for node in range(num_nodes)
    }
