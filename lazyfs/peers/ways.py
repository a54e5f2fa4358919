"""
What one call of Swarm.fetch keeps: ways (whom to ask for a group, in order) and attempts (requests under way).

Layer: peers. Who calls: swarmfetch. Pure; what they mean together is said there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lazyfs.peers.model import Member, Priority
    from lazyfs.peers.topology import Place


PATIENCE_EACH = 0.4     # of the delay, for each level of the tree: the first below a slow member asks another, the
PATIENCE_MAX = 3.0      # others have it from there; were all to ask at once, they would ask the slow one's children


class Way:
    """
    A group's pieces in this call.

    :missing: not delivered yet.
    :running: attempts that ask for some of them.
    :is_next: nobody but the root is before this node: what the root does not give, the origin may.
    :patience: times the usual delay before a hedge: who is nearer to the trouble, nearer to the root, is to act first.
    :again_at: when all were busy: begin anew at that time (inf: not so).
    """

    __slots__ = ("again_at", "busy_rounds", "is_next", "missing", "next", "patience", "retry_after", "running", "stops")

    def __init__(self, stops: list[tuple[Member, bool]], patience: float, *, is_next: bool) -> None:
        self.is_next = is_next
        self.patience = patience
        self.missing: set[int] = set()
        self.stops = stops            # (member, asked only for what it has)
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
        self.stops[self.next:self.next] = [(member, True) for member in named]


def way_of(place: Place, is_slow: Callable[[Member], bool], says_so: Callable[[Member], bool],
           heirs: Sequence[Member]) -> Way:
    """
    Whom to ask for a group: parents, those that have been slow after the others; then who may have it.

    If all parents are slow by their own word, this node is as good as the root: only the first of an order has so
    few. Who was merely found slow is waited for where nobody else is left: the origin has no more to give than it.
    """
    slow = {member.id for member in place.parents if is_slow(member)}
    stops = [(member, False) for member in place.parents if member.id not in slow]
    if stops or not all(says_so(member) for member in place.parents):
        stops += [(member, False) for member in place.parents if member.id in slow]
    stops += [(member, True) for member in (*place.holders, *heirs)]
    return Way(stops, min(PATIENCE_MAX, 1 + PATIENCE_EACH * max(0, place.depth - 1)), is_next=len(place.parents) == 1)


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
    :ours: the peer is not waited for: our own limit holds it back, or what came is being checked and kept.
    """

    __slots__ = ("got", "here_only", "late", "left", "looked_at", "member",
                 "moved_at", "ours", "patience", "priority", "scope", "ways")

    def __init__(self, member: Member, here_only: bool, ways: dict[int, Way], now: float, *, jitter: float,
                 priority: Priority) -> None:
        self.member = member
        self.here_only = here_only
        self.priority = priority
        self.ways = ways
        self.left = set(ways)
        self.moved_at = self.looked_at = now
        self.patience = jitter * min(way.patience for way in ways.values())
        self.late = self.ours = False
        self.got = 0
        self.scope = trio.CancelScope()
