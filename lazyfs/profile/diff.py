"""
Two profiles compared: which bytes both have, which only one, and whether they come in the same order.

Layer: lazyfs.profile, pure. Who calls: `lazyfs profile diff`. Ranges that reach to the end of a file whose size nobody
told (profiles made without an image) are compared, but have no size: they are counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lazyfs.image.prefetch import format_pattern
from lazyfs.profile.parts import OPEN_END

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.profile.parts import Profile

_Ranked = list[tuple[int, int, int]]     # (start, end, rank) of one pattern in one profile, ascending


@dataclass(slots=True)
class Bytes:
    """Bytes of one file, or of all. `open_count`: ranges without a size."""

    common: int = 0
    only_a: int = 0
    only_b: int = 0
    open_count: int = 0

    def add(self, start: int, end: int, *, in_a: bool, in_b: bool) -> None:
        """Count [start, end)."""
        if end == OPEN_END:
            self.open_count += 1
        elif in_a and in_b:
            self.common += end - start
        elif in_a:
            self.only_a += end - start
        else:
            self.only_b += end - start

    @property
    def differing(self) -> int:
        return self.only_a + self.only_b


@dataclass(frozen=True, slots=True)
class Difference:
    """
    What two profiles A and B have in common.

    Attributes:
        total: bytes of all files.
        files: bytes of each pattern; those that differ most first.
        order: Spearman's rank correlation of the common ranges, -1 to 1; None: fewer than two.

    """

    total: Bytes
    files: tuple[tuple[bytes, Bytes], ...]
    order: float | None

    @property
    def agreement(self) -> float:
        """Common bytes / bytes of either; 1 if both are empty."""
        return _ratio(self.total.common, self.total.common + self.total.differing)

    @property
    def covered_a(self) -> float:
        """The share of A's bytes that B has."""
        return _ratio(self.total.common, self.total.common + self.total.only_a)

    @property
    def covered_b(self) -> float:
        """The share of B's bytes that A has."""
        return _ratio(self.total.common, self.total.common + self.total.only_b)

    def as_json(self) -> dict[str, Any]:
        """For --json; a contract: names are only added."""
        return {
            "agreement": round(self.agreement, 6),
            "order": None if self.order is None else round(self.order, 6),
            "commonBytes": self.total.common,
            "onlyABytes": self.total.only_a,
            "onlyBBytes": self.total.only_b,
            "coveredA": round(self.covered_a, 6),
            "coveredB": round(self.covered_b, 6),
            "rangesWithoutSize": self.total.open_count,
            "files": [
                {"path": format_pattern(pattern), "commonBytes": one.common, "onlyABytes": one.only_a,
                 "onlyBBytes": one.only_b}
                for pattern, one in self.files
            ],
        }


def compare(first: Profile, second: Profile) -> Difference:
    """A is `first`, B is `second`."""
    ours, theirs = _by_pattern(first), _by_pattern(second)
    total, files, places = Bytes(), [], []
    for pattern in sorted(ours.keys() | theirs.keys()):
        one = Bytes()
        for start, end, rank_a, rank_b in _sweep(ours.get(pattern, []), theirs.get(pattern, [])):
            for counted in (one, total):
                counted.add(start, end, in_a=rank_a is not None, in_b=rank_b is not None)
            if rank_a is not None and rank_b is not None:
                # Pieces of one range come in the order of the file.
                places.append(((rank_a, pattern, start), (rank_b, pattern, start)))
        files.append((pattern, one))
    files.sort(key=lambda file: -file[1].differing)      # stable: then by path
    return Difference(total, tuple(files), _correlation(places))


def _by_pattern(profile: Profile) -> dict[bytes, _Ranked]:
    found: dict[bytes, _Ranked] = {}
    for rank, part in enumerate(profile.parts):
        found.setdefault(part.pattern, []).append((part.start, part.end, rank))
    for ranges in found.values():
        ranges.sort()
    return found


def _sweep(ours: _Ranked, theirs: _Ranked) -> Iterator[tuple[int, int, int | None, int | None]]:
    """(start, end, rank in A, rank in B): every byte of either, cut where one of them begins or ends."""
    cuts = sorted({border for start, end, _ in (*ours, *theirs) for border in (start, end)})
    a = b = 0
    for start, end in pairwise(cuts):
        while a < len(ours) and ours[a][1] <= start:
            a += 1
        while b < len(theirs) and theirs[b][1] <= start:
            b += 1
        rank_a = ours[a][2] if a < len(ours) and ours[a][0] <= start else None
        rank_b = theirs[b][2] if b < len(theirs) and theirs[b][0] <= start else None
        if rank_a is not None or rank_b is not None:
            yield start, end, rank_a, rank_b


def _correlation(places: list[tuple[tuple[int, bytes, int], tuple[int, bytes, int]]]) -> float | None:
    count = len(places)
    if count < 2:
        return None
    rank_b = {place: rank for rank, place in enumerate(sorted(place for _, place in places))}
    squares = sum((rank - rank_b[place]) ** 2 for rank, (_, place) in enumerate(sorted(places)))
    return 1 - 6 * squares / (count * (count * count - 1))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
