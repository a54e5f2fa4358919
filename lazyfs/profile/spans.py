"""
Which bytes are whose, where ranges overlap: the first that names a byte has it.

Layer: lazyfs.profile, pure. Who calls: files, parts. Ranges come from hostile lists and recordings, by the million:
n log n, whatever their order.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def first_come(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Of each range [start, end), those parts that no range before it in the sequence has: ascending, not touching."""
    owned: list[list[tuple[int, int]]] = [[] for _ in ranges]
    waiting = sorted(range(len(ranges)), key=lambda index: ranges[index][0], reverse=True)
    here: list[int] = []                 # a heap: ranges that have begun; the first in the sequence is on top
    for start, end in pairwise(sorted({border for one in ranges for border in one})):
        while waiting and ranges[waiting[-1]][0] == start:
            heappush(here, waiting.pop())
        while here and ranges[here[0]][1] <= start:
            heappop(here)
        if here:
            parts = owned[here[0]]
            if parts and parts[-1][1] == start:
                parts[-1] = parts[-1][0], end
            else:
                parts.append((start, end))
    return owned
