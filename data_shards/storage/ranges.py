"""Arithmetic of byte ranges: which requests give the wanted ranges, and the ranges out of what came."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Bytes `start` to `stop - 1` of a file."""

    start: int
    stop: int


def merge_ranges(ranges: Sequence[tuple[int, int]], *, gap: int) -> list[Span]:
    """The spans, ascending, that hold all (offset, size) ranges; two with at most `gap` bytes between are one.

    Ranges may overlap and repeat; those of size 0 need no span.
    """
    spans: list[Span] = []
    for offset, size in sorted(wanted for wanted in ranges if wanted[1]):
        if spans and offset <= spans[-1].stop + gap:
            spans[-1] = Span(spans[-1].start, max(spans[-1].stop, offset + size))
        else:
            spans.append(Span(offset, offset + size))
    return spans


def split_spans(spans: Sequence[Span], *, at_most: int) -> list[Span]:
    """The same bytes in spans of `at_most` bytes."""
    return [
        Span(start, min(start + at_most, span.stop))
        for span in spans
        for start in range(span.start, span.stop, at_most)
    ]


def cut_ranges(ranges: Sequence[tuple[int, int]], pieces: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """Each (offset, size) out of pieces (offset, bytes) that lie side by side and do not overlap.

    Shorter where the pieces end early, which is where the file ends.
    """
    pieces = sorted(pieces)
    starts = [start for start, _ in pieces]
    found = []
    for offset, size in ranges:
        parts, position, stop = [], offset, offset + size
        for start, content in pieces[max(0, bisect_right(starts, offset) - 1) :]:
            if not start <= position < min(stop, start + len(content)):
                break
            parts.append(content[position - start : stop - start])
            position += len(parts[-1])
        found.append(parts[0] if len(parts) == 1 else b"".join(parts))
    return found
