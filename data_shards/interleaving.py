"""Several streams in one, at fixed shares that hold in any stretch of it: pure, O(log of the streams) to any position.

`Interleaving([0.7, 0.2, 0.1]).split(positions)` says which stream each position takes from, and the how-manieth of
that stream it is. The streams are the leaves of a Huffman tree (Huffman 1952) on their shares; at each inner node the
positions go left and right by a balanced word (a Sturmian word: Lothaire, "Algebraic combinatorics on words", 2002,
chapter 2): after `n` positions `floor((n * left + phase) / (left + right))` have gone left. So a stream's elements
come in order, none is left out, and among any `n` positions in a row are `n` times its share of them, give or take
less than `max_deviation` (under 2 for most shares, whatever `n` is).
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_shards.permutation import derive_keys

# Shares are whole numbers below this in sum, so that a product of two of them stays below 2**62.
_LARGEST_SUM = 2**31
_PHASES = 11  # keeps the keys of this use of a seed apart from those of others


class Interleaving:
    """Streams in one at `shares`: positive numbers in any unit, taken as the decimals they are written as.

    `seed` decides where in its pattern each node begins. Raises ValueError for shares that are not positive and finite.
    """

    def __init__(self, shares: Sequence[float], *, seed: int = 0) -> None:
        self.shares = whole_shares(shares)
        """The shares as whole numbers."""
        self._root, self.max_deviation = _huffman_tree(self.shares, seed)

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions >= 0 (int64 (n,)): the number of the stream, and the place in that stream; int64 (n,) each."""
        streams, places = np.zeros_like(positions), np.empty_like(positions)
        pending = [(self._root, np.arange(len(positions)), positions)]
        while pending:
            node, members, local = pending.pop()
            if isinstance(node, int):
                streams[members], places[members] = node, local
                continue
            before, after = node.gone_left(local), node.gone_left(local + 1)
            left = after > before
            if left.any():
                pending.append((node.left, members[left], before[left]))
            if not left.all():
                right = ~left
                pending.append((node.right, members[right], (local - before)[right]))
        return streams, places


class _Node:
    """An inner node: of every `whole` positions `part` go left."""

    def __init__(self, left: "int | _Node", right: "int | _Node", part: int, whole: int, phase: int) -> None:
        self.left, self.right = left, right
        self._part, self._whole, self._phase = part, whole, phase

    def gone_left(self, positions: np.ndarray) -> np.ndarray:
        """How many of the first `positions` positions went left."""
        rounds, rest = np.divmod(positions, self._whole)
        return rounds * self._part + (rest * self._part + self._phase) // self._whole


def whole_shares(shares: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of `shares`; rounded, none to 0, where their sum would pass 2**31."""
    for share in shares:
        if not 0 < share < math.inf:
            raise ValueError(f"a share is {share}: use positive, finite numbers, for example 0.7 0.3")
    if not shares:
        raise ValueError("no shares are given: use one for each stream")
    exact = [Fraction(repr(float(share))) for share in shares]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    common = math.gcd(*whole)
    whole = [number // common for number in whole]
    total = sum(whole)
    if total >= _LARGEST_SUM:
        room = _LARGEST_SUM - len(whole) - 1
        whole = [max(round(Fraction(number * room, total)), 1) for number in whole]
    return tuple(whole)


def _huffman_tree(shares: Sequence[int], seed: int) -> tuple["int | _Node", float]:
    """The tree, and the bound on how far a stream's count in a stretch can be from its share of the stretch.

    A stretch that is off by less than `d` at a node is off by less than `d * part / whole + 1` at its left child.
    """
    # (share, tie-break, subtree, bounds of the streams below with the node itself exact)
    heap: list[tuple[int, int, int | _Node, dict[int, float]]]
    heap = [(share, stream, stream, {stream: 0.0}) for stream, share in enumerate(shares)]
    heapq.heapify(heap)
    number = len(shares)
    while len(heap) > 1:
        right_share, _, right, right_bounds = heapq.heappop(heap)
        left_share, _, left, left_bounds = heapq.heappop(heap)
        whole = left_share + right_share
        phase = int(derive_keys(seed, _PHASES, number)[0] % np.uint64(whole))
        node = _Node(left, right, left_share, whole, phase)
        bounds: dict[int, float] = {}
        for share, below in ((left_share, left_bounds), (right_share, right_bounds)):
            # An error of one at a child of this share reaches a stream below it in proportion to the stream's part.
            bounds |= {stream: bound + shares[stream] / share for stream, bound in below.items()}
        heapq.heappush(heap, (whole, number, node, bounds))
        number += 1
    _, _, root, bounds = heap[0]
    return root, max(bounds.values())
