"""Lone reads that ask a piece's directory: who gets it from whom, and what happens when who was named fails."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.cache.device import CachedDevice
from lazyfs.errors import PeerBusyError, PeerLacksError
from lazyfs.peers.known import PROBE_MISSES_READ
from lazyfs.peers.model import COMING, Member, PieceRequest, Priority, View
from lazyfs.peers.server import serve
from lazyfs.peers.uploads import UploadLimits, Uploads
from tests.peernodekit import SAMPLE, peer_nodes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.peernodekit import PeerCluster, PeerNode

pytestmark = pytest.mark.trio
SIZE, COUNT = SAMPLE.table.chunk_size, SAMPLE.table.chunk_count
KEY = f"device/{SAMPLE.digest}"


def settle(cluster: PeerCluster) -> None:
    """They have found out that nobody had anything before them: a root's first reads look at others first."""
    for node in cluster.nodes:
        node.swarm._known[KEY].probe_misses = PROBE_MISSES_READ


def root_of(cluster: PeerCluster, index: int) -> PeerNode:
    device = cluster.nodes[0].device
    assert device is not None
    return next(node for node in cluster.nodes if (place := node.swarm.place(device.resource, index)) and place.is_root)


def has(node: PeerNode, index: int) -> bool:
    assert node.device is not None
    return node.device.cached.present(index, index)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():    # noqa: ASYNC110 - it is looked at from outside
            await trio.sleep(0.002)


async def ask(node: PeerNode, member: Member, request: PieceRequest) -> list[int]:
    async with node.swarm.exchange.ask(member, request) as pieces:
        return [piece.index async for piece in pieces]


async def test_the_first_to_read_asks_the_registry_and_the_others_get_it_there(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 5) as cluster:
        settle(cluster)
        root = root_of(cluster, 7)
        first, second, third, fourth = (node for node in cluster.nodes if node is not root)
        for node in (first, second, third, fourth):
            await node.read(7 * SIZE, SIZE)
        assert first.source.requests
        assert cluster.origin_bytes == SAMPLE.table.rows[7]["stored_size"]
        assert not has(root, 7)
        assert [node.swarm.counters["referred"] for node in (first, second, third, fourth)] == [1, 1, 1, 1]
        assert first.swarm.health.of(second.member.id).requests == 0
        assert first.store.counts.from_cache + first.store.counts.fetched == 2, "two each"
        assert second.store.counts.from_cache + second.store.counts.fetched == 1
        await root.read(7 * SIZE, SIZE)
        assert not root.source.requests


async def test_one_that_is_named_and_dies_costs_the_read_no_time_and_the_registry_one_more(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 4) as cluster:
        settle(cluster)
        root = root_of(cluster, 9)
        first, second, third = (node for node in cluster.nodes if node is not root)
        first.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.read, 9 * SIZE, SIZE)
            await until(lambda: first.source.requests)
            nursery.start_soon(second.read, 9 * SIZE, SIZE)
            await until(lambda: second.swarm.counters["referred"] and second.swarm.counters["requests"] == 2)
            nursery.start_soon(third.read, 9 * SIZE, SIZE)
            await until(lambda: third.swarm.counters["referred"] and third.swarm.counters["requests"] == 2)
            first.scope.cancel()
            await until(lambda: has(second, 9) and has(third, 9))
            first.source.gate.set()
        assert len(second.source.requests) + len(third.source.requests) <= 2
        assert not root.source.requests


async def test_a_chunk_is_passed_on_before_a_slow_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer_nodes(tmp_path, 3) as cluster:
        settle(cluster)
        root = root_of(cluster, 4)
        slow, other = (node for node in cluster.nodes if node is not root)
        assert slow.device is not None
        disk, cached, write = threading.Event(), slow.device.cached, CachedDevice.write

        def wait_and_write(self: CachedDevice, index: int, data: bytes | memoryview) -> bool:
            if self is cached:
                disk.wait(30.0)
            return write(self, index, data)

        monkeypatch.setattr(CachedDevice, "write", wait_and_write)
        try:
            slow.source.gate.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slow.read, 4 * SIZE, SIZE)
                await until(lambda: slow.source.requests)
                nursery.start_soon(other.read, 4 * SIZE, SIZE)
                await until(lambda: other.swarm.counters["requests"] == 2 and slow.fetcher.peering._passing_on)
                slow.source.gate.set()
                await until(lambda: has(other, 4))
                assert not has(slow, 4)
                disk.set()
        finally:
            disk.set()
        await slow.settled()
        assert has(slow, 4)
        assert not other.source.requests


async def test_what_is_not_coming_is_not_fetched_for_who_was_named_one(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = cluster.nodes
        assert one.device is not None
        request = PieceRequest(one.device.resource, (3,), 20.0, COMING, Priority.FOREGROUND)
        with pytest.raises(PeerLacksError), trio.fail_after(20):
            await ask(other, one.member, request)
        assert not one.source.requests


@pytest.mark.parametrize("seed", range(3))
async def test_views_that_differ_and_change_under_reads_make_nobody_wait_for_itself(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    async with peer_nodes(tmp_path, 5) as cluster:
        members = tuple(node.member for node in cluster.nodes)
        ended = trio.Event()

        async def change() -> None:
            while not ended.is_set():
                for node in cluster.nodes:
                    node.swarm.set_view(KEY, View(tuple(one for one in members
                                                        if one is node.member or draw.random() < 0.7)))
                await trio.sleep(0.01)

        async def read(node: PeerNode) -> None:
            order = list(range(COUNT))
            draw.shuffle(order)
            for index in order:
                await node.read(index * SIZE, SAMPLE.table.chunk_bytes(index), 60.0)

        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            async with trio.open_nursery() as readers:
                for node in cluster.nodes:
                    readers.start_soon(read, node)
            ended.set()
        assert time.monotonic() - began < 25.0, "half of a read's minute is what a ring would cost"


class OneToken:
    """A gate that takes everybody for one member."""

    async def token(self, key: str, to: str) -> str:
        return ""

    def admit(self, token: str, key: str) -> tuple[str, float]:
        return "somebody", 60.0


@pytest.mark.parametrize("asker", ["somebody", "another"])
async def test_nobody_is_entered_under_anothers_name(tmp_path: Path, asker: str) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = cluster.nodes
        asked: list[str] = []

        def refer(request: PieceRequest) -> str:
            asked.append(request.asker)
            return "127.0.0.1:1"

        assert one.device is not None
        await one.read(0, 1)
        request = PieceRequest(one.device.resource, (0,), 20.0, 0, Priority.FOREGROUND, asker=asker)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve([listener], one.store, OneToken(), Uploads(UploadLimits()), refer=refer))
            door = Member("one", "{}:{}".format(*listener.socket.getsockname()))
            if asker == "somebody":
                with pytest.raises(PeerBusyError) as caught:
                    await ask(other, door, request)
                assert (caught.value.better, caught.value.retry_after_s) == (("127.0.0.1:1",), 0.0)
            else:
                assert await ask(other, door, request) == [0]
            nursery.cancel_scope.cancel()
        assert asked == ([asker] if asker == "somebody" else [])

