"""Which positions the batches of a stream hold: request `i` is a pure function of where the stream begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Request(NamedTuple):
    """Positions `start` to `start + num_clips - 1`: of the training stream, or of the set itself in evaluation."""

    start: int
    num_clips: int
    training: bool


class Span(NamedTuple):
    """A stream: the positions `start` to `stop - 1` over all ranks in training, of this rank's part in evaluation."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """Cuts a stream in the batches of one rank."""

    training: bool
    """A training stream, or a part of the set in its own order."""
    batch_clips: int
    """Clips of one batch (the last of an evaluation may be smaller)."""
    rank: int
    """The rank that the batches are for."""
    world_size: int
    """Ranks that share a global batch."""
    micro_batches: int
    """Batches of each rank for one global batch."""

    def num_requests(self, span: Span) -> int:
        """Batches of the stream."""
        if self.training:
            return (span.stop - span.start) // self._global_batch * self.micro_batches
        return -(-(span.stop - span.start) // self.batch_clips)

    def request(self, span: Span, number: int) -> Request:
        """Batch `number` of the stream."""
        if not self.training:
            start = span.start + number * self.batch_clips
            return Request(start, min(self.batch_clips, span.stop - start), training=False)
        global_batch, micro_batch = divmod(number, self.micro_batches)
        first = span.start + global_batch * self._global_batch
        place = self.rank * self.micro_batches + micro_batch
        return Request(first + place * self.batch_clips, self.batch_clips, training=True)

    @property
    def _global_batch(self) -> int:
        return self.batch_clips * self.micro_batches * self.world_size
