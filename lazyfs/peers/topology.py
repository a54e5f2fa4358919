"""
Who asks whom, by arithmetic: rendezvous hashing orders the members for each group of pieces; the order is a tree.

A member's score in a group depends on its id, its up_rate and the group alone, never on who else is there. Each asks
only members of lower score, so the way of a request ends, whatever the nodes know of each other: two views that
differ make two trees, but never a ring. (Of a rate that changes: a member counts itself with the highest that anybody
may still see of it. Along a way that own score falls with each step, so rings cannot be.) Groups go in pairs with
opposite orders: who is at the top of one tree is at the bottom of the next, so what a node gives is even over any few
groups, not only in the long run. A zone's members make a tree of two children each, and the zones' roots make another
one: one link a group enters a zone, one member a group asks the origin.

Layer: peers. Who calls: swarm, benchmarks.scale. Pure; no I/O, no clock. State: orders that were asked for lately.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from lazyfs import limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lazyfs.peers.model import Member, Resource, View

CHILDREN = 2                     # few: a node sends each piece twice at most (feasibility: 4 cost 6 % more, 8 18 %)
GROUP_BYTES_MIN = 256 * limits.KIB    # of a group: below it a request costs more than its bytes
GROUP_COUNT_MAX = 4096           # of a resource: each is ordered, 20 us at 500 members, 300 us at 10,000
ANCESTORS_MAX = 3                # parent, its parent, and one more; then the root itself
HEADS = 6                        # first of an order: who stands in for a root that is gone
HEIRS = 3                        # of a root that has just come: others that came with it have nothing either
HOLDERS = 2                      # complete members that are asked before the origin
RATE_TYPICAL = 1 << 27           # bytes/s of who does not say: 1 Gbit/s
RATE_POWER = 4                   # an eighth of the rate: one of 4096 comes before an ordinary node: a leaf
ORDERS_BYTES_MAX = 4 * limits.MIB

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))    # splitmix64's finish


def group_pieces(resource: Resource) -> int:
    """How many pieces share a tree: few, so that load spreads; the same on all nodes."""
    by_bytes = -(-GROUP_BYTES_MIN // resource.piece_size)
    by_count = -(-resource.piece_count // GROUP_COUNT_MAX)
    return max(1, by_bytes, by_count)


def group_seed(key: str, group: int) -> int:
    """64 bits that stand for a group of a resource: 63 for its pair of groups, the last one says which of the two."""
    return xxhash.xxh64_intdigest(f"{key}#{group // 2}".encode()) & ~1 | group & 1


@dataclass(frozen=True, slots=True)
class Place:
    """
    Where a member stands in a group's tree.

    Attributes:
        parents: whom it asks, in order: its parent, those above it, those who stand in for a root. All of lower score.
        holders: complete members, asked for what they have (HERE_ONLY) before the origin is.
        heirs: of who has no parents: the first in the order that are known to have something, then the next in it, who
            were the root before this one came. They may have it, or be getting it.
        depth: how many members are between it and its zone's root, that included; of the root 0.

    """

    parents: tuple[Member, ...] = ()
    holders: tuple[Member, ...] = ()
    heirs: tuple[Member, ...] = ()
    depth: int = 0

    @property
    def is_root(self) -> bool:
        return not self.parents


class Topology:
    """
    A view, made ready to be ordered for many groups. One object may serve many nodes (a simulation's).

    `orders_bytes_max`: of orders that are kept.
    """

    def __init__(self, view: View, orders_bytes_max: int = ORDERS_BYTES_MAX) -> None:
        members = sorted(view.members, key=lambda member: (member.zone, member.id))
        self.members = tuple(members)
        self._index = {member.id: index for index, member in enumerate(members)}
        self._hashes = np.array([xxhash.xxh64_intdigest(member.id.encode()) for member in members], np.uint64)
        self._weights = _weights(self.members)
        self._complete = np.array([member.id in view.complete for member in members], np.bool_)
        self._partial = np.array([member.id in view.partial for member in members], np.bool_)
        self._any_complete = bool(self._complete.any())
        self._zones: dict[str, slice] = {}
        first = 0
        for index in range(1, len(members) + 1):
            if index == len(members) or members[index].zone != members[first].zone:
                self._zones[members[first].zone] = slice(first, index)
                first = index
        self._orders: OrderedDict[tuple[int, int], tuple[NDArray[np.int32], NDArray[np.int32]]] = OrderedDict()
        self._orders_max = max(1, orders_bytes_max // max(1, 8 * len(members)))

    def __contains__(self, member_id: object) -> bool:
        return member_id in self._index

    def member(self, member_id: str) -> Member | None:
        index = self._index.get(member_id)
        return None if index is None else self.members[index]

    def __len__(self) -> int:
        return len(self.members)

    def place(self, member_id: str, seed: int, up_rate: int | None = None) -> Place:
        """
        Where a member of the view stands in the group of that seed.

        `up_rate`: that it counts itself with, where that is not what the view says of it: see peers.ownrate.
        """
        me = self._index[member_id]
        zone = self._zones[self.members[me].zone]
        own = None if up_rate is None or up_rate == self.members[me].up_rate else (me, weight_of(up_rate))
        if own is None:
            order, rank_of = self._order(zone, seed)
            rank = int(rank_of[me - zone.start])
        else:
            order = np.argsort(self._scores(zone, seed, own)).astype(np.int32)
            rank = int(np.flatnonzero(order == me - zone.start)[0])
        above = _above(rank)
        depth = len(above)
        if len(above) > ANCESTORS_MAX + 1:
            above = [*above[:ANCESTORS_MAX], 0]
        above += [head for head in range(1, min(HEADS, rank)) if head not in above]
        chain = [zone.start + int(order[index]) for index in above]
        heirs = self._heirs(zone, order) if rank == 0 else []
        if rank < HEADS and len(self._zones) > 1:
            beyond = self._beyond(me, zone, seed, own)
            chain += [index for index in beyond.chain if index not in chain]
            heirs = (heirs + [index for index in beyond.others if index not in heirs])[:HEIRS]
        return Place(
            tuple(self.members[index] for index in chain),
            tuple(self.members[index] for index in self._holders(me, zone, seed) if index not in chain[:1]),
            tuple(self.members[index] for index in heirs) if not chain else (),
            depth,
        )

    def _heirs(self, zone: slice, order: NDArray[np.int32]) -> list[int]:
        """Of the first of the order."""
        rest = zone.start + order[1:]
        first = rest[np.flatnonzero(self._partial[rest])[:HEIRS]]
        return list(dict.fromkeys(map(int, (*first, *rest[:HEIRS]))))[:HEIRS]

    def _scores(self, part: slice, seed: int, own: tuple[int, float] | None = None) -> NDArray[np.float64]:
        """
        The lower, the earlier in the group's order. -ln(u)/weight: how often one comes first goes by weight.

        `own`: a member, of the part, that has another weight.
        """
        mixed = self._hashes[part] ^ np.uint64(seed >> 1)
        mixed ^= mixed >> np.uint64(30)
        mixed *= _MIX[0]
        mixed ^= mixed >> np.uint64(27)
        mixed *= _MIX[1]
        mixed ^= mixed >> np.uint64(31)
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        if seed & 1:    # the pair's other group
            uniform = 1.0 - uniform
        scores: NDArray[np.float64] = -np.log(uniform) / self._weights[part]
        if own is not None:
            scores[own[0] - (part.start or 0)] *= self._weights[own[0]] / own[1]
        return scores

    def _order(self, zone: slice, seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The zone's members by score, as offsets into it; and each one's rank."""
        key = (zone.start, seed)
        found = self._orders.get(key)
        if found is None:
            order = np.argsort(self._scores(zone, seed)).astype(np.int32)
            rank_of = np.empty_like(order)
            rank_of[order] = np.arange(len(order), dtype=np.int32)
            found = self._orders[key] = order, rank_of
            while len(self._orders) > self._orders_max:
                self._orders.popitem(last=False)
        return found

    def _beyond(self, me: int, zone: slice, seed: int, own: tuple[int, float] | None) -> _Beyond:
        """Of a zone's root, or who stands in for it: whom to ask in other zones."""
        scores = self._scores(slice(None), seed, own)
        roots = sorted((part.start + int(np.argmin(scores[part])) for part in self._zones.values()),
                       key=lambda index: float(scores[index]))
        mine = next(position for position, index in enumerate(roots) if zone.start <= index < zone.stop)
        chain = [roots[position] for position in _above(mine)][:ANCESTORS_MAX]
        first = np.argpartition(scores, min(HEADS, len(scores) - 1))[:HEADS]
        heads = sorted(map(int, first), key=lambda index: float(scores[index]))
        chain += [index for index in (*roots[:1], *heads) if index not in chain and scores[index] < scores[me]]
        return _Beyond(chain, [index for index in roots if index != me][:HEIRS])

    def _holders(self, me: int, zone: slice, seed: int) -> list[int]:
        """Complete members, the group's first ones: those of the zone, else of all."""
        for part in (zone, slice(0, len(self.members))) if self._any_complete else ():
            complete = np.flatnonzero(self._complete[part]) + part.start
            complete = complete[complete != me]
            if len(complete):
                scores = self._scores(part, seed)[complete - part.start]
                return [int(complete[index]) for index in np.argsort(scores)[:HOLDERS]]
        return []


@dataclass(frozen=True, slots=True)
class _Beyond:
    chain: list[int]
    others: list[int]


def _above(rank: int) -> list[int]:
    """Ranks from a node's parent to the root."""
    above = []
    while rank > 0:
        rank = (rank - 1) // CHILDREN
        above.append(rank)
    return above


def weight_of(up_rate: int) -> float:
    """By powers of two, so that a rate that is measured anew rarely moves anybody."""
    steps = round(math.log2(max(1, up_rate or RATE_TYPICAL) / RATE_TYPICAL))
    return 2.0 ** (steps * RATE_POWER)


def _weights(members: tuple[Member, ...]) -> NDArray[np.float64]:
    weights = {rate: weight_of(rate) for rate in {member.up_rate for member in members}}
    return np.array([weights[member.up_rate] for member in members], np.float64)
