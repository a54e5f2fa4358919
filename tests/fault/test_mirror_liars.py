"""Peers that give wrong pieces of blobs: readers never see them, and who gave them is left alone and reported."""

from __future__ import annotations

import contextlib
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.errors import IntegrityError
from lazyfs.limits import MIB
from lazyfs.mirror.blaming import Blaming
from lazyfs.peers.health import Fault, Report
from lazyfs.peers.model import View
from lazyfs.peers.swarm import Swarm
from tests.piecekit import MemoryOrigin, Network, blob_of, nodes, read_spans

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from lazyfs.mirror.pieces import Blobs

LIAR = "node0"
BLOBS = [random.Random(number).randbytes(5 * MIB + 77) for number in range(3)]


@dataclass
class Pair:
    """A liar that has blobs, and a node that fetches them from it."""

    network: Network
    liar: Blobs
    node: Blobs

    @property
    def swarm(self) -> Swarm:
        assert isinstance(self.node.swarm, Swarm)
        return self.node.swarm

    async def pull(self, data: bytes, *, says_complete: bool = False) -> None:
        """The liar has it first. The node reads the right bytes of it, or is torn, and reads them then."""
        resource = blob_of(data)
        for one in (self.liar, self.node):
            assert isinstance(one.swarm, Swarm)
            members = self.swarm.view(blob_of(BLOBS[0]).key)
            assert members is not None
            one.swarm.set_view(resource.key, View(members.members, frozenset([LIAR] if says_complete else [])))
        await self.liar.fetch(resource, MemoryOrigin(data))
        async with self.node.open(resource, MemoryOrigin(data)) as download:
            with contextlib.suppress(IntegrityError):
                assert await read_spans(download, 0, len(data)) == data
            assert await read_spans(download, 0, len(data)) == data

    def reports(self) -> list[Report]:
        return [one for one in self.swarm.take_reports() if one.fault is Fault.LIED]

    @property
    def is_away(self) -> bool:
        return self.swarm.health.is_away(LIAR, "blob/any", trio.current_time())


@contextlib.asynccontextmanager
async def a_pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """It lies from the middle of a blob on."""
    network = Network()
    network.lies.add(LIAR)
    network.lies_from = 9
    async with nodes(tmp_path, 2, blob_of(BLOBS[0]), network) as [liar, node]:
        pair = Pair(network, liar, node)
        node.blame = Blaming(pair.swarm).blame
        yield pair


@pytest.mark.trio
async def test_who_said_that_it_has_all_of_it_is_reported_at_once(tmp_path: Path) -> None:
    async with a_pair(tmp_path) as pair:
        await pair.pull(BLOBS[0], says_complete=True)
        assert pair.is_away
        assert [one.member for one in pair.reports()] == [LIAR]
        pair.network.asked.clear()
        await pair.pull(BLOBS[1], says_complete=True)
        assert LIAR not in {member for member, _ in pair.network.asked}


@pytest.mark.trio
async def test_who_may_have_passed_it_on_is_reported_when_it_does_so_again(tmp_path: Path) -> None:
    async with a_pair(tmp_path) as pair:
        await pair.pull(BLOBS[0])
        assert not pair.is_away
        assert pair.reports() == []
        assert pair.swarm.health.of(LIAR).wrong_pieces
        await pair.pull(BLOBS[1])
        assert pair.is_away
        assert [one.member for one in pair.reports()] == [LIAR]


@pytest.mark.trio
async def test_blobs_that_were_wrong_together_count_once(tmp_path: Path) -> None:
    """As the layers of one image: who passes on does not know yet, either."""
    async with a_pair(tmp_path) as pair:
        resources = [blob_of(data) for data in BLOBS]
        async with contextlib.AsyncExitStack() as stack:
            downloads = [await stack.enter_async_context(pair.node.open(resource, MemoryOrigin(data)))
                         for resource, data in zip(resources, BLOBS, strict=True)]
            blame = pair.node.blame
            assert blame is not None
            for download in downloads:
                for _ in range(5):
                    blame(LIAR, download)
        assert not pair.is_away
        assert pair.swarm.health.of(LIAR).wrong_pieces == 15


@pytest.mark.trio
async def test_who_gives_right_pieces_is_not_blamed(tmp_path: Path) -> None:
    async with a_pair(tmp_path) as pair:
        pair.network.lies.clear()
        await pair.pull(BLOBS[0], says_complete=True)
        await pair.pull(os.urandom(3 * MIB), says_complete=True)
        assert pair.node.counted.wrong == 0
        assert pair.swarm.health.of(LIAR).wrong_pieces == 0
        assert not pair.is_away


@pytest.mark.trio
async def test_a_reader_that_got_wrong_bytes_in_the_middle_is_not_let_to_the_end(tmp_path: Path) -> None:
    """The last piece was right, and the whole was mended while it waited for it: it had to be torn all the same."""
    data = BLOBS[0]
    async with a_pair(tmp_path) as pair:
        resource = blob_of(data)
        await pair.liar.fetch(resource, MemoryOrigin(data))
        async with pair.node.open(resource, MemoryOrigin(data)) as download:
            whole = download.spans(0, len(data))
            read = 0
            async for span in whole:       # all but the last piece
                read += span.size
                if read + resource.piece_size >= len(data):
                    break
            with pytest.raises(IntegrityError, match="wrong bytes"):
                await anext(whole)
            await whole.aclose()
            assert await read_spans(download, 0, len(data)) == data
