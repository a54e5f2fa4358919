"""
Range requests of one range (RFC 9110 §14): which bytes are asked for.

Layer: mirror. Who calls: mirror.answering. Pure. Several ranges in one request are answered with the whole, as the RFC
allows: no client of registries asks for them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ONE = re.compile(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*\Z", re.IGNORECASE)


class ByteRange(NamedTuple):
    """Bytes [start, end) of something; not empty."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class NotSatisfiable(NamedTuple):
    """416: nothing of the range is there."""

    size: int


def parse_range(header: str | None, size: int) -> ByteRange | NotSatisfiable | None:
    """
    What a Range header asks for of `size` bytes; None: all of it, for there is no header, or none to be understood.

    Forms: `bytes=a-b`, `bytes=a-` (also beyond what a client will read: it closes early), `bytes=-n` (the last n).

    """
    met = _ONE.match(header or "")
    if met is None:
        return None
    first, last = met[1], met[2]
    if not first:
        if not last:
            return None
        count = min(int(last), size)
        return ByteRange(size - count, size) if count else NotSatisfiable(size)
    start = int(first)
    end = size if not last else min(int(last) + 1, size)
    if last and int(last) < start:
        return None              # malformed: to be ignored
    return ByteRange(start, end) if start < size else NotSatisfiable(size)
