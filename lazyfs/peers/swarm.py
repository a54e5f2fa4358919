"""
The swarm as a node uses it: pieces by peers, as far as arithmetic and health allow; the rest is the origin's.

Layer: peers. Who calls: fetch.peering, mirror.pieces, benchmarks.scale; on one trio loop. Knows no mount, table or
registry: pieces come by an Exchange and go to the caller's `deliver`. Nobody is waited for who may wait for us: a
request goes to members of lower score only (topology), nothing here blocks on a count of requests, and each fetch
ends at its deadline. State: a topology a resource, a Health a peer. No task outlives its fetch.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from lazyfs import limits
from lazyfs.errors import PeerLacksError
from lazyfs.peers.health import HealthBook
from lazyfs.peers.known import Known
from lazyfs.peers.model import HERE_ONLY, Priority, View
from lazyfs.peers.pace import Pace
from lazyfs.peers.rates import Rate
from lazyfs.peers.referrals import Referrals
from lazyfs.peers.swarmfetch import SwarmFetch
from lazyfs.peers.topology import Place, Topology, group_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.peers.health import Report
    from lazyfs.peers.model import Deliver, Exchange, Member, Origin, PieceRequest, Resource



@dataclass(frozen=True, slots=True)
class SwarmLimits:
    """
    :download_rate: bytes/s from all peers; 0: no limit. What a read waits for is counted, but never held up.
    :requests_per_peer: under way at once; a bound, not a window: callers have those.
    :request_bytes: of one request.
    """

    download_rate: float = 0.0
    requests_per_peer: int = 256
    request_bytes: int = 16 * limits.MIB


class Swarm:
    """
    :me: this node; it never asks itself.
    :deaf_at: when this loop was found to have been late: what peers said until then may not have been taken.
    :counters: fetches, requests, referred, hedges, hurried, hedges_won, pieces, bytes, origin_pieces, duplicate_bytes.
    :coming: whether this node has a piece, or is getting it; None: reads ask by the trees alone, nobody is referred.

    `make_topology`: of a view; a simulation of many nodes shares them.
    """

    def __init__(self, me: Member, exchange: Exchange, bounds: SwarmLimits | None = None, *,
                 make_topology: Callable[[View], Topology] = Topology, rng: random.Random | None = None) -> None:
        self.me = me
        self.exchange = exchange
        self.bounds = bounds or SwarmLimits()
        self.health = HealthBook()
        self.pace = Pace()
        self.deaf_at = 0.0
        self.download = Rate(self.bounds.download_rate)
        self.coming: Callable[[str, int], bool] | None = None
        self._referrals = Referrals()
        self.random = rng or random.Random()    # noqa: S311 - spreads waits
        self.counters: Counter[str] = Counter()
        self._make_topology = make_topology
        self._known: dict[str, Known] = {}
        self._running: set[SwarmFetch] = set()

    def set_view(self, key: str, view: View) -> None:
        """Who is in the swarm of a resource (Resource.key), from now on; fetches under way keep what they had."""
        old = self._known.get(key)
        if old is not None and (old.view is view or old.view == view):
            return
        members = view.members
        if not any(member.id == self.me.id for member in members):
            members = (*members, self.me)
        self._known[key] = Known(view, self._make_topology(
            view if members is view.members else View(members, view.complete, view.partial)),
            probe_misses=old.probe_misses if old is not None else 0)

    def forget(self, key: str) -> None:
        """The resource is no longer shared."""
        self._known.pop(key, None)
        self._referrals.forget(key)

    def view(self, key: str) -> View | None:
        known = self._known.get(key)
        return known.view if known is not None else None

    def place(self, resource: Resource, index: int) -> Place | None:
        """Where this node stands in the tree of a piece; None: it knows no swarm for it."""
        known = self._known.get(resource.key)
        if known is None:
            return None
        return known.place(self.me, resource.key, index // group_pieces(resource), trio.current_time())

    async def fetch(self, resource: Resource, indexes: Sequence[int], *, priority: Priority, deadline: float,
                    hops: int, deliver: Deliver, origin: Origin | None = None, request: str = "") -> list[int]:
        """
        Have pieces brought by peers. Returns those that the origin must give, ascending: this node is the root for
        them, or no peer has delivered. Checkpoint: perhaps; on cancel: pieces that were delivered stay.

        :deadline: trio's clock; what is missing then is returned.
        :hops: 0 for this node's own wants; of a peer's request its hops + 1. HERE_ONLY: peers give what they have.
        :deliver: called for each piece once, or again after it said False. A LazyfsError of it comes out of here.
        :origin: is called with those for the origin, as soon as that is known; then [] is returned.

        Raises:
            PeerLacksError: it has been passed on too often.

        """
        if hops > HERE_ONLY:
            raise PeerLacksError(f"{resource.key}: passed on {hops} times")
        known = self._known.get(resource.key)
        self.counters["fetches"] += 1
        if known is None or len(known.topology) < 2 or deadline <= trio.current_time():
            self.counters["origin_pieces"] += len(indexes)
            if origin is None:
                return sorted(indexes)
            origin(sorted(indexes))
            return []
        one = SwarmFetch(self, known, resource, indexes, priority=priority, deadline=deadline, hops=hops,
                         deliver=deliver, origin=origin, request=request)
        self._running.add(one)
        try:
            return await one.run()
        finally:
            self._running.discard(one)

    def is_slow(self, member: Member) -> bool:
        """As it was found, or says."""
        return self.health.is_slow(member.id, trio.current_time())

    def says_slow(self, member: Member) -> bool:
        """By its own word, beside the others'."""
        return self.health.rates.is_slow(member.id, trio.current_time())

    def refer(self, request: PieceRequest) -> str:
        """Whom a peer is to ask instead, host:port; itself: the origin. "": it is this node that serves it."""
        key = request.resource.key
        known, coming = self._known.get(key), self.coming
        asker = known.member(request.asker) if known is not None else None    # one id, however often it asks
        if (known is None or coming is None or asker is None or asker.id == self.me.id
                or request.priority is not Priority.FOREGROUND or len(request.indexes) != 1):
            return ""
        index = request.indexes[0]

        def here() -> str:
            place = self.place(request.resource, index) or Place()
            gets = place.parents or place.holders or (place.heirs and known.probe_pays(read=True))
            return self.me.id if gets or coming(key, index) else ""

        source = self._referrals.source(key, index, asker.id, here=here, usable=self._usable(known, key))
        member = known.member(source) if source != self.me.id else None
        return member.address if member is not None else ""

    def refer_own(self, key: str, index: int) -> Member | None:
        """The same for a read of this node, of whose pieces it is the root. None: nobody."""
        known = self._known.get(key)
        if known is None or self.coming is None:
            return None
        source = self._referrals.source(key, index, self.me.id, here=str, usable=self._usable(known, key))
        return None if source in {"", self.me.id} else known.member(source)

    def _usable(self, known: Known, key: str) -> Callable[[str], bool]:
        now = trio.current_time()
        return lambda member: known.member(member) is not None and (member == self.me.id or not (
            self.health.is_slow(member, now) or self.health.is_away(member, key, now)))

    def told_rate(self, member_id: str, step: int) -> None:
        """A member has said what it can give (rates): who is slow beside the others is not waited for from now on."""
        rates = self.health.rates
        now, usual = trio.current_time(), rates.usual
        was_slow = rates.is_slow(member_id, now)
        self.health.of(member_id)    # its bound is the rates' as well
        if rates.say(member_id, step, now) and (rates.usual != usual or rates.is_slow(member_id, now) != was_slow):
            for one in self._running:
                one.stir()

    def urge(self, key: str, index: int) -> None:
        """A read of this node waits for a piece by now: if it is under way for something less urgent, that hurries."""
        for one in self._running:
            if one.key == key:
                one.urge(index)

    def take_reports(self) -> list[Report]:
        """Of bad peers, since the last call: for the tracker."""
        return self.health.take_reports()

    def describe(self) -> dict[str, object]:
        """For `lazyfs peers` and metrics: plain dicts. Rates in bytes/s, times in seconds."""
        now = trio.current_time()
        members = {member.id: member for known in self._known.values() for member in known.topology.members}
        peers = []
        for name, health in self.health.known():
            away = max(0.0, health.away_until - now)
            member = members.get(name)
            peers.append({
                "id": name, "address": member.address if member else "", "zone": member.zone if member else "",
                "running": health.running, "requests": health.requests, "pieces": health.pieces,
                "bytes": health.bytes_received, "failures": health.failures, "busy": health.busy,
                "wrong_pieces": health.wrong_pieces, "hedges": health.hedges,
                "p50_s": health.latencies.quantile(0.5), "p95_s": health.latencies.quantile(0.95),
                "away": health.away if away else "", "away_s": away, "slow": health.slow_until > now,
                "last_error": health.last_error,
            })
        swarms = {key: {"members": len(known.topology), "complete": len(known.view.complete)}
                  for key, known in sorted(self._known.items())}
        return {"counters": dict(self.counters), "pace": self.pace.describe(), "peers": peers, "swarms": swarms}
