"""Nodes with real piece stores and swarms in one process; their network and their origin are function calls."""

from __future__ import annotations

import io
import os
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import LazyfsError, PeerError, PeerLacksError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.mirror.piecedir import PieceDirectory
from lazyfs.mirror.piecefile import resource_of
from lazyfs.mirror.pieces import Blobs, PieceStore
from lazyfs.peers.model import FileRange, Kind, Member, Piece, PieceRequest, Resource, View
from lazyfs.peers.swarm import Swarm

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from lazyfs.mirror.download import Download


class BytesStream(io.BytesIO):
    """registry.place.ByteStream over bytes in memory."""


@dataclass
class MemoryOrigin:
    """Counts what it gives. `failures`: so many of the next requests end half way."""

    data: bytes
    ranges: bool = True
    failures: int = 0
    given_bytes: int = 0
    requests: list[tuple[int, int]] = field(default_factory=list)
    name: str = "memory"
    transient: bool = True

    def read_range(self, offset: int, size: int, deadline: float) -> BytesStream:
        self.requests.append((offset, size))
        if self.failures:
            self.failures -= 1
            raise SourceError("memory: no answer", transient=self.transient)
        self.given_bytes += size
        return BytesStream(self.data[offset:offset + size])


class Network:
    """
    peers.model.Exchange between stores of this process.

    `lies`: members whose pieces have a wrong first byte, those from `lies_from` on.
    """

    def __init__(self) -> None:
        self.stores: dict[str, PieceStore] = {}
        self.lies: set[str] = set()
        self.lies_from = 0
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    @asynccontextmanager
    async def ask(self, member: Member, request: PieceRequest) -> AsyncIterator[AsyncIterator[Piece]]:
        if member.id not in self.stores:
            raise PeerError(f"{member.id}: not reached")
        self.asked.append((member.id, request.indexes))
        async with aclosing(self._answer(member, request)) as pieces:
            yield pieces

    def heard_at(self, member: Member) -> float:
        return trio.current_time()

    async def _answer(self, member: Member, request: PieceRequest) -> AsyncGenerator[Piece, None]:
        for index in request.indexes:
            try:
                found = await self.stores[member.id].piece(request, index)
            except PeerLacksError:
                raise
            except LazyfsError as error:
                raise PeerError(str(error)) from error
            if isinstance(found, FileRange):
                data = os.pread(found.file, found.size, found.offset)
                found.release()
            else:
                data = bytes(found)
            if member.id in self.lies and index >= self.lies_from:
                data = bytes([data[0] ^ 1]) + data[1:]
            await trio.lowlevel.checkpoint()
            yield Piece(index, data)


@asynccontextmanager
async def nodes(path: Path, count: int, resource: Resource, network: Network | None = None,
                quota_bytes: int = 0) -> AsyncIterator[list[Blobs]]:
    """So many nodes that know of each other."""
    network = network or Network()
    members = tuple(Member(f"node{number}", f"10.0.0.{number}:1") for number in range(count))
    async with AsyncExitStack() as stack:
        found = []
        for member in members:
            swarm = Swarm(member, network)
            swarm.set_view(resource.key, View(members))
            directory = PieceDirectory(path / member.id, quota_bytes)
            stack.callback(directory.close)
            blobs = Blobs(directory, swarm=swarm)
            network.stores[member.id] = PieceStore(blobs)
            found.append(await stack.enter_async_context(blobs.serving()))
        yield found


def blob_of(data: bytes) -> Resource:
    return resource_of(Kind.BLOB, Digest.of(data), len(data))


async def read_spans(download: Download, start: int, end: int) -> bytes:
    return b"".join([os.pread(span.file, span.size, span.offset) async for span in download.spans(start, end)])
