"""
What one call of Swarm.fetch keeps: ways (whom to ask for a group, in order) and attempts (requests under way).

Layer: peers. Who calls: swarmfetch. Pure; what they mean together is said there.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

import trio

from lazyfs.peers.model import COMING, HERE_ONLY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lazyfs.peers.model import Member, Priority
    from lazyfs.peers.topology import Place


DIRECTORY_UP = 3         # levels: who keeps account of the reads of those below it, 14 at most; 500 would keep it busy
HERE_AFTER = 2           # parents that are asked for what they have, when who was named is late

PATIENCE_EACH = 0.4     # of the delay, for each level of the tree: the first below a slow member asks another, the
PATIENCE_MAX = 3.0      # others have it from there; were all to ask at once, they would ask the slow one's children


class Manner(enum.IntEnum):
    """
    How a member is asked.

    FETCH: it fetches what it has not. WHO: likewise, or it names another (referrals). COMING: for what it has or is
    getting. HERE: for what it has.
    """

    FETCH = 0
    WHO = 1
    COMING = 2
    HERE = 3


Stop = tuple["Member", Manner]


class Way:
    """
    A group's pieces in this call.

    :missing: not delivered yet.
    :running: attempts that ask for some of them.
    :is_next: nobody but the root is before this node: what the root does not give, the origin may.
    :is_root: nobody is before this node at all.
    :patience: times the usual delay before a hedge: who is nearer to the trouble, nearer to the root, is to act first.
    :again_at: when all were busy: begin anew at that time (inf: not so).
    """

    __slots__ = ("again_at", "busy_rounds", "is_next", "is_root", "missing", "next", "patience", "retry_after",
                 "running", "stops")

    def __init__(self, stops: list[Stop], patience: float, parents: int) -> None:
        self.is_root, self.is_next = parents == 0, parents == 1
        self.patience = patience
        self.missing: set[int] = set()
        self.stops = stops
        self.next = 0
        self.running = 0
        self.busy_rounds = 0
        self.retry_after = math.inf
        self.again_at = math.inf

    def put_last(self, is_late: Callable[[Member], bool]) -> None:
        """Of those still to be asked, and not only for what they have."""
        self.stops[self.next:] = sorted(self.stops[self.next:], key=lambda stop: (stop[1], is_late(stop[0])))

    def busy(self, pause_s: float, named: Sequence[Member]) -> None:
        """Who was asked may be again after that; it has `named` others, which are next."""
        self.retry_after = min(self.retry_after, pause_s)
        self.stops[self.next:self.next] = [(member, Manner.HERE) for member in named]

    def ask_first(self, member: Member | None) -> None:
        """A root's read of the way's one piece: who has it, or gets it; None: nobody."""
        if member is not None and len(self.missing) == 1:
            self.stops.insert(0, (member, Manner.COMING))

    def refer(self, member: Member | None, me: Member) -> None:
        """Whom to ask next, as a directory said. This node itself: the origin. None: it named nobody known."""
        if member is None:
            return
        later = [(one, Manner.HERE) for one, manner in self.stops[self.next:]
                 if manner is Manner.FETCH and one.id != member.id]
        self.stops[self.next:] = [] if member.id == me.id else [(member, Manner.COMING), *later[:HERE_AFTER]]


def way_of(place: Place, is_slow: Callable[[Member], bool], says_so: Callable[[Member], bool],
           heirs: Sequence[Member], *, refers: bool) -> Way:
    """
    Whom to ask for a group: parents, those that have been slow after the others; then who may have it.

    If all parents are slow by their own word, this node is as good as the root: only the first of an order has so
    few. Who was merely found slow is waited for where nobody else is left: the origin has no more to give than it.
    `refers`: it is for a read, and directories are asked.
    """
    slow = {member.id for member in place.parents if is_slow(member)}
    stops = [(member, Manner.FETCH) for member in place.parents if member.id not in slow]
    if stops or not all(says_so(member) for member in place.parents):
        stops += [(member, Manner.FETCH) for member in place.parents if member.id in slow]
    stops += [(member, Manner.HERE) for member in (*place.holders, *heirs)]
    if refers and place.depth and (directory := place.parents[min(place.depth, DIRECTORY_UP) - 1]).id not in slow:
        stops.remove((directory, Manner.FETCH))
        stops.insert(0, (directory, Manner.WHO))
    return Way(stops, min(PATIENCE_MAX, 1 + PATIENCE_EACH * max(0, place.depth - 1)), len(place.parents))


def here_way(place: Place) -> Way:
    """Whom to ask for what they have, where the origin has failed: everybody who may."""
    members = (*place.holders, *place.parents, *place.heirs)
    return Way([(member, Manner.HERE) for member in members], 1.0, len(place.parents))


def split(ways: list[Way], most: int) -> Iterator[dict[int, Way]]:
    """What is missing of them, into requests of `most` pieces, or one."""
    pieces = sorted((index, position) for position, way in enumerate(ways) for index in way.missing)
    for first in range(0, len(pieces), max(1, most)):
        yield {index: ways[position] for index, position in pieces[first:first + max(1, most)]}


class Attempt:
    """
    A request to a member. `left`: of its pieces, those that are still missing.

    :moved_at: when it began, or its last piece came.
    :looked_at: when it was late, and was or was not hedged.
    :late: it counts in Health.late.
    :manner: see there.
    :ours: the peer is not waited for: our own limit holds it back, or what came is being checked and kept.
    """

    __slots__ = ("got", "late", "left", "looked_at", "manner", "member",
                 "moved_at", "ours", "patience", "priority", "scope", "ways")

    def __init__(self, member: Member, manner: Manner, ways: dict[int, Way], now: float, *, jitter: float,
                 priority: Priority) -> None:
        self.member = member
        self.manner = manner
        self.priority = priority
        self.ways = ways
        self.left = set(ways)
        self.moved_at = self.looked_at = now
        self.patience = jitter * min(way.patience for way in ways.values())
        self.late = self.ours = False
        self.got = 0
        self.scope = trio.CancelScope()

    @property
    def here_only(self) -> bool:
        return self.manner is Manner.HERE

    def hops(self, own: int) -> int:
        """Of its request; `own`: of the call."""
        return {Manner.HERE: HERE_ONLY, Manner.COMING: COMING}.get(self.manner, own)
