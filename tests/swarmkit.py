"""
A cluster in memory, on whatever clock runs: nodes with the real Swarm, links with bandwidth and delay, an origin.

A node's links are FIFO queues; a piece is stored and forwarded. Nodes can be killed (connections break), frozen (they
say nothing), made slow, lie, or be busy. Everything here is the tests' model of what is below the Exchange.
"""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import PeerBusyError, PeerError, PeerLacksError
from lazyfs.image.digest import Digest
from lazyfs.peers.model import HERE_ONLY, SILENCE_S, Kind, Member, Piece, Priority, Resource, View
from lazyfs.peers.swarm import Swarm, SwarmLimits
from lazyfs.peers.topology import Topology

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from lazyfs.peers.model import PieceRequest


def resource(pieces: int = 32, piece_size: int = 1 << 16, name: str = "a") -> Resource:
    return Resource(Kind.DEVICE, Digest("sha256:" + name.encode().hex().rjust(64, "0")), pieces * piece_size,
                    piece_size)


def members(count: int, zones: int = 1, rates: Iterable[int] = ()) -> tuple[Member, ...]:
    rate_of = dict(enumerate(rates))
    return tuple(Member(f"n{index:04}", f"h{index}:1", f"z{index % zones}" if zones > 1 else "",
                        rate_of.get(index, 0)) for index in range(count))


class Link:
    """One thing after the other. `bytes_s` 0: at once."""

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s, self.free_at = bytes_s, 0.0

    def book(self, size: int, start: float) -> float:
        """When it is through."""
        if not self.bytes_s:
            return start
        self.free_at = max(start, self.free_at) + size / self.bytes_s
        return self.free_at


@dataclass
class Node:
    """
    One machine.

    :state: up, dead, frozen, lying, or absent (it has no part in the resource).
    :disk: what it gives to others comes from there.
    """

    member: Member
    swarm: Swarm
    up: Link
    down: Link
    have: set[int] = field(default_factory=set)
    state: str = "up"
    disk: Link = field(default_factory=lambda: Link(0.0))
    busy_until: float = 0.0
    better: tuple[str, ...] = ()
    sent: int = 0
    frozen_at: float = 0.0
    flights: dict[int, trio.Event] = field(default_factory=dict)
    scopes: set[trio.CancelScope] = field(default_factory=set)
    changed: trio.Event = field(default_factory=trio.Event)


class Cluster:
    """:origin_pieces: what the origin gave, by node. :asked: requests, by (asker, member)."""

    def __init__(self, all_members: tuple[Member, ...], what: Resource, *, link: float = 0.0, origin_link: float = 0.0,
                 rtt_s: float = 0.001, bounds: SwarmLimits | None = None) -> None:
        self.what, self.rtt_s = what, rtt_s
        self.truth, self.lies = bytes(what.piece_size), b"\xff" * what.piece_size
        self.nodes: dict[str, Node] = {}
        self.origin = Link(origin_link)
        self.origin_pieces: list[tuple[str, int]] = []
        self.asked: Counter[tuple[str, str]] = Counter()
        self.origin_delay_s = 0.0
        self._topologies: dict[int, tuple[View, Topology]] = {}
        for member in all_members:
            self.add(member, link, bounds)
        self.set_view(View(all_members))

    def add(self, member: Member, link: float = 0.0, bounds: SwarmLimits | None = None) -> Node:
        swarm = Swarm(member, _Net(self, member.id), bounds, make_topology=self._topology, rng=Random(member.id))
        node = self.nodes[member.id] = Node(member, swarm, Link(link), Link(link))
        return node

    def set_view(self, view: View) -> None:
        for node in self.nodes.values():
            node.swarm.set_view(self.what.key, view)

    def _topology(self, view: View) -> Topology:
        found = self._topologies.get(id(view))
        if found is None:
            found = self._topologies[id(view)] = view, Topology(view, orders_bytes_max=1 << 26)
        return found[1]

    async def want(self, node: Node, indexes: Iterable[int], *, deadline: float, hops: int = 0,
                   priority: Priority = Priority.PREFETCH, window: int = 64) -> None:
        """As a fetcher does it: single flight, a window, what the swarm returns from the origin."""
        limit = trio.CapacityLimiter(window)

        async def one(index: int) -> None:
            try:
                await self.get(node, index, deadline, hops, priority)
            finally:
                limit.release_on_behalf_of(index)

        async with trio.open_nursery() as nursery:
            for index in indexes:
                if index in node.have:
                    continue
                await limit.acquire_on_behalf_of(index)
                nursery.start_soon(one, index)

    async def get(self, node: Node, index: int, deadline: float, hops: int, priority: Priority) -> None:
        """Join the flight, or begin one: it goes on when who began it leaves, and ends with its node."""
        if index in node.have or node.state not in {"up", "lying"}:
            return
        if index not in node.flights:
            node.flights[index] = trio.Event()
            trio.lowlevel.spawn_system_task(self._fly, node, index, deadline, hops, priority)
        await node.flights[index].wait()

    async def _fly(self, node: Node, index: int, deadline: float, hops: int, priority: Priority) -> None:
        async def deliver(piece: Piece, _member: Member) -> bool:
            if piece.data[:1] == b"\xff":
                return False
            node.have.add(piece.index)
            return True

        with trio.CancelScope() as scope:
            node.scopes.add(scope)
            for one in await node.swarm.fetch(self.what, [index], priority=priority, deadline=deadline, hops=hops,
                                              deliver=deliver):
                await self._from_origin(node, one)
        node.scopes.discard(scope)
        node.flights.pop(index).set()

    async def _from_origin(self, node: Node, index: int) -> None:
        size = self.what.piece_bytes(index)
        self.origin_pieces.append((node.member.id, index))
        await trio.sleep(self.rtt_s / 2 + self.origin_delay_s)
        sent = self.origin.book(size, trio.current_time())
        arrived = max(sent, node.down.book(size, trio.current_time()))
        await trio.sleep_until(arrived + self.rtt_s / 2)
        node.have.add(index)

    def kill(self, name: str) -> None:
        self._turn(name, "dead")

    def freeze(self, name: str) -> None:
        self._turn(name, "frozen")

    def _turn(self, name: str, state: str) -> None:
        node = self.nodes[name]
        node.state, node.frozen_at = state, trio.current_time()
        for scope in node.scopes:
            scope.cancel()
        node.changed.set()


class _Net:
    """An Exchange: the network as one node sees it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name

    @asynccontextmanager
    async def ask(self, member: Member, request: PieceRequest) -> AsyncIterator[AsyncIterator[Piece]]:
        self._cluster.asked[self._name, member.id] += 1
        pieces = self._pieces(member.id, request)
        try:
            yield pieces
        finally:
            await pieces.aclose()

    def heard_at(self, member: Member) -> float:
        """Who is not frozen sends beats."""
        node = self._cluster.nodes[member.id]
        return node.frozen_at if node.state == "frozen" else trio.current_time()

    async def _pieces(self, name: str, request: PieceRequest) -> AsyncIterator[Piece]:
        cluster, me = self._cluster, self._cluster.nodes[self._name]
        node = cluster.nodes[name]
        await self._sleep(node, cluster.rtt_s / 2)
        if node.state == "absent":
            raise PeerLacksError(f"{name} has no part in it")
        if node.busy_until > trio.current_time():
            raise PeerBusyError(f"{name} is busy", retry_after_s=node.busy_until - trio.current_time(),
                                better=node.better)
        until = trio.current_time() + request.seconds
        for index in request.indexes:
            if index not in node.have:
                if request.hops >= HERE_ONLY:
                    raise PeerLacksError(f"{name} has not {index}")
                await cluster.get(node, index, until, request.hops + 1, request.priority)
                await self._sleep(node, 0)
            if index not in node.have:
                raise PeerLacksError(f"{name} did not get {index}")
            size = cluster.what.piece_bytes(index)
            await self._sleep(node, node.disk.book(size, trio.current_time()) - trio.current_time())
            node.sent += size
            sent = node.up.book(size, trio.current_time())
            arrived = max(sent, me.down.book(size, trio.current_time()))
            await self._sleep(node, arrived + cluster.rtt_s / 2 - trio.current_time())
            yield Piece(index, cluster.lies if node.state == "lying" else cluster.truth)

    async def _sleep(self, node: Node, seconds: float) -> None:
        """So long, unless the node dies or freezes before."""
        if seconds > 0 and node.state in {"up", "lying"}:
            with trio.move_on_after(seconds):
                await node.changed.wait()
        if node.state == "dead":
            raise PeerError(f"{node.member.id} broke off")
        if node.state == "frozen":
            await trio.sleep(SILENCE_S)
            raise PeerError(f"{node.member.id} says nothing")
