"""Reads of nodes that have peers: each byte once from the registry, and what is wrong with peers ends no read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs.cache.space import Limits
from lazyfs.errors import PeerLacksError, SourceError
from lazyfs.fetch.copying import CopyTerms
from lazyfs.fetch.peering import FIRST_VIEW_S
from lazyfs.peers.model import HERE_ONLY, PieceRequest, Priority
from tests.peernodekit import SAMPLE, peer_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fetchkit import Request
    from tests.peernodekit import PeerCluster, PeerNode

pytestmark = pytest.mark.trio


async def one_has_all(cluster: PeerCluster) -> list[PeerNode]:
    """The first node reads all of it by itself; then they see each other."""
    cluster.set_view(0)
    await cluster.nodes[0].read_all()
    await cluster.nodes[0].settled()
    cluster.set_view()
    return cluster.nodes


def parents(node: PeerNode, index: int) -> tuple[object, ...]:
    assert node.device is not None
    place = node.swarm.place(node.device.resource, index)
    return place.parents if place is not None else ()


async def test_all_read_all_at_once_and_the_registry_sends_it_once(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 4) as cluster:
        async with trio.open_nursery() as nursery:
            for node in cluster.nodes:
                nursery.start_soon(node.read_all)
        # a hedge may ask the origin for a piece once more where the machine is busy; as a rule there is none
        assert len(SAMPLE.stored) <= cluster.origin_bytes <= 1.25 * len(SAMPLE.stored)
        assert all(node.source.requests for node in cluster.nodes)    # everybody is somebody's root
        for node in cluster.nodes:
            statistics = node.fetcher.statistics
            assert statistics.peer_bytes + sum(size for _, size in node.source.requests) >= len(SAMPLE.data)


async def test_prefetch_and_copies_go_the_same_way(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 3) as cluster:
        plan = range(SAMPLE.table.chunk_count)
        first = cluster.nodes[0].fetcher.prefetch([(cluster.nodes[0].device, index) for index in plan])
        others = [node.fetcher.copy([(node.device, index) for index in plan], CopyTerms(quiet_s=0.0, patience_s=0.0))
                  for node in cluster.nodes[1:]]
        with trio.fail_after(20):
            for handle in (first, *others):
                await handle.wait()
        for node, handle in zip(cluster.nodes, (first, *others), strict=True):
            assert handle.error is None
            assert node.device is not None
            assert node.device.cached.complete
            assert handle.fetched_count == SAMPLE.table.chunk_count
        assert cluster.origin_bytes <= 1.25 * len(SAMPLE.stored)


async def test_a_registry_that_is_gone_is_not_missed_when_a_peer_has_it(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = await one_has_all(cluster)

        def refuse(request: Request) -> None:
            raise SourceError("the registry is gone")

        other.source.faults.append(refuse)
        one.source.faults.append(refuse)
        await other.read_all()
        assert other.fetcher.statistics.peer_bytes == len(SAMPLE.data)


@pytest.mark.parametrize("failures", [0, 12], ids=["registry fails", "registry is known to be down"])
async def test_a_peer_that_comes_back_is_asked_again_while_the_registry_is_gone(tmp_path: Path, failures: int) -> None:
    """Its worker was being replaced when the read began: nobody but the registry was asked again, to the end."""
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = await one_has_all(cluster)

        def refuse(request: Request) -> None:
            raise SourceError("the registry is gone")

        other.source.faults.append(refuse)
        scheduler = other.fetcher._scheduler
        for _ in range(failures):
            probe_at = scheduler.lanes.sources.of(other.source).failed(SourceError("gone"), trio.current_time())
            if probe_at is not None:
                scheduler._nursery.start_soon(scheduler._later, probe_at, [])
        other.swarm.health.gone(one.member.id, "test", trio.current_time())
        with trio.fail_after(20):
            await other.read(0, 1)
        assert other.fetcher.statistics.peer_bytes


async def test_an_image_that_is_only_cached_is_given_too(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = await one_has_all(cluster)
        one.leave()
        other.source.gate.clear()
        await other.read_all()
        assert other.fetcher.statistics.peer_bytes == len(SAMPLE.data)
        assert one.store.counts.from_cache >= SAMPLE.table.chunk_count


async def test_a_dead_peer_costs_a_read_less_than_a_second(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = cluster.nodes
        one.source.gate.clear()    # it answers its peer with nothing: the registry is slow
        async with trio.open_nursery() as nursery:
            took: list[float] = []

            async def read(index: int) -> None:
                took.append(await other.read(index * SAMPLE.table.chunk_size, 1))

            for index in range(SAMPLE.table.chunk_count):
                nursery.start_soon(read, index)
            with trio.fail_after(10):
                while not one.source.requests:    # noqa: ASYNC110
                    await trio.sleep(0.005)
            began = trio.current_time()
            one.scope.cancel()
        assert trio.current_time() - began < 1.0 + 2.0    # the promise, and what a busy machine may add
        assert len(took) == SAMPLE.table.chunk_count


async def test_who_asks_for_what_is_here_waits_for_what_comes_from_the_registry_and_for_nothing_else(
        tmp_path: Path) -> None:
    """A root that has just come, and the one before it; what that one has asked a peer for may be waiting for us."""
    async with peer_nodes(tmp_path, 3) as cluster:
        one, other, third = cluster.nodes
        cluster.set_view(0, 2)
        for node in (one, third):
            node.source.gate.clear()
        count, size = SAMPLE.table.chunk_count, SAMPLE.table.chunk_size
        mine = next(index for index in range(count) if not parents(one, index))
        theirs = next(index for index in range(count) if parents(one, index))
        assert one.device is not None

        async def ask(index: int) -> list[int]:
            assert one.device is not None
            request = PieceRequest(one.device.resource, (index,), 20.0, HERE_ONLY, Priority.PREFETCH)
            async with other.swarm.exchange.ask(one.member, request) as pieces:
                return [piece.index async for piece in pieces]

        got: list[int] = []

        async def wait() -> None:
            got.extend(await ask(mine))

        async with trio.open_nursery() as nursery:
            for index in (mine, theirs):
                nursery.start_soon(one.read, index * size, 1, 60.0)
            with trio.fail_after(20):
                while not (one.source.requests and third.source.requests):    # noqa: ASYNC110
                    await trio.sleep(0.005)
            for index in (theirs, next(index for index in range(count) if index not in {mine, theirs})):
                with pytest.raises(PeerLacksError), trio.fail_after(20):
                    await ask(index)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not got
            for node in (one, third):
                node.source.gate.set()
        assert got == [mine]
        assert len(one.source.requests) == 1


async def test_peers_that_lie_are_found_out_and_left_alone(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = await one_has_all(cluster)
        assert one.device is not None
        one.device.cached.data_path.write_bytes(bytes(len(SAMPLE.data)))    # behind its back
        await other.read_all()
        health = other.swarm.health.of(one.member.id)
        assert health.wrong_pieces >= 1
        assert health.away == "lied"
        assert other.fetcher.statistics.peer_bytes == 0
        assert other.fetcher.statistics.bad_chunks >= 1


async def test_what_has_rotted_on_the_disk_is_not_given_away(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = await one_has_all(cluster)
        assert one.device is not None
        assert one.device.cached.make_durable()
        path = one.device.cached.data_path
        one.leave()
        data = bytearray(path.read_bytes())
        data[3 * SAMPLE.table.chunk_size] ^= 1
        path.write_bytes(bytes(data))
        device = one.use()
        request = PieceRequest(device.resource, (3,), 20.0, 0, Priority.FOREGROUND)
        async with other.swarm.exchange.ask(one.member, request) as pieces:
            async for piece in pieces:
                assert bytes(piece.data) == SAMPLE.chunk(3)
        assert one.cache.health.statistics.chunks_damaged == 1
        assert one.store.counts.fetched == 1


async def test_a_peer_that_is_there_and_gives_nothing_leaves_a_read_its_time(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = cluster.nodes
        one.source.gate.clear()    # it says that it is alive, and waits for its registry
        async with trio.open_nursery() as nursery:
            for index in range(SAMPLE.table.chunk_count):
                nursery.start_soon(other.read, index * SAMPLE.table.chunk_size, 1, 10.0)    # or DeadlineError
        assert one.source.requests
        assert sum(size for _, size in other.source.requests) == len(SAMPLE.stored)


async def test_a_read_of_what_is_fetched_ahead_hurries_it(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 4) as cluster:
        node, index = next((node, index) for node in cluster.nodes for index in range(SAMPLE.table.chunk_count)
                           if len(parents(node, index)) > 1)
        for other in cluster.nodes:
            other.source.gate.clear()
        assert node.device is not None
        handle = node.fetcher.prefetch([(node.device, index)])
        async with trio.open_nursery() as nursery:
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(node.read, index * SAMPLE.table.chunk_size, 1, 60.0)
            with trio.fail_after(20):
                while not node.swarm.counters["hurried"]:    # noqa: ASYNC110
                    await trio.sleep(0.01)
            for other in cluster.nodes:
                other.source.gate.set()
        with trio.fail_after(20):
            await handle.wait()


async def test_a_first_view_that_does_not_come_is_not_waited_for_long(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        other = cluster.nodes[1]
        assert other.device is not None
        key = other.device.resource.key
        other.swarm.forget(key)
        other.fetcher.peering.await_view(key)
        await other.read(0, 1, 2.0)    # half of its time
        other.fetcher.peering.await_view(key)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.read, SAMPLE.table.chunk_size, 1)
            await trio.testing.wait_all_tasks_blocked()
            other.fetcher.peering.view_came(key, others=True)
        assert not other.fetcher.peering.awaited


async def test_a_view_is_waited_for_from_the_mount_on_and_not_by_each_read_anew(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        other = cluster.nodes[1]
        assert other.device is not None
        key = other.device.resource.key
        other.swarm.forget(key)
        other.fetcher.peering.await_view(key, 0.1)
        await other.read(0, 1, 20.0)
        other.fetcher.peering.await_view(key)    # of another image with that layer: nothing new is waited for
        with trio.fail_after(FIRST_VIEW_S / 2):
            await other.read(SAMPLE.table.chunk_size, 1, 20.0)


async def test_a_full_disk_ends_what_is_fetched_ahead_and_no_read(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        one, other = await one_has_all(cluster)
        assert one.device is not None
        assert other.device is not None
        other.cache.space.limits = Limits(quota_bytes=1)
        handle = other.fetcher.prefetch([(other.device, index) for index in range(SAMPLE.table.chunk_count)])
        with trio.fail_after(20):
            await handle.wait()
        assert not other.device.cached.complete
        await other.settled()
        await other.read_all()


async def test_nobody_to_ask_is_as_if_there_were_no_peers(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 1) as cluster:
        await cluster.nodes[0].read_all()
        assert cluster.origin_bytes == len(SAMPLE.stored)
        assert cluster.nodes[0].fetcher.statistics.peer_bytes == 0


async def test_a_read_whose_reader_left_is_given_up(tmp_path: Path) -> None:
    async with peer_nodes(tmp_path, 2) as cluster:
        gate = threading.Event()
        for node in cluster.nodes:
            node.source.faults.append(lambda _: gate.wait(20) or None)
        reader = cluster.nodes[0]
        with trio.move_on_after(0.3):
            await reader.read_all()
        try:
            with trio.fail_after(15):
                while any(job.flights for job in reader.fetcher.peering.jobs):    # noqa: ASYNC110
                    await trio.sleep(0.05)
        finally:
            gate.set()


def has_more_to_ask(node: PeerNode) -> bool:
    """Of the registry, beside what it is asking for."""
    return bool(node.source.requests) and sum(len(lane.background) for lane in node.fetcher._scheduler.lanes) > 2


async def test_what_no_read_waits_for_is_asked_of_the_registry_one_after_another(tmp_path: Path) -> None:
    """The registry's link is shared by all roots, and what has come in part of several bodies nobody can pass on."""
    async with peer_nodes(tmp_path, 2) as cluster:
        for node in cluster.nodes:
            node.source.gate.clear()
            assert node.device is not None
            scheduler = node.fetcher._scheduler
            scheduler.read_ahead(node.device, range(0, SAMPLE.table.chunk_count, 2))    # no neighbours
            scheduler.dispatch()
        with trio.fail_after(20):
            while not all(map(has_more_to_ask, cluster.nodes)):    # noqa: ASYNC110
                await trio.sleep(0.005)
            assert [len(node.source.requests) for node in cluster.nodes] == [1, 1]
            for node in cluster.nodes:
                node.source.gate.set()
            for node in cluster.nodes:
                while node.fetcher._scheduler.flights:    # noqa: ASYNC110
                    await trio.sleep(0.005)
        assert cluster.origin_bytes <= 1.25 * len(SAMPLE.stored) / 2
