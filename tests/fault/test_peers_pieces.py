"""Blobs in pieces: streamed while they come, shared between nodes, checked as a whole; what is wrong is replaced."""

from __future__ import annotations

import math
import random
import threading
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs.errors import CacheOwnedError, DiskFullError, IntegrityError, PeerLacksError, SourceError
from lazyfs.image.digest import chunk_digest
from lazyfs.limits import KIB, MIB
from lazyfs.mirror.fromorigin import STREAMS, OriginLimits, Run, fetch_run
from lazyfs.mirror.piecedir import PieceDirectory
from lazyfs.mirror.piecefile import file_name, resource_of
from lazyfs.mirror.pieces import PieceStore
from lazyfs.peers.model import HERE_ONLY, Kind, PieceRequest, Priority
from tests.piecekit import BytesStream, MemoryOrigin, Network, blob_of, nodes, read_spans

if TYPE_CHECKING:
    from pathlib import Path

DATA = random.Random(7).randbytes(9 * MIB + 12345)


@pytest.mark.trio
async def test_a_blob_is_streamed_and_then_served_from_disk(tmp_path: Path) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA)
    async with nodes(tmp_path, 1, resource) as [node]:
        async with node.open(resource, origin) as download:
            assert await read_spans(download, 0, len(DATA)) == DATA
            assert download.file.is_whole
            assert await read_spans(download, 5, 300_000) == DATA[5:300_000]
        assert origin.given_bytes == len(DATA)
        assert [one.whole for one in await node.held()] == [True]
    async with nodes(tmp_path, 1, resource) as [node], node.open(resource, origin) as download:
        assert await read_spans(download, 0, len(DATA)) == DATA
    assert origin.given_bytes == len(DATA)


@pytest.mark.trio
async def test_readers_at_once_cost_one_transfer(tmp_path: Path) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA)
    spans = [(0, len(DATA)), (0, len(DATA)), (4 * MIB, len(DATA)), (17, 5 * MIB)]
    found: dict[int, bytes] = {}

    async def read(number: int) -> None:
        async with node.open(resource, origin) as download:
            found[number] = await read_spans(download, *spans[number])

    async with nodes(tmp_path, 1, resource) as [node], trio.open_nursery() as nursery:
        for number in range(len(spans)):
            nursery.start_soon(read, number)
    assert found == {number: DATA[slice(*span)] for number, span in enumerate(spans)}
    assert origin.given_bytes == len(DATA)


@pytest.mark.trio
async def test_nodes_together_take_about_one_copy_from_the_origin(tmp_path: Path) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA)

    async def read(node: object) -> None:
        async with node.open(resource, origin) as download:
            assert await read_spans(download, 0, len(DATA)) == DATA

    async with nodes(tmp_path, 6, resource) as found:
        async with trio.open_nursery() as nursery:
            for node in found:
                nursery.start_soon(read, node)
        assert sum(node.counted.peers for node in found) >= 4 * len(DATA)
    assert origin.given_bytes <= 1.5 * len(DATA)


@pytest.mark.trio
async def test_a_lying_peer_is_found_by_the_whole_digest_and_told_on(tmp_path: Path) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA)
    network = Network()
    told = []
    async with nodes(tmp_path, 2, resource, network) as [liar, node]:
        await liar.fetch(resource, origin)
        network.lies.add("node0")
        node.blame = lambda member, _: told.append(member)
        await node.fetch(resource, origin)
        async with node.open(resource, origin) as download:
            assert await read_spans(download, 0, len(DATA)) == DATA
    assert set(told) == {"node0"}


@pytest.mark.trio
async def test_pieces_with_known_digests_are_checked_at_once(tmp_path: Path) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA)
    sums = b"".join(chunk_digest(DATA[start:start + resource.piece_size])
                    for start in range(0, len(DATA), resource.piece_size))
    network = Network()
    async with nodes(tmp_path, 2, resource, network) as [liar, node]:
        await liar.fetch(resource, origin)
        network.lies.add("node0")
        async with node.open(resource, origin, sums=sums) as download:
            assert await read_spans(download, 0, len(DATA)) == DATA
        assert node.counted.peers == 0


@pytest.mark.trio
async def test_a_whole_read_of_a_bad_blob_never_ends_well(tmp_path: Path) -> None:
    resource = blob_of(DATA)
    bad = DATA[:-1] + bytes([DATA[-1] ^ 1])
    async with nodes(tmp_path, 1, resource) as [node]:
        async with node.open(resource, MemoryOrigin(bad)) as download:
            with pytest.raises(IntegrityError, match="another digest"):
                await read_spans(download, 0, len(DATA))
        assert await node.held() == []
        async with node.open(resource, MemoryOrigin(DATA)) as download:
            assert await read_spans(download, 0, len(DATA)) == DATA


@pytest.mark.trio
async def test_a_restart_fetches_only_the_rest(tmp_path: Path) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA)
    async with nodes(tmp_path, 1, resource) as [node], node.open(resource, origin) as download:
        assert await read_spans(download, MIB, 3 * MIB) == DATA[MIB:3 * MIB]
    given = origin.given_bytes
    part = tmp_path / "node0/part" / f"{file_name(resource)}.data"
    with part.open("r+b") as file:    # a write that was lost
        file.seek(MIB)
        file.write(bytes(KIB))
    async with nodes(tmp_path, 1, resource) as [node], node.open(resource, origin) as download:
        assert await read_spans(download, 0, len(DATA)) == DATA
    assert origin.given_bytes - given <= len(DATA) - 2 * MIB + resource.piece_size


@pytest.mark.trio
@pytest.mark.parametrize("ranges", [True, False])
async def test_an_origin_that_fails_is_asked_again(tmp_path: Path, ranges: bool) -> None:
    resource, origin = blob_of(DATA), MemoryOrigin(DATA, ranges=ranges, failures=2)
    async with nodes(tmp_path, 1, resource) as [node], node.open(resource, origin) as download:
        assert await read_spans(download, 0, len(DATA)) == DATA
    assert ranges or len(origin.requests) == 3    # from where it was: the whole, as it cannot begin elsewhere


@pytest.mark.trio
async def test_an_origin_that_says_no_ends_the_read_and_a_later_one_can_work(tmp_path: Path) -> None:
    resource = blob_of(DATA)
    async with nodes(tmp_path, 1, resource) as [node]:
        async with node.open(resource, MemoryOrigin(DATA, failures=99, transient=False)) as download:
            with pytest.raises(SourceError, match="no answer"):
                await read_spans(download, 0, len(DATA))
        async with node.open(resource, MemoryOrigin(DATA)) as download:
            assert await read_spans(download, 0, len(DATA)) == DATA


@pytest.mark.trio
async def test_the_least_recently_used_goes_and_what_is_open_stays(tmp_path: Path) -> None:
    datas = [random.Random(number).randbytes(MIB) for number in range(4)]
    resources = [blob_of(data) for data in datas]
    async with nodes(tmp_path, 1, resources[0], quota_bytes=2 * MIB) as [node], \
            node.open(resources[0], MemoryOrigin(datas[0])) as kept:
        await node.fetch(resources[1], MemoryOrigin(datas[1]))
        node._entries.pop(resources[1].key).download.file.release()    # as after LINGER_S
        await node.fetch(resources[2], MemoryOrigin(datas[2]))
        assert {one.resource for one in await node.held()} == {resources[0], resources[2]}
        with pytest.raises(DiskFullError, match="no room"):
            await node.fetch(resources[3], MemoryOrigin(datas[3]))
        assert await read_spans(kept, 0, MIB) == datas[0]


@pytest.mark.trio
async def test_what_a_node_does_not_have_it_does_not_fetch_for_a_peer(tmp_path: Path) -> None:
    resource = blob_of(DATA)
    async with nodes(tmp_path, 1, resource) as [node]:
        store = PieceStore(node)
        request = PieceRequest(resource, (0,), 5.0, 0, Priority.FOREGROUND)
        with pytest.raises(PeerLacksError, match="not here"):
            await store.piece(request, 0)
        origin = MemoryOrigin(DATA)
        async with node.open(resource, origin) as download:
            with pytest.raises(PeerLacksError, match="piece 3 is not here"):
                await store.piece(PieceRequest(resource, (3,), 5.0, HERE_ONLY, Priority.FOREGROUND), 3)
            found = await store.piece(request, 3)
            assert origin.given_bytes == resource.piece_size
            found.release()
            assert download.file.present_count == 1
        odd = PieceRequest(type(resource)(resource.kind, resource.digest, resource.size, 64 * KIB), (0,), 5.0, 0,
                           Priority.FOREGROUND)
        with pytest.raises(PeerLacksError, match="pieces of"):
            await store.piece(odd, 0)


@dataclass
class GatedOrigin(MemoryOrigin):
    """Gives nothing before `gate` is set."""

    gate: threading.Event = field(default_factory=threading.Event)

    def read_range(self, offset: int, size: int, deadline: float) -> BytesStream:
        stream = super().read_range(offset, size, deadline)
        assert self.gate.wait(20)
        return stream


@pytest.mark.trio
async def test_who_asks_only_for_what_is_here_waits_for_what_comes_from_the_origin(tmp_path: Path) -> None:
    """Who joins late is the root of some pieces at once: what another is having just then must not come twice."""
    resource, got = blob_of(DATA), []
    async with nodes(tmp_path, 1, resource) as [node]:
        store, origin = PieceStore(node), GatedOrigin(DATA)

        async def ask(index: int) -> None:
            found = await store.piece(PieceRequest(resource, (index,), 20.0, HERE_ONLY, Priority.PREFETCH), index)
            found.release()
            got.append(index)

        async with node.open(resource, origin) as download, trio.open_nursery() as nursery:
            nursery.start_soon(partial(download.piece, 3, priority=Priority.PREFETCH, deadline=trio.current_time() + 20,
                                       hops=1, request=""))
            with trio.fail_after(20):
                while not origin.requests:    # noqa: ASYNC110
                    await trio.sleep(0.005)
            with pytest.raises(PeerLacksError, match="piece 4 is not here"):
                await ask(4)
            nursery.start_soon(ask, 3)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not got
            origin.gate.set()
        assert got == [3]
        assert len(origin.requests) == 1


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    first = PieceDirectory(tmp_path / "dir", 0)
    with pytest.raises(CacheOwnedError):
        PieceDirectory(tmp_path / "dir", 0)
    first.close()


def test_sizes_of_pieces_are_a_function_of_the_size() -> None:
    digest = blob_of(b"x").digest
    for size in (1, 64 * MIB, 64 * MIB + 1, 10 << 30, 1 << 42):
        resource = resource_of(Kind.FILE, digest, size)
        assert sum(resource.piece_bytes(index) for index in (0, resource.piece_count - 1)) <= size + (
            resource.piece_size if resource.piece_count == 1 else 0)
        assert resource.piece_count <= 1 << 20


@pytest.mark.trio
async def test_no_more_is_asked_of_an_origin_at_once_than_connections_are_kept() -> None:
    resource, origin, limits = blob_of(DATA), MemoryOrigin(DATA), OriginLimits()
    all_begun, begun, done = trio.Event(), 0, 0

    async def fetch(index: int) -> None:
        nonlocal begun, done
        async with aclosing(fetch_run(origin, resource, Run(index, index + 1), math.inf, limits)) as pieces:
            async for _ in pieces:
                begun += 1
                if begun == STREAMS:
                    all_begun.set()
                await all_begun.wait()
                assert len(origin.requests) - done <= STREAMS
                done += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(3 * STREAMS):
                nursery.start_soon(fetch, number % resource.piece_count)
    assert done == 3 * STREAMS
