"""A peer server and a client on loopback, with a store in a file: for tests of the wire."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import PeerLacksError, PeerRefusedError
from lazyfs.image.digest import Digest
from lazyfs.peers.client import PeerClient
from lazyfs.peers.model import FileRange, Kind, Member, PieceRequest, Priority, Resource
from lazyfs.peers.server import serve
from lazyfs.peers.uploads import UploadLimits, Uploads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from lazyfs.peers.hop import Hop
    from lazyfs.peers.tlsfiles import TlsFiles


def resource_of(size: int, piece_size: int = 64 << 10, name: bytes = b"a device") -> Resource:
    return Resource(Kind.DEVICE, Digest.of(name), size, piece_size)


def asking(resource: Resource, indexes: Iterable[int], *, seconds: float = 20.0, hops: int = 0,
           priority: Priority = Priority.FOREGROUND) -> PieceRequest:
    return PieceRequest(resource, tuple(indexes), seconds, hops, priority, "1f3a9c02-1")


class FileStore:
    """Gives pieces of one file. `late` pieces come when `gate` opens; `lacks`: it has not got them."""

    def __init__(self, path: Path, *, in_memory: bool = False) -> None:
        self.file = os.open(path, os.O_RDONLY)
        self.in_memory = in_memory
        self.late: set[int] = set()
        self.lacks: set[int] = set()
        self.gate = trio.Event()
        self.held = 0                    # ranges given and not released
        self.waiting = 0
        self.asked: list[tuple[int, PieceRequest]] = []

    async def piece(self, request: PieceRequest, index: int) -> bytes | FileRange:
        self.asked.append((index, request))
        await trio.lowlevel.checkpoint()
        if index in self.late:
            self.waiting += 1
            try:
                await self.gate.wait()
            finally:
                self.waiting -= 1
        if index in self.lacks:
            raise PeerLacksError(f"piece {index} is not here")
        offset, size = index * request.resource.piece_size, request.resource.piece_bytes(index)
        if self.in_memory:
            return os.pread(self.file, size, offset)
        self.held += 1
        return FileRange(self.file, offset, size, self._release)

    def _release(self) -> None:
        self.held -= 1

    def close(self) -> None:
        os.close(self.file)


class OpenGate:
    """Shows "good" and takes nothing else."""

    def __init__(self) -> None:
        self.shown = "good"
        self.admitted = 0

    async def token(self, key: str, to: str) -> str:
        await trio.lowlevel.checkpoint()
        return self.shown

    def admit(self, token: str, key: str) -> tuple[str, float]:
        self.admitted += 1
        if token != "good":
            raise PeerRefusedError(f"{key}: the token is not good")
        return "asker", 600.0


@dataclass
class Pair:
    """Who serves (`store`, `uploads`, at `member`) and who asks (`client`)."""

    store: FileStore
    member: Member
    client: PeerClient
    gate: OpenGate
    uploads: Uploads
    server: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def get(self, request: PieceRequest, found: dict[int, bytes] | None = None) -> dict[int, bytes]:
        """All pieces; `found` has them also when it fails."""
        found = {} if found is None else found
        async with self.client.ask(self.member, request) as pieces:
            async for piece in pieces:
                assert piece.index not in found
                found[piece.index] = bytes(piece.data)
        return found

    def content(self, request: PieceRequest) -> dict[int, bytes]:
        size = request.resource.piece_size
        return {index: os.pread(self.store.file, request.resource.piece_bytes(index), index * size)
                for index in request.indexes}


@contextlib.asynccontextmanager
async def pair_of(store: FileStore, limits: UploadLimits | None = None, *, hop: Hop | None = None,
                  tls: tuple[TlsFiles | None, TlsFiles | None] = (None, None),
                  better: tuple[str, ...] = ()) -> AsyncIterator[Pair]:
    """`tls`: of the server, of the client."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    gate, uploads = OpenGate(), Uploads(limits or UploadLimits())
    client = PeerClient(gate, tls=tls[1])
    pair = Pair(store, Member("server", f"127.0.0.1:{port}"), client, gate, uploads)

    async def run_server() -> None:
        with pair.server:
            await serve(listeners, store, gate, uploads, tls=tls[0], hop=hop,
                        better=(lambda _: better) if better else None)

    try:
        with contextlib.ExitStack() as stack:
            stack.callback(store.close)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_server)
                nursery.start_soon(client.run)
                yield pair
                nursery.cancel_scope.cancel()
    finally:
        assert store.held == 0, "every range that was given is given back"


async def until(condition, seconds: float = 20.0) -> None:
    """Poll; fails after a while."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - there is no event: it is looked at from outside
            await trio.sleep(0.005)
