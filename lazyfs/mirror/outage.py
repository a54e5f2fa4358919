"""
Peers while the origin does not answer: whoever has something is asked for it, without trees.

Layer: mirror. Who calls: mirror.peering. A tree brings pieces from its root, which has them from the origin: without
one it leads nowhere, and who is the root himself asks nobody. So members are asked one after the other for what they
have there and then. State: none. Bounds: ASKED_MAX members a call, and the caller's deadline.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from lazyfs.errors import SourceError
from lazyfs.peers.health import Fault
from lazyfs.peers.model import HERE_ONLY, PieceRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.peers.model import Deliver, Member, Priority, Resource
    from lazyfs.peers.swarm import Swarm

ASKED_MAX: Final = 16


class Wanted(NamedTuple):
    """Pieces of a resource, as of Swarm.fetch."""

    resource: Resource
    indexes: Sequence[int]
    priority: Priority
    deadline: float
    request: str


def others(swarm: Swarm, key: str) -> list[Member]:
    """Members of a swarm but this one: who has all of it first, who is left alone last, who has lied not at all."""
    view, now = swarm.view(key), trio.current_time()
    if view is None:
        return []
    found = [one for one in view.members if one.id != swarm.me.id and not _has_lied(swarm, one, now)]
    random.shuffle(found)
    return sorted(found, key=lambda one: (swarm.health.is_away(one.id, key, now), one.id not in view.complete))


def _has_lied(swarm: Swarm, member: Member, now: float) -> bool:
    health = swarm.health.of(member.id)
    return health.away == Fault.LIED and health.away_until > now


async def from_anybody(swarm: Swarm, wanted: Wanted, deliver: Deliver) -> list[int]:
    """Which of the pieces nobody has. Raises LazyfsError: `deliver` does."""
    missing = set(wanted.indexes)
    with trio.move_on_at(wanted.deadline):
        for member in others(swarm, wanted.resource.key)[:ASKED_MAX]:
            try:
                await _from_one(swarm, member, wanted, missing, deliver)
            except SourceError:      # a PeerError, or there is no token to show
                continue
            if not missing:
                break
    return sorted(missing)


async def _from_one(swarm: Swarm, member: Member, wanted: Wanted, missing: set[int], deliver: Deliver) -> None:
    """Raises SourceError: it gives no more."""
    resource = wanted.resource
    request = PieceRequest(resource, tuple(sorted(missing)), max(0.0, wanted.deadline - trio.current_time()), HERE_ONLY,
                           wanted.priority, wanted.request)
    async with swarm.exchange.ask(member, request) as pieces:
        async for piece in pieces:
            if piece.index not in missing:
                continue
            if not await deliver(piece, member):
                swarm.health.lied(member.id, f"{resource.key}: piece {piece.index} is wrong", trio.current_time())
                return
            missing.discard(piece.index)
            swarm.download.take_now(len(piece.data))
            swarm.health.delivered(member.id, len(piece.data), trio.current_time())
            if not missing:
                return
