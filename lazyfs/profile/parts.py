"""
Profiles: ranges of files in the order in which a start wants them. What recordings and prefetch lists are turned into
before anything is done with them, and what lists are written from.

Layer: lazyfs.profile, pure. Who calls: everything of this package. Invariant of a Profile: no byte of a pattern is in
two parts (where a list names one twice, the first place counts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from lazyfs import limits
from lazyfs.image.prefetch import PrefetchEntry, PrefetchHeader, PrefetchList, make_entry
from lazyfs.profile.spans import first_come

if TYPE_CHECKING:
    from collections.abc import Iterable

OPEN_END: Final = limits.FILE_BYTES_MAX   # a part that reaches to its file's end, wherever that is
_CLOSE_COUNT: Final = 16       # ranges that a range may move ahead to stand in the line of its file
_LINE_RANGE_COUNT_MAX: Final = 64         # a line stays readable


class Part(NamedTuple):
    """Bytes [start, end) of the file(s) that a pattern matches; `share`, `first_ms`: as in PrefetchEntry."""

    pattern: bytes
    start: int
    end: int
    share: float = 1.0
    first_ms: float | None = None

    @property
    def size(self) -> int | None:
        """In bytes; None: it reaches to the file's end, and the file is not known."""
        return None if self.end == OPEN_END else self.end - self.start


@dataclass(frozen=True, slots=True)
class Profile:
    """Parts in order; `header.runs`: of how many recordings they are."""

    parts: tuple[Part, ...]
    header: PrefetchHeader = field(default_factory=PrefetchHeader)

    @property
    def size_bytes(self) -> int:
        """Of all parts whose size is known."""
        return sum(part.size or 0 for part in self.parts)


def distinct(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts without those bytes that an earlier one has."""
    named = list(parts)
    by_pattern: dict[bytes, list[tuple[int, int]]] = {}
    for part in named:
        by_pattern.setdefault(part.pattern, []).append((part.start, part.end))
    owned = {pattern: iter(first_come(ranges)) for pattern, ranges in by_pattern.items()}
    return tuple(part._replace(start=start, end=end) for part in named for start, end in next(owned[part.pattern]))


def profile_of(prefetch: PrefetchList) -> Profile:
    """A list as it stands, without looking into an image: globs stay globs, open ends open."""
    return Profile(distinct(
        Part(entry.pattern, start, OPEN_END if end is None else end, entry.share, entry.first_ms)
        for entry in prefetch.entries for start, end in entry.ranges or ((0, None),)
    ), prefetch.header)


def list_of(profile: Profile) -> PrefetchList:
    """
    The list of a profile.

    Ranges of one file with one share become one line, if not more than _CLOSE_COUNT others stand between them: a
    fetch window holds more than that, and a list of one line a page could not be read.
    """
    lines: list[_Line] = []
    latest: dict[bytes, _Line] = {}
    for place, part in enumerate(profile.parts):
        line = latest.get(part.pattern)
        if line is None or not line.takes(part, place):
            line = latest[part.pattern] = _Line(part)
            lines.append(line)
        line.add(part, place)
    return PrefetchList(tuple(line.entry() for line in lines), profile.header)


class _Line:
    """A line being made."""

    def __init__(self, first: Part) -> None:
        self._first = first
        self._ranges: list[tuple[int, int]] = []
        self._place = 0      # of the latest range

    def takes(self, part: Part, place: int) -> bool:
        return (part.share == self._first.share and place - self._place <= _CLOSE_COUNT
                and len(self._ranges) < _LINE_RANGE_COUNT_MAX)

    def add(self, part: Part, place: int) -> None:
        self._place = place
        if self._ranges and self._ranges[-1][1] == part.start:
            self._ranges[-1] = self._ranges[-1][0], part.end
        else:
            self._ranges.append((part.start, part.end))

    def entry(self) -> PrefetchEntry:
        """Of the first range's time. A whole file is told by its name alone."""
        ranges = [(start, None if end == OPEN_END else end) for start, end in self._ranges]
        if ranges == [(0, None)]:
            ranges = []
        return make_entry(self._first.pattern, ranges, self._first.share, self._first.first_ms)
