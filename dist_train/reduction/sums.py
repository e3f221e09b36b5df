"""Sums over the ranks: in one collective, or through the nodes.

A `Route` sums a tensor over all ranks in place, asynchronously. `DenseReducer` makes means and sums of gradients of it,
in full precision or with 16 bits on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from dist_train.collectives import Collectives, Pending
from dist_train.ledger.bandwidth import sent_bytes
from dist_train.reduction.lane import Lane
from dist_train.reduction.reducer import Stateless

if TYPE_CHECKING:
    from dist_train.strategies.buckets import Bucket


class Route(Protocol):
    """Sums over the ranks; see `OneCollective` and `ThroughNodes`."""

    multiple_of: int
    """Tensors' lengths have to be a multiple of this."""

    def start_sum_(self, tensor: torch.Tensor, *, name: str, finish: Callable[[], Any] | None) -> Pending:
        """Starts to sum the flat `tensor` over the ranks, in place; `finish` is called in the wait."""


class OneCollective:
    """One all-reduce over all ranks."""

    multiple_of = 1

    def __init__(self, collectives: Collectives, channel: Any) -> None:
        self._collectives, self._channel = collectives, channel

    def start_sum_(self, tensor: torch.Tensor, *, name: str, finish: Callable[[], Any] | None) -> Pending:
        """See `Route`."""
        pending = self._collectives.start_sum_(tensor, channel=self._channel, name=name, finish=finish)
        assert pending is not None, "there is nothing to exchange in a world of one process"
        return pending


class ThroughNodes:
    """Reduce-scatter within the node, all-reduce of each shard across the nodes, all-gather within the node.

    With L ranks on each of N nodes it takes 2 (L-1) + 2 (N-1) rounds where one ring takes 2 (N L - 1), and all of a
    node's ranks send across the network at once, each its shard; the bytes on a node's link are about the ring's. Needs
    the same L, two or more, on each of two or more nodes (`Nodes.problem`). Of host memory the reduce-scatter is an
    all-to-all and a sum: Gloo's own is a whole all-reduce (torch 2.13), twice the bytes.
    """

    def __init__(self, collectives: Collectives, nodes: Nodes, lane: Lane) -> None:
        self._collectives, self._lane = collectives, lane
        self._node, self._across, self._place = nodes.channels(collectives)
        self.multiple_of, self._num_nodes = nodes.ranks_per_node, len(nodes.ranks)

    def start_sum_(self, tensor: torch.Tensor, *, name: str, finish: Callable[[], Any] | None) -> Pending:
        """See `Route`."""
        shards, on_host = tensor.view(self.multiple_of, -1), tensor.device.type == "cpu"

        def through_nodes() -> None:
            shard = shards[self._place]
            if on_host:
                theirs = torch.empty_like(shards)
                dist.all_to_all_single(theirs, shards, group=self._node)
                torch.sum(theirs, 0, out=shard)
            else:
                dist.reduce_scatter_single(shard, tensor, group=self._node)
            dist.all_reduce(shard, group=self._across)
            dist.all_gather_single(tensor, shard, group=self._node)

        sent = (
            2 * sent_bytes("all_gather", tensor.nbytes, self.multiple_of, backend="")  # and as much to scatter
            + sent_bytes("all_reduce", shards[0].nbytes, self._num_nodes, backend="")
        )
        work = self._lane.start(through_nodes)
        return self._collectives.started(
            work, num_bytes=tensor.nbytes, sent=sent, name=name, finish=finish, on_host=on_host
        )


class Nodes:
    """Which ranks share a node, as every rank knows it. Every rank makes one at the same time."""

    def __init__(self, collectives: Collectives) -> None:
        world = collectives.world
        where = collectives.broadcast_object(collectives.gather_objects((world.node_rank, world.rank)))
        found: dict[int, list[int]] = {}
        for node, rank in sorted(where):
            found.setdefault(node, []).append(rank)
        self.ranks = [found[node] for node in sorted(found)]

    @property
    def ranks_per_node(self) -> int:
        """Ranks on the first node."""
        return len(self.ranks[0])

    def problem(self) -> str | None:
        """Why the ranks do not form a hierarchy, or None."""
        sizes = sorted({len(ranks) for ranks in self.ranks})
        if len(self.ranks) == 1:
            return "all ranks are on one node"
        if sizes == [1]:
            return "each node has one rank"
        if len(sizes) > 1:
            return f"the nodes have between {sizes[0]} and {sizes[-1]} ranks"
        return None

    def channels(self, collectives: Collectives) -> tuple[Any, Any, int]:
        """The group of this rank's node, that of its peers across the nodes, and its place in the node."""
        rank = collectives.world.rank
        mine = next(ranks for ranks in self.ranks if rank in ranks)
        place = mine.index(rank)
        return collectives.new_channel(mine), collectives.new_channel([ranks[place] for ranks in self.ranks]), place


class DenseReducer(Stateless):
    """Means or sums of whole gradients.

    With `wire_dtype` (float16, bfloat16) the buckets travel in it. The division comes before the rounding, so that the
    sum of the ranks' values is within the range of the largest of them and cannot overflow; a float16 below 6e-8
    becomes zero. The ranks' partial sums are rounded as well, by the transport.
    """

    def __init__(self, route: Route, *, average: bool, wire_dtype: torch.dtype | None = None) -> None:
        self._route, self._average, self._wire_dtype = route, average, wire_dtype
        self.multiple_of, self.sums_flags = route.multiple_of, True

    def scale(self, weight: float | None, total: float) -> float:
        """The rank's share of the mean; of a sum in full precision its weight alone."""
        share = 1.0 if weight is None else weight
        return share / total if self._average or self._wire_dtype is not None else share

    def start(self, bucket: Bucket, *, weight: float | None, total: float) -> Pending:  # noqa: ARG002
        """See `Reducer`."""
        flat, wire = bucket.flat, self._wire_dtype
        if wire is None:
            return self._route.start_sum_(flat, name=bucket.name, finish=None)
        rounded = flat.to(wire) if wire.itemsize < flat.dtype.itemsize else flat

        def unpack() -> None:
            if rounded is not flat:
                flat.copy_(rounded)
            if not self._average:
                bucket.gradients.mul_(total)

        return self._route.start_sum_(rounded, name=bucket.name, finish=unpack)
