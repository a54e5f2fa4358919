"""
Several runs, one profile: ranges split at each other's borders, in the order of their median first-access rank.

The rank of a range is its place in its run (or list); a run that did not touch it says nothing about the rank, but
lowers the share. A list that is itself merged of n runs counts n times. Same profiles, same result, in whatever order.

Layer: lazyfs.profile, pure. Who calls: `lazyfs profile merge`.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple

from lazyfs.errors import FormatError, UsageError
from lazyfs.image.prefetch import RUNS_MAX, PrefetchHeader
from lazyfs.profile.parts import Part, Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

_USE_COUNT_MAX: Final = 10_000_000         # two gigabytes; three recordings of tensorflow make 40,000
_ROUND_RUNS_MAX: Final = 50      # up to so many runs, two digits tell how many of them a share is


class _Use(NamedTuple):
    """One run's (or merged list's) use of a range."""

    rank: int
    runs: int
    first_ms: float | None


def merge(profiles: Sequence[Profile], min_share: float = 0.0) -> Profile:
    """
    Merge profiles.

    Args:
        profiles: at least one.
        min_share: ranges that a smaller share of the runs touched are left out.

    Raises:
        UsageError: they stand for more runs than a list may.
        FormatError: they would take too much memory.

    """
    runs = sum(profile.header.runs for profile in profiles)
    if runs > RUNS_MAX:
        raise UsageError(f"these lists are of {runs} runs, at most {RUNS_MAX} can be merged",
                         hint="merge fewer, or those of the newest build")
    ranked: list[tuple[float, Part]] = []
    for pattern, ranges in _uses(profiles).items():
        for (start, end), uses in ranges.items():
            part = _part(pattern, start, end, uses, runs)
            if part.share >= min_share:
                ranked.append((_median([(use.rank, use.runs) for use in uses]), part))
    ranked.sort(key=lambda one: (one[0], one[1].pattern, one[1].start))
    return Profile(_rejoined([part for _, part in ranked]), _header(profiles, runs))


def _uses(profiles: Sequence[Profile]) -> dict[bytes, dict[tuple[int, int], list[_Use]]]:
    """Who uses what: by pattern and range, where ranges of one pattern are equal or do not overlap."""
    borders: dict[bytes, set[int]] = {}
    for profile in profiles:
        for part in profile.parts:
            borders.setdefault(part.pattern, set()).update((part.start, part.end))
    cuts = {pattern: sorted(found) for pattern, found in borders.items()}
    uses: dict[bytes, dict[tuple[int, int], list[_Use]]] = {}
    count = 0
    for profile in profiles:
        for rank, part in enumerate(profile.parts):
            use = _Use(rank, max(1, round(part.share * profile.header.runs)), part.first_ms)
            at, ranges = cuts[part.pattern], uses.setdefault(part.pattern, {})
            index = bisect_left(at, part.start)
            while at[index] < part.end:
                count += 1
                if count > _USE_COUNT_MAX:
                    raise FormatError("merging these lists would take too much memory: their ranges cut each other in "
                                      f"more than {_USE_COUNT_MAX} pieces", hint="merge fewer lists at a time")
                ranges.setdefault((at[index], at[index + 1]), []).append(use)
                index += 1
    return uses


def _part(pattern: bytes, start: int, end: int, uses: list[_Use], runs: int) -> Part:
    share = sum(use.runs for use in uses) / runs
    timed = [(use.first_ms, use.runs) for use in uses if use.first_ms is not None]
    return Part(pattern, start, end, round(share, 2 if runs <= _ROUND_RUNS_MAX else 6) or 0.000001,
                float(round(_median(timed))) if timed else None)


def _median(values: list[tuple[float, int]]) -> float:
    """Of values that count several times; the mean of the two middle ones, where there are two."""
    values.sort()
    total = sum(count for _, count in values)
    return (_nth(values, (total - 1) // 2) + _nth(values, total // 2)) / 2


def _nth(values: list[tuple[float, int]], wanted: int) -> float:
    for value, count in values:
        wanted -= count
        if wanted < 0:
            return value
    raise AssertionError(values)


def _rejoined(parts: list[Part]) -> tuple[Part, ...]:
    """Without the borders that make no difference: what follows in the file, in the order, and is as often used."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if last is not None and (last.pattern, last.end, last.share, last.first_ms) == (
                part.pattern, part.start, part.share, part.first_ms):
            found[-1] = last._replace(end=part.end)
        else:
            found.append(part)
    return tuple(found)


def _header(profiles: Sequence[Profile], runs: int) -> PrefetchHeader:
    """The image is named if all name the same one."""
    images = {profile.header.image for profile in profiles}
    return PrefetchHeader(images.pop() if len(images) == 1 else "", runs=runs)
