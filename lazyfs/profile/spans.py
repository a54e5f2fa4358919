"""
Sets of bytes, as disjoint ranges: which bytes of something were seen already.

Layer: lazyfs.profile, pure. Who calls: files, parts, coverage. Invariant: ranges are sorted and do not touch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Spans:
    """Ranges [start, end). `add` costs a binary search, and a shift of what lies behind."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Put [start, end) in; returns the ranges of it that were not in yet, ascending."""
        if start >= end:
            return []
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        fresh, position = [], start
        for index in range(first, last):          # those that overlap or touch it
            if self._starts[index] > position:
                fresh.append((position, self._starts[index]))
            position = max(position, self._ends[index])
        if position < end:
            fresh.append((position, end))
        if fresh:
            joined = first < last
            low = min(start, self._starts[first]) if joined else start
            high = max(end, self._ends[last - 1]) if joined else end
            self._starts[first:last], self._ends[first:last] = [low], [high]
        return fresh
