"""
One call of Swarm.fetch: its pieces by group, the requests under way for them, hedges, and what is left to the origin.

Layer: peers. Who calls: swarm. A group's pieces have a *way*: the members to ask, in order. A request (attempt) asks
one member for the pieces of all ways that have come to it. Who fails is followed by the next of each way at once; who
is slow gets company (a hedge), and the first to deliver wins. A way goes to the origin when nobody is left to ask and
nothing is under way: never because those who were asked take long, or a slow registry would be asked by all.
Invariants: a piece is in `missing` until it was delivered or given to the origin; a way without a running attempt is
either waiting for its `again_at`, or has nothing missing. All tasks are in this call's nursery.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import LazyfsError, PeerBusyError, PeerError, PeerLacksError, PeerRefusedError
from lazyfs.peers.lateness import DEAF_S, Quiet, due_at, is_left, judge, quiet, root_gone_at
from lazyfs.peers.model import HERE_ONLY, PieceRequest, Priority
from lazyfs.peers.topology import group_pieces
from lazyfs.peers.ways import Attempt, Manner, Way, here_way, split, way_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lazyfs.peers.known import Known
    from lazyfs.peers.model import Deliver, Member, Origin, Piece, Resource
    from lazyfs.peers.swarm import Swarm
    from lazyfs.peers.ways import Stop

HOP_SHARE = 0.95        # of what is left goes on with a request,
HOP_MAX_S = 0.2         # but no more than this is kept: what comes at the last moment must still come back
ROOT_LATE_S = 2.0       # a root that has been late for so long, the next in the order no longer waits for
LOOK_S = 0.5            # so often what is late is worked out anew: the first requests began before anything was usual
BUSY_MIN_S, BUSY_MAX_S = 0.05, 2.0
BUSY_ROUNDS = 3         # of a way whose peers were all busy; then the origin
BETTER_MAX = 2          # members that a busy one may name


class SwarmFetch:
    """Of one call; `run` does it."""

    def __init__(self, swarm: Swarm, known: Known, resource: Resource, indexes: Sequence[int], *, priority: Priority,
                 deadline: float, hops: int, deliver: Deliver, origin: Origin | None, request: str) -> None:
        self._swarm, self._known, self._resource = swarm, known, resource
        self.key = resource.key
        self._priority, self._deadline, self._hops = priority, deadline, hops
        self._deliver, self._give_origin, self._request = deliver, origin, request
        self._now: Callable[[], float] = trio.current_time
        self._missing = set(indexes)
        self._ways: dict[int, Way] = {}       # by piece
        self._all_ways = self._make_ways()
        self._attempts: set[Attempt] = set()
        self._delivering: set[int] = set()
        self._urgent: dict[int, float] = {}   # reads wait for these: when somebody else is asked as well
        self._origin: list[int] = []
        self._ended = trio.Event()            # nothing is missing, or it has failed
        self._sleep = trio.CancelScope()      # of _work, until something is late
        self._failure: LazyfsError | None = None

    async def run(self) -> list[int]:
        self._advance(self._all_ways, None)
        if self._missing and not self._failure:
            await self._work()
        if self._failure is not None:
            raise self._failure
        self._to_origin(list(self._missing))
        return [] if self._give_origin is not None else sorted(self._origin)

    def stir(self) -> None:
        """A peer was found to be slow: look at what is under way."""
        self._sleep.deadline = -math.inf

    async def _work(self) -> None:
        with trio.move_on_at(self._deadline):
            async with trio.open_nursery() as nursery:
                for attempt in self._attempts:
                    nursery.start_soon(self._ask, attempt, nursery)
                while not self._ended.is_set():
                    wake_at = self._wake_at()
                    with trio.CancelScope(deadline=wake_at) as self._sleep:
                        await self._ended.wait()
                    if self._now() > wake_at + DEAF_S:
                        self._swarm.deaf_at = self._now()
                    self._look(nursery)
                nursery.cancel_scope.cancel()

    def urge(self, index: int) -> None:
        """A read has come to wait for a piece, perhaps one of these."""
        if index in self._missing and self._priority is not Priority.FOREGROUND and index not in self._urgent:
            usual = self._swarm.health.rates.usual
            piece_s = self._resource.piece_size / 2.0 ** usual if usual else 0.0
            self._urgent[index] = self._now() + self._swarm.pace.urgent_s(self._priority, piece_s)
            self._sleep.deadline = min(self._sleep.deadline, self._urgent[index])

    # --- ways -----------------------------------------------------------------------------------------------------

    def _make_ways(self) -> list[Way]:
        size = group_pieces(self._resource)
        by_group: dict[int, Way] = {}
        for index in self._missing:
            group = index // size
            way = by_group.get(group)
            if way is None:
                way = by_group[group] = self._way(group)
            way.missing.add(index)
            self._ways[index] = way
            if way.is_root and self._priority is Priority.FOREGROUND and self._hops < HERE_ONLY:
                way.ask_first(self._swarm.refer_own(self.key, index))
        return list(by_group.values())

    def _way(self, group: int) -> Way:
        place = self._known.place(self._swarm.me, self._resource.key, group, self._now())
        read = self._priority is Priority.FOREGROUND
        if self._hops == HERE_ONLY:
            return here_way(place)
        pays = place.heirs and not place.holders and self._known.probe_pays(read=read)
        return way_of(place, self._swarm.is_slow, self._swarm.says_slow,
                      place.heirs[:1 if read else None] if pays else (),
                      refers=read and self._swarm.coming is not None)

    def _advance(self, ways: Iterable[Way], nursery: trio.Nursery | None) -> None:
        """Ask the next member of each way; those that have none, and nothing under way, wait or go to the origin."""
        chosen: dict[tuple[str, Manner], tuple[Member, list[Way]]] = {}
        for way in ways:
            stop = self._next_stop(way)
            if stop is not None:
                chosen.setdefault((stop[0].id, stop[1]), (stop[0], []))[1].append(way)
            elif not way.running and way.missing:
                self._out_of_members(way)
        for (_, manner), (member, together) in chosen.items():
            for part in split(together, self._swarm.bounds.request_bytes // self._resource.piece_size):
                self._start(member, manner, part, nursery)

    def _next_stop(self, way: Way) -> Stop | None:
        now, swarm = self._now(), self._swarm
        while way.missing and way.next < len(way.stops):
            stop = way.stops[way.next]
            way.next += 1
            member_id = stop[0].id
            if member_id == swarm.me.id or swarm.health.is_away(member_id, self._resource.key, now):
                health = swarm.health.of(member_id)
                if health.away == "busy" and health.away_until > now:
                    way.retry_after = min(way.retry_after, health.away_until - now)
                continue
            if swarm.health.of(member_id).running >= swarm.bounds.requests_per_peer:
                way.retry_after = BUSY_MIN_S
                continue
            return stop
        return None

    def _out_of_members(self, way: Way) -> None:
        """Nobody is left to ask. Were they only busy, and nobody sleeps on it, they are asked again."""
        pause = min(BUSY_MAX_S, max(BUSY_MIN_S, way.retry_after)) * self._swarm.random.uniform(1.0, 1.5)
        again = way.retry_after < math.inf and way.busy_rounds < BUSY_ROUNDS
        if again and self._priority is not Priority.FOREGROUND and self._now() + pause < self._deadline:
            way.busy_rounds += 1
            way.again_at, way.retry_after, way.next = self._now() + pause, math.inf, 0
            self._sleep.deadline = min(self._sleep.deadline, way.again_at)
        else:
            self._to_origin(list(way.missing))

    def _to_origin(self, indexes: list[int]) -> None:
        if not indexes:
            return
        for index in indexes:
            self._missing.discard(index)
            self._ways[index].missing.discard(index)
        self._swarm.counters["origin_pieces"] += len(indexes)
        if self._give_origin is not None:
            self._give_origin(sorted(indexes))
        else:
            self._origin += indexes
        if not self._missing:
            self._ended.set()

    # --- requests -------------------------------------------------------------------------------------------------

    def _start(self, member: Member, manner: Manner, pieces: dict[int, Way], nursery: trio.Nursery | None,
               priority: Priority | None = None) -> None:
        now = self._now()
        attempt = Attempt(member, manner, pieces, now, jitter=self._swarm.random.uniform(0.9, 1.2),
                          priority=self._priority if priority is None else priority)
        health = self._swarm.health.of(member.id)
        health.running += 1
        health.requests += 1
        self._swarm.counters["requests"] += 1
        self._swarm.pace.asked(attempt.priority)
        self._attempts.add(attempt)
        for way in set(pieces.values()):
            way.running += 1
        self._sleep.deadline = min(self._sleep.deadline, due_at(self._swarm, attempt))
        if nursery is not None:
            nursery.start_soon(self._ask, attempt, nursery)

    async def _ask(self, attempt: Attempt, nursery: trio.Nursery) -> None:
        """One request from its beginning to its end, whatever that is."""
        try:
            with attempt.scope:
                await self._receive(attempt)
        except PeerBusyError as error:
            self._was_busy(attempt, error)
        except PeerLacksError:
            self._lacked(attempt)
        except PeerRefusedError as error:
            self._swarm.health.refused(attempt.member.id, self._resource.key, str(error), self._now())
        except PeerError as error:
            self._swarm.health.gone(attempt.member.id, str(error), self._now())
        except LazyfsError as error:    # no token to show it, or deliver's own
            self._swarm.health.refused(attempt.member.id, self._resource.key, str(error), self._now())
        finally:
            self._close(attempt)
        if self._missing:
            for index in sorted(attempt.left & self._urgent.keys()):
                self._hurry(index, nursery)
            self._advance([way for way in self._open_ways(attempt) if not way.running], nursery)

    async def _receive(self, attempt: Attempt) -> None:
        swarm, resource = self._swarm, self._resource
        size = sum(resource.piece_bytes(index) for index in attempt.left)
        attempt.ours = True
        if attempt.priority is Priority.FOREGROUND:
            swarm.download.take_now(size)
        else:
            await swarm.download.take(size)
        left_s = self._deadline - self._now()
        request = PieceRequest(resource, tuple(sorted(attempt.left)), max(left_s * HOP_SHARE, left_s - HOP_MAX_S),
                               attempt.hops(self._hops), attempt.priority, self._request,
                               swarm.me.id if attempt.manner is Manner.WHO and len(attempt.left) == 1 else "")
        async with swarm.exchange.ask(attempt.member, request) as pieces:    # with a token: that was waited for
            attempt.ours = False
            attempt.moved_at = self._now()
            async for piece in pieces:
                if not await self._take(attempt, piece) or not attempt.left:
                    return
        if attempt.left:
            self._lacked(attempt)

    async def _take(self, attempt: Attempt, piece: Piece) -> bool:
        """Deliver a piece; False: the rest of this answer is not wanted."""
        swarm, member, index, size = self._swarm, attempt.member, piece.index, len(piece.data)
        if index not in attempt.ways or size != self._resource.piece_bytes(index):
            swarm.health.lied(member.id, f"{self._resource.key}: piece {index} of {size} bytes", self._now())
            return False
        self._moved(attempt, size)
        if index not in self._missing or index in self._delivering:
            swarm.counters["duplicate_bytes"] += size
            attempt.left.discard(index)
            return True
        self._delivering.add(index)
        attempt.ours = True
        try:
            good = await self._deliver(piece, member)
        except LazyfsError as error:
            self._failure = error
            self._ended.set()
            return False
        finally:
            attempt.ours = False
            self._delivering.discard(index)
        attempt.moved_at = self._now()
        if not good:
            swarm.health.lied(member.id, f"{self._resource.key}: piece {index} has another digest", self._now())
            return False
        self._delivered(attempt, index, size)
        return True

    def _moved(self, attempt: Attempt, size: int) -> None:
        now, health = self._now(), self._swarm.health.of(attempt.member.id)
        seconds = now - attempt.moved_at
        attempt.moved_at = now
        attempt.got += 1
        health.late -= attempt.late
        attempt.late = False
        self._swarm.health.delivered(attempt.member.id, size, now)
        self._swarm.pace.add(attempt.priority, seconds)
        health.latencies.add(seconds)
        judge(self._swarm, attempt, seconds, now, came=True)

    def _delivered(self, attempt: Attempt, index: int, size: int) -> None:
        swarm = self._swarm
        swarm.counters["pieces"] += 1
        swarm.counters["bytes"] += size
        if attempt.here_only:
            self._known.probe_misses = 0
        self._missing.discard(index)
        self._ways[index].missing.discard(index)
        for other in self._attempts:
            if index in other.left:
                other.left.discard(index)
                if other is not attempt:
                    swarm.counters["hedges_won"] += 1
                    if not other.left:
                        other.scope.cancel()
        if not self._missing:
            self._ended.set()

    def _close(self, attempt: Attempt) -> None:
        health = self._swarm.health.of(attempt.member.id)
        health.running -= 1
        health.late -= attempt.late
        self._attempts.discard(attempt)
        for way in set(attempt.ways.values()):
            way.running -= 1
        now = self._now()
        if attempt.scope.cancelled_caught and not attempt.got and health.away_until <= now:    # another one was faster
            judge(self._swarm, attempt, now - attempt.moved_at, now, came=True)

    # --- what went wrong ------------------------------------------------------------------------------------------

    def _open_ways(self, attempt: Attempt) -> list[Way]:
        return list({id(way): way for index, way in attempt.ways.items() if index in self._missing}.values())

    def _lacked(self, attempt: Attempt) -> None:
        if attempt.here_only:
            self._known.probe_misses += not attempt.got
        elif attempt.manner is not Manner.COMING:
            self._swarm.health.lacks(attempt.member.id, self._resource.key, self._now())
            if not attempt.got:
                self._known.lacks(attempt.member.id, self._now())

    def _was_busy(self, attempt: Attempt, error: PeerBusyError) -> None:
        """It is left alone for a while; members that it names, if we know them, may have it."""
        if attempt.manner is Manner.WHO and error.better and not error.retry_after_s:
            self._swarm.counters["referred"] += 1
            for way in self._open_ways(attempt):
                way.refer(self._known.at(error.better[0]), self._swarm.me)
            return
        pause = min(BUSY_MAX_S, max(BUSY_MIN_S, error.retry_after_s))
        self._swarm.health.busy(attempt.member.id, self._now() + pause, str(error))
        named = [self._known.at(address) for address in error.better[:BETTER_MAX]]
        for way in self._open_ways(attempt):
            way.busy(pause, [member for member in named if member is not None])

    # --- time -----------------------------------------------------------------------------------------------------

    def _wake_at(self) -> float:
        now = self._now()
        return min(*(due_at(self._swarm, attempt) for attempt in self._attempts),
                   *(way.again_at for way in self._all_ways), *self._urgent.values(), now + LOOK_S)

    def _look(self, nursery: trio.Nursery) -> None:
        """Hedge what is late, ask busy ones again."""
        now = self._now()
        for attempt in [one for one in self._attempts if due_at(self._swarm, one) <= now]:
            self._hedge(attempt, nursery)
        late = [way for way in self._all_ways if way.again_at <= now]
        for way in late:
            way.again_at = math.inf
        self._advance(late, nursery)
        for index in [index for index, urgent_at in self._urgent.items() if urgent_at <= now]:
            self._hurry(index, nursery)

    def _hurry(self, index: int, nursery: trio.Nursery) -> None:
        """
        A read still waits for that piece: the next one is asked for it alone, in the foreground; and again later.

        Where the root alone was before this node, and says nothing, the origin is.
        """
        del self._urgent[index]
        way = self._ways[index]
        if index not in self._missing or index in self._delivering:
            return
        if way.next >= len(way.stops):
            gone_at = root_gone_at(self._swarm, [one for one in self._attempts if index in one.left])
            if way.is_next and gone_at <= self._now():
                self._to_origin([index])
            elif way.is_next and gone_at < math.inf:
                self._urgent[index] = gone_at
            return
        self.urge(index)
        if self._swarm.pace.may_hedge(Priority.FOREGROUND, self._now()) and (stop := self._next_stop(way)) is not None:
            self._swarm.counters["hurried"] += 1
            self._start(*stop, {index: way}, nursery, Priority.FOREGROUND)

    def _hedge(self, attempt: Attempt, nursery: trio.Nursery) -> None:
        """
        Ask the others as well; one that has been slow all the time is not waited for at all.

        A root that is much later than others usually are, or was gone and is silent again, is given up by the one that
        comes next, which asks the origin: nobody else does, so two copies of a group are the most; a slow origin makes
        all roots late alike, and they say that they wait.
        That is rare, so it asks no leave of Pace; what is merely late does, or a full network would be asked twice.
        """
        attempt.looked_at = now = self._now()
        silent, before = quiet(self._swarm, attempt, now), self._swarm.health.of(attempt.member.id).gone_in_a_row
        if silent:
            self._swarm.health.quiet(attempt.member.id, now - self._swarm.exchange.heard_at(attempt.member), now)
        late_s, was_slow = now - attempt.moved_at, self._swarm.is_slow(attempt.member)
        if not (silent or attempt.here_only):
            judge(self._swarm, attempt, late_s, now, came=False)
        if attempt.here_only or silent is Quiet.GONE or is_left(self._swarm, attempt):
            attempt.scope.cancel()    # the next are asked when it has ended
            return
        alone = [way for way in self._open_ways(attempt) if way.running == 1]    # else another one is asked already
        ways = [way for way in alone if way.next < len(way.stops)]
        given_up = (silent and before) or (attempt.late and (was_slow or late_s > ROOT_LATE_S))
        roots = [way for way in alone if given_up and way.is_next and way not in ways]
        if not (ways or roots) or not (silent or self._swarm.pace.may_hedge(attempt.priority, now)):
            return
        self._swarm.counters["hedges"] += 1
        self._swarm.health.of(attempt.member.id).hedges += 1
        for way in ways:    # not to one that others wait for in vain
            way.put_last(lambda member: self._swarm.health.of(member.id).late > 0)
        self._advance(ways, nursery)
        self._to_origin([index for way in roots for index in way.missing])
        attempt.left &= self._missing
        if not attempt.left:
            attempt.scope.cancel()
