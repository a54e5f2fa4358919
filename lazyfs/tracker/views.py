"""
Views of swarms as nodes get them: whole, or what has changed since the one they have. Pure.

Layer: tracker. Who calls: tracker.service. A view is told by its content: its version is a hash of its rows, so that
all trackers agree without asking each other, and resources with the same members (the layers of an image) have one view
that is sent once. Members get each all of their swarm: topology needs the same members everywhere, or each part of
a swarm would fetch a copy of its own from the registry. Above CELL_COUNT_MAX members a swarm is cut into cells by a
hash of the id: each is a swarm of its own, with its own copy from the registry.

State: the rows of the latest versions, and encoded parts, both bounded; a swarm keeps its last snapshot.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import msgspec
import xxhash

from lazyfs import limits
from lazyfs.peers.announce import ViewPart
from lazyfs.peers.packed import pack
from lazyfs.tracker.state import Snapshot, Swarm

if TYPE_CHECKING:
    from lazyfs.peers.announce import Seen

CELL_COUNT_MAX = 12_288          # a whole view of 10,000 members has 600 KiB, once a node and image
SETTLE_S = 0.2                   # a view is not made anew more often: who joins within it gets the same one
SETTLE_PER_MEMBER_S = 1e-4       # and a large one less often: 10,000 members cost 10 ms each time
_ROW_COUNT_MAX = 1_000_000       # of versions that are kept to tell differences: about 100 MiB, rows are shared
_PART_BYTES_MAX = 64 * limits.MIB

Rows = dict[str, "Seen"]


class Views:
    """All views that one tracker has given lately."""

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._rows: OrderedDict[str, Rows] = OrderedDict()
        self._row_count = 0
        self._parts: OrderedDict[tuple[str, str], msgspec.Raw] = OrderedDict()
        self._packed: dict[tuple[str, str], bytes] = {}      # of parts that are kept
        self._part_bytes = 0

    def due_at(self, swarm: Swarm) -> float:
        """When a view may be made that holds all that is known now; in the past: `version` gives it already."""
        snapshot = swarm.snapshot
        if snapshot is None:
            return swarm.born_at + SETTLE_S
        if snapshot.changes == swarm.changes:
            return snapshot.made_at
        return snapshot.made_at + max(SETTLE_S, snapshot.size * SETTLE_PER_MEMBER_S)

    def version(self, swarm: Swarm, asker: str, now: float) -> str:
        """The version of the view that a member is to have."""
        snapshot = swarm.snapshot
        if snapshot is None or (snapshot.changes != swarm.changes and self.due_at(swarm) <= now):
            snapshot = swarm.snapshot = Snapshot(now, swarm.changes, len(swarm.members))
        cell, of = cell_of(asker, snapshot.size)
        version = snapshot.versions.get(cell)
        if version is None or version not in self._rows:
            version = snapshot.versions[cell] = self._make(swarm, cell, of)
        return version

    def part(self, version: str, seen: str) -> msgspec.Raw:
        """
        The view of a version (which `version` has just given) for who has the view `seen`, encoded.

        What it has is of no help where it is too old, of another tracker's making, or has little in common with it.
        """
        since = seen if seen in self._rows else ""
        found = self._parts.get((version, since))
        if found is None:
            found = self._difference(version, since)
            self._parts[version, since] = found
            self._part_bytes += len(found)
            while self._part_bytes > _PART_BYTES_MAX:
                place, old = self._parts.popitem(last=False)
                self._part_bytes -= len(old) + len(self._packed.pop(place, b""))
        return found

    def packed(self, version: str, seen: str) -> bytes:
        """The same as `part` gives, as a zstd frame (peers.packed)."""
        part = self.part(version, seen)
        place = version, seen if seen in self._rows else ""
        found = self._packed.get(place)
        if found is None:
            found = pack(part)
            if place in self._parts:
                self._packed[place] = found
                self._part_bytes += len(found)
        return found

    def _make(self, swarm: Swarm, cell: int, of: int) -> str:
        """What it costs is a copy of a table, and nothing for the other layers of an image: they have the same rows."""
        rows, fingerprint = swarm.rows, swarm.fingerprint
        if of > 1:
            part = Swarm(0.0, 0.0)
            for name, row in swarm.rows.items():
                if cell_index(name, of) == cell:
                    part.show(row)
            rows, fingerprint = part.rows, part.fingerprint
        version = f"{fingerprint:016x}"
        if version not in self._rows:
            self._rows[version] = dict(rows)
            self._row_count += len(rows)
        self._rows.move_to_end(version)
        while self._row_count > _ROW_COUNT_MAX and len(self._rows) > 1:
            self._row_count -= len(self._rows.popitem(last=False)[1])
        return version

    def _difference(self, version: str, since: str) -> msgspec.Raw:
        rows = self._rows[version]
        if since:
            old = self._rows[since]
            add = [row for name, row in rows.items() if old.get(name) != row]
            gone = [name for name in old if name not in rows]
            if len(add) + len(gone) < len(rows):
                return msgspec.Raw(self._encode(ViewPart(version, since, add, gone)))
        return msgspec.Raw(self._encode(ViewPart(version, "", [rows[name] for name in sorted(rows)])))


def cell_of(name: str, size: int) -> tuple[int, int]:
    """Which of how many cells a member is in, if its swarm has `size` members."""
    of = 1
    while size > of * CELL_COUNT_MAX:
        of *= 2
    return cell_index(name, of), of


def cell_index(name: str, of: int) -> int:
    """Cells are halves of halves: when a swarm grows, a cell is split, and nobody changes the half."""
    return xxhash.xxh64_intdigest(name.encode(), seed=1) % of
