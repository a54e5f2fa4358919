"""
Both ends of the peer path, each a process on one core: who serves a cached device, and who gets all of it.

`python -m benchmarks.peerload serve|get SPEC`, where SPEC is JSON (see `Spec`). The server makes the device, whose
bytes are random and whose chunks are all in its cache, and prints its port; it ends with its input. The other one
checks each chunk's digest and writes it into a cache of its own, by the worker's code; it prints one line of JSON.
With `folded` the stacks are sampled (which costs time: such a run gives no figure).
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from benchmarks.kit.stacks import Sampler
from lazyfs.cache.store import CacheDir
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.limits import CHUNK_SIZE_DEFAULT_BYTES
from lazyfs.node.serving import tune_malloc
from lazyfs.peers.client import PeerClient
from lazyfs.peers.model import FileRange, Kind, Member, Piece, PieceRequest, Priority, Resource
from lazyfs.peers.server import serve
from lazyfs.peers.uploads import UploadLimits, Uploads

if TYPE_CHECKING:
    from lazyfs.cache.device import CachedDevice

_THREADS = 4                     # that check and store: fetch.peering's
_IN_MEMORY = 8                   # chunks that wait for them
_SEED = 7


@dataclass(frozen=True, slots=True)
class Spec:
    """
    What a process does.

    :port: of the server, for who gets.
    :pieces, requests: of one request, and requests at once.
    :fresh: the pages of the cache's file are not in memory (see have_pages).
    """

    cache: str
    cpu: int
    size: int
    port: int = 0
    pieces: int = 32
    requests: int = 4
    fresh: bool = False
    folded: str = ""

    def resource(self) -> Resource:
        return Resource(Kind.DEVICE, Digest.of(b"peerload"), self.size, CHUNK_SIZE_DEFAULT_BYTES)

    def text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


class OpenGate:
    """Of a cluster without tokens; a token is checked once for many requests."""

    async def token(self, _key: str, _to: str) -> str:
        await trio.lowlevel.checkpoint()
        return ""

    def admit(self, _token: str, _key: str) -> tuple[str, float]:
        return "", 600.0


class CacheStore:
    """Gives chunks of one cached device."""

    def __init__(self, device: CachedDevice) -> None:
        self._device = device

    async def piece(self, request: PieceRequest, index: int) -> FileRange:
        await trio.lowlevel.checkpoint()
        assert self._device.present(index, index)
        self._device.retain()
        size = request.resource.piece_bytes(index)
        return FileRange(self._device.fd, index * request.resource.piece_size, size, self._device.release)


def main() -> None:
    spec = Spec(**json.loads(sys.argv[2]))
    os.sched_setaffinity(0, {spec.cpu})
    tune_malloc()
    with ExitStack() as stack:
        cache = stack.enter_context(CacheDir.open(Path(spec.cache)))
        device = cache.device(spec.resource().digest, CHUNK_SIZE_DEFAULT_BYTES, spec.size)
        stack.callback(device.release)
        sampler = Sampler(Path(spec.folded)) if spec.folded else None
        if sampler:
            stack.enter_context(sampler)
        if sys.argv[1] == "serve":
            fill(device)
            trio.run(give, device)
        else:
            print(json.dumps(trio.run(get, device, spec)))


def fill(device: CachedDevice) -> None:
    """Random chunks, the same each time."""
    rng = random.Random(_SEED)
    for index in range(device.chunk_count):
        device.write(index, rng.randbytes(min(device.chunk_size, device.device_size - index * device.chunk_size)))


def have_pages(device: CachedDevice) -> None:
    """
    Have the pages of the cache's file in memory: zeros that are written over.

    A virtual machine may have given its free memory back: then a write to a new page waits for the host, which costs
    ten times what the page itself does, and says nothing about us.
    """
    zeros = bytes(device.chunk_size)
    for offset in range(0, device.device_size, device.chunk_size):
        os.pwrite(device.fd, zeros[:device.device_size - offset], offset)


async def give(device: CachedDevice) -> None:
    """Serve until standard input ends."""
    before = cpu_s()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, listeners, CacheStore(device), OpenGate(), Uploads(UploadLimits()))
        print(listeners[0].socket.getsockname()[1], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        print(json.dumps({"cpu_s": cpu_s() - before}), flush=True)
        nursery.cancel_scope.cancel()


async def get(device: CachedDevice, spec: Spec) -> dict[str, float]:
    """All chunks, several requests at once; CPU and wall seconds, bytes."""
    rng, threads, room = random.Random(_SEED), trio.CapacityLimiter(_THREADS), trio.Semaphore(_IN_MEMORY)
    asked = spec.resource()
    digests = [chunk_digest(rng.randbytes(asked.piece_bytes(index))) for index in range(asked.piece_count)]
    client = PeerClient(OpenGate())
    member = Member("server", f"127.0.0.1:{spec.port}")
    todo = iter([tuple(range(first, min(first + spec.pieces, asked.piece_count)))
                 for first in range(0, asked.piece_count, spec.pieces)])

    def store(piece: Piece) -> None:
        assert chunk_digest(piece.data) == digests[piece.index]
        assert device.write(piece.index, memoryview(piece.data))

    async def keep(piece: Piece) -> None:
        await trio.to_thread.run_sync(store, piece, limiter=threads)
        room.release()

    async def ask() -> None:
        async with trio.open_nursery() as storing:
            for indexes in todo:
                request = PieceRequest(asked, indexes, 60.0, 0, Priority.COPY)
                async with client.ask(member, request) as pieces:
                    async for piece in pieces:
                        await room.acquire()
                        storing.start_soon(keep, piece)

    if not spec.fresh:
        have_pages(device)
    began, before = time.perf_counter(), cpu_s()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        async with trio.open_nursery() as asking:
            for _ in range(spec.requests):
                asking.start_soon(ask)
        nursery.cancel_scope.cancel()
    found = {"wall_s": time.perf_counter() - began, "cpu_s": cpu_s() - before}
    assert device.complete
    return found


def cpu_s() -> float:
    """Of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
