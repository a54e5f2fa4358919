"""
A simulated node: it reads an image in order with a window, and answers peers: single flight, as the real fetcher.

Called by benchmarks.scale.cluster. The decisions of who is asked, hedged, left out are the real Swarm's. What a node
does itself follows fetch.peering: a missing piece is one flight, whoever wants it; what the swarm gives back, the
origin gives. State: `depth[i]` is 0 where piece i is missing, else how many links it has passed since the origin.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from typing import TYPE_CHECKING

import trio

from benchmarks.scale.network import Answer, Fabric, Link, Port
from lazyfs.errors import PeerBusyError, PeerError, PeerLacksError
from lazyfs.peers.model import BEAT_S, HERE_ONLY, SILENCE_S, Member, Piece, Priority, Resource
from lazyfs.peers.rates import Giving
from lazyfs.peers.uploads import UploadLimits, Uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.scale.origin import Origin
    from lazyfs.peers.ownrate import OwnRate
    from lazyfs.peers.swarm import Swarm

OWN_DEADLINE_S = 60.0
FETCH_BATCH = 8                      # pieces that a node asks its swarm for at once, of its own
_GOOD, _WRONG = b"g", b"w"           # a piece's bytes, so often as it is long


@functools.cache
def _bytes(one: bytes, count: int) -> bytes:
    """The same object for all nodes."""
    return one * count


class Node:
    """One of the cluster. `swarm` and `own_rate` are set by who makes it, before it starts."""

    swarm: Swarm
    own_rate: OwnRate

    def __init__(self, member: Member, resource: Resource, fabric: Fabric, origin: Origin, *, up: float, down: float,
                 window: int, hot: int, disk: float, work: float, in_order: bool = False, lies: bool = False,
                 ended: Callable[[], None]) -> None:
        """
        Not yet started.

        `up`, `down`: bytes/s. `hot`: pieces that a start needs. `disk`: bytes/s of what it gives;
        `work`: that its processor receives and gives together, 0: without end. `ended` is
        called once: it has all, or it died before.
        """
        self.member, self.resource, self.fabric = member, resource, fabric
        self.up, self.down = Link(up), Link(down)
        self.work = Link(work) if work else None
        self.port = Port(fabric, member.id)
        self.alive, self.has_begun, self.silent = True, False, False
        self.depth = bytearray(resource.piece_count)
        self.began_s = self.hot_s = self.done_s = self.died_s = 0.0
        self.uploads = self.dropped = 0
        self.nursery: trio.Nursery | None = None
        self._ended = ended
        self._origin, self._window, self._hot, self._disk = origin, window, hot, Link(disk)
        self._held = self._hot_held = self._next = self._place = 0
        self._in_order = in_order
        self._batch = max(1, min(FETCH_BATCH, window // 4))
        self._flights: dict[int, list[Answer]] = {}
        self._own: set[int] = set()
        self._at_origin: set[int] = set()
        self._queues: tuple[deque[tuple[Answer, int]], ...] = tuple(deque() for _ in Priority)
        self._sending = False
        self._open: dict[int, tuple[Answer, AbstractContextManager[None]]] = {}
        self._limits = Uploads(UploadLimits())
        self.giving = Giving()
        self._told: dict[str, int] = {}       # the rate that an asker has heard of
        self._piece = _bytes(_WRONG if lies else _GOOD, resource.piece_size)

    # --- reading -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Say that it takes part. It reads as soon as it knows who else does."""
        self.has_begun = True
        self.began_s = trio.current_time()

    @property
    def share(self) -> float:
        """Of it that is here."""
        return self._held / self.resource.piece_count

    @property
    def complete(self) -> bool:
        return self._held == self.resource.piece_count

    def die(self, silent: bool) -> None:
        """Its process ends: peers' connections break. `silent`: the machine does, nobody hears of it."""
        self.alive, self.silent, self.died_s = False, silent, trio.current_time()
        for answer, _ in self._open.values():
            answer.fail(PeerError(f"{self.member.id} is silent" if silent else f"{self.member.id} broke off"),
                        after_s=SILENCE_S if silent else 0.0)
        self._open.clear()
        if not self.complete:
            self._ended()
        if self.nursery is not None:
            self.nursery.cancel_scope.cancel()

    def read(self) -> None:
        """Keep the window full, of all of it in order; in batches, as a window of the fetcher is."""
        count = self.resource.piece_count
        if self._in_order:
            self._read_ahead(count)
            return
        while self._next < count and len(self._own) <= self._window - self._batch:
            batch: list[int] = []
            while self._next < count and len(batch) < self._batch:
                if not self.depth[self._next]:
                    self._own.add(self._next)
                    if self._next not in self._flights:
                        batch.append(self._next)
                self._next += 1
            if batch:
                self._fetch(batch, 0, trio.current_time() + OWN_DEADLINE_S, Priority.PREFETCH)

    def _read_ahead(self, count: int) -> None:
        """As fetch.readahead does for a reader that has got to the first piece that is missing."""
        while self._place < count and self.depth[self._place]:
            self._place += 1
        if self._place < count and self._next - self._place <= self._window // 2:
            begin, self._next = max(self._next, self._place), min(self._place + self._window, count)
            batch = [index for index in range(begin, self._next)
                     if not self.depth[index] and index not in self._flights]
            if batch:
                self._fetch(batch, 0, trio.current_time() + OWN_DEADLINE_S, Priority.PREFETCH)

    def _fetch(self, indexes: Sequence[int], hops: int, deadline: float, priority: Priority) -> None:
        for index in indexes:
            self._flights[index] = []
        if self.nursery is not None:
            self.nursery.start_soon(self._ask, indexes, hops, deadline, priority)

    async def _ask(self, indexes: Sequence[int], hops: int, deadline: float, priority: Priority) -> None:
        await self.swarm.fetch(self.resource, indexes, priority=priority, deadline=deadline, hops=hops,
                               deliver=self._deliver, origin=self._ask_origin)

    def _ask_origin(self, indexes: list[int]) -> None:
        for index in indexes:
            self._at_origin.add(index)
            self._origin.ask(self, index)

    async def _deliver(self, piece: Piece, member: Member) -> bool:
        if piece.data[:1] == _WRONG:
            return False
        source = self.fabric.hosts[member.id]
        assert isinstance(source, Node)
        self.landed(piece.index, min(source.depth[piece.index] + 1, 255))
        return True

    def landed(self, index: int, depth: int) -> None:
        """A good piece is here."""
        if self.depth[index] or not self.alive:
            return
        self.depth[index] = max(1, depth)
        self._held += 1
        now = trio.current_time()
        if index < self._hot:
            self._hot_held += 1
            if self._hot_held == self._hot:
                self.hot_s = now
        if self.complete:
            self.done_s = now
            self._ended()
        for answer in self._flights.pop(index, ()):
            self._give(answer, index)
        self._own.discard(index)
        self.read()

    # --- answering -----------------------------------------------------------------------------------------------

    def asked(self, answer: Answer) -> None:
        """A peer's question."""
        request = answer.request
        if not self.has_begun:
            answer.fail(PeerLacksError(f"{self.member.id} does not take part"))
            return
        if not answer.open:
            return
        size = len(request.indexes) * self.resource.piece_size
        place = self._limits.request(answer.asker, request.priority, size, request.seconds)
        try:
            place.__enter__()
        except PeerBusyError as error:
            answer.fail(error)
            return
        self._open[id(answer)] = answer, place
        self._tell_soon(answer.asker, 0.0)
        missing = []
        for index in request.indexes:
            if self.depth[index]:
                self._give(answer, index)
            elif index in self._flights and (request.hops < HERE_ONLY or index in self._at_origin):
                self._flights[index].append(answer)
            elif request.hops == HERE_ONLY:
                answer.outstanding -= 1
            else:
                missing.append(index)
        if missing:
            self._fetch(missing, request.hops + 1, trio.current_time() + request.seconds, request.priority)
            for index in missing:
                self._flights[index].append(answer)
        if not answer.outstanding:
            answer.fail(PeerLacksError(f"{self.member.id} has nothing of it"))

    def left(self, answer: Answer) -> None:
        """Its asker waits no longer."""
        found = self._open.pop(id(answer), None)
        if found is not None:
            found[1].__exit__(None, None, None)

    def _give(self, answer: Answer, index: int) -> None:
        if not answer.open:
            return
        self.giving.begin(answer.asker)
        if self._disk.rate == math.inf:
            self._queue(answer, index)
        else:
            ready = self._disk.carry(trio.current_time(), self.resource.piece_bytes(index))
            self.fabric.timeline.at(ready, self._queue, answer, index)

    def _queue(self, answer: Answer, index: int) -> None:
        """The disk has read it."""
        self._queues[answer.request.priority].append((answer, index))
        if not self._sending:
            self._send()

    def _send(self) -> None:
        """The next piece goes into the link."""
        for queue in self._queues:
            while queue and self.alive:
                answer, index = queue.popleft()
                if not answer.open:
                    self.dropped += 1
                    self.giving.end(answer.asker)
                    continue
                self._sending = True
                size, now = self.resource.piece_bytes(index), trio.current_time()
                sent = self.up.carry(self.work.carry(now, size) if self.work else now, size)
                self.fabric.timeline.at(sent, self._sent, answer, index, size)
                return

    def _sent(self, answer: Answer, index: int, size: int) -> None:
        """A piece has passed the link; who waits for others hears with a beat what this node can give, if it is new."""
        self._sending = False
        self.uploads += 1
        if self.fabric.zones[answer.asker] != self.member.zone:
            self.fabric.cross_zone_bytes += size
        now = trio.current_time()
        arrived = self.fabric.hosts[answer.asker].down.deliver(now, size)
        piece = Piece(index, self._piece[:size] if size < len(self._piece) else self._piece)
        began = now - size / self.up.rate
        self.fabric.timeline.at(answer.carry(began, arrived, size), self._received, answer, piece)
        before = self.giving.step
        self.giving.gave(size, size / self.up.rate + size / self._disk.rate)
        self.giving.end(answer.asker)
        if self.giving.step != before:
            for waiting, _ in self._open.values():
                self._tell_soon(waiting.asker, BEAT_S)
        self._send()

    def _tell_soon(self, asker: str, after_s: float) -> None:
        if self._told.get(asker, 0) != self.giving.step:
            way_s = self.fabric.half_rtt_s(asker, self.member.id)
            self.fabric.timeline.at(trio.current_time() + after_s + way_s, self._tell, asker)

    def _tell(self, asker: str) -> None:
        if self.alive and self._told.get(asker, 0) != self.giving.step:
            self._told[asker] = self.giving.step
            host = self.fabric.hosts[asker]
            assert isinstance(host, Node)
            host.swarm.told_rate(self.member.id, self.giving.step)

    def _received(self, answer: Answer, piece: Piece) -> None:
        """The last byte is with the asker, whose processor may have other work."""
        asker = self.fabric.hosts[answer.asker]
        if asker.work is None:
            self._arrived(answer, piece)
        else:
            done = asker.work.carry(trio.current_time(), len(piece.data))
            self.fabric.timeline.at(done, self._arrived, answer, piece)

    def _arrived(self, answer: Answer, piece: Piece) -> None:
        if self.alive:
            self._tell(answer.asker)
            answer.land(piece)
