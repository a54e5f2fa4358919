"""
Nodes without kernel: each a cache, a fetch engine, a swarm, a peer server on loopback; one registry in memory.

    async with peer_nodes(tmp_path, 3) as cluster:
        await cluster.nodes[0].read(0, 100)
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.codec import Codec
from lazyfs.node.peerstore import PeerStore
from lazyfs.peers.client import PeerClient
from lazyfs.peers.gate import OpenGate
from lazyfs.peers.model import Member, View
from lazyfs.peers.server import serve
from lazyfs.peers.swarm import Swarm
from lazyfs.peers.uploads import UploadLimits, Uploads
from tests.fetchkit import MemorySource, Sample, make_sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from lazyfs.fetch.device import FetchDevice

SAMPLE = make_sample(48, seed=5, codec=Codec.NONE, tail=64 * 1024)
BOUNDS = FetchLimits(readahead=False)


@dataclass(eq=False)
class PeerNode:
    """`device`: of the sample; None: it is not in use here. `scope`: of its server; cancelled, it is dead."""

    member: Member
    cache: CacheDir
    fetcher: Fetcher
    store: PeerStore
    swarm: Swarm
    source: MemorySource
    sample: Sample
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    device: FetchDevice | None = None

    def use(self) -> FetchDevice:
        self.device = self.sample.device(self.cache, self.source)
        self.fetcher.peering.use([self.device])
        self.fetcher.peering.view_came(self.device.resource.key, others=True)
        return self.device

    def leave(self) -> None:
        if self.device is not None:
            self.fetcher.peering.leave([self.device])
            self.device.cached.release()
            self.device = None

    async def settled(self) -> None:
        """Until nothing is under way: a read returns before the bookkeeping of its last chunk."""
        with trio.fail_after(20):
            while self.fetcher.peering.jobs or any(self.fetcher.running().values()):    # noqa: ASYNC110
                await trio.sleep(0.001)

    async def read(self, offset: int, size: int, seconds: float = 20.0) -> float:
        """Read and compare. Returns the seconds that it took."""
        assert self.device is not None
        began = time.monotonic()
        data = await self.fetcher.read(self.device, offset, size, deadline=began + seconds)
        assert bytes(data) == self.sample.data[offset:offset + size]
        return time.monotonic() - began

    async def read_all(self, seconds: float = 20.0) -> None:
        """Every chunk, several reads at once, each first in another place."""
        assert self.device is not None
        size, count = self.sample.table.chunk_size, self.sample.table.chunk_count
        async with trio.open_nursery() as nursery:
            for index in range(count):
                nursery.start_soon(self.read, index * size, self.sample.table.chunk_bytes(index), seconds)


@dataclass(eq=False)
class PeerCluster:
    nodes: list[PeerNode]
    sample: Sample

    def set_view(self, *numbers: int) -> None:
        """Everybody sees these; no numbers: all."""
        members = tuple(node.member for node in self.nodes)
        view = View(tuple(members[number] for number in numbers) if numbers else members)
        for node in self.nodes:
            node.swarm.set_view(f"device/{self.sample.digest}", view)

    @property
    def origin_bytes(self) -> int:
        return sum(size for node in self.nodes for _, size in node.source.requests)


@contextlib.asynccontextmanager
async def peer_nodes(tmp_path: Path, count: int, *, sample: Sample = SAMPLE, bounds: FetchLimits = BOUNDS,
                     ) -> AsyncIterator[PeerCluster]:
    """They all use the sample's device, and see each other."""
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        nodes = [await nursery.start(_run, tmp_path / f"cache{number}", sample, bounds, over)
                 for number in range(count)]
        cluster = PeerCluster(nodes, sample)
        cluster.set_view()
        try:
            yield cluster
        finally:
            for node in cluster.nodes:
                node.source.gate.set()
            over.set()


async def _run(path: Path, sample: Sample, bounds: FetchLimits, over: trio.Event,
               task_status: trio.TaskStatus[PeerNode]) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    member = Member(path.name, "{}:{}".format(*listener.socket.getsockname()))
    client = PeerClient(OpenGate())
    with CacheDir.open(path) as cache:
        async with Fetcher(bounds) as fetcher, trio.open_nursery() as nursery:
            node = PeerNode(member, cache, fetcher, PeerStore(cache, fetcher.peering), Swarm(member, client),
                            MemorySource({sample.blob: sample.stored}, name=f"registry for {path.name}"), sample)
            fetcher.peering.begin(node.swarm)
            nursery.start_soon(client.run)
            nursery.start_soon(node.store.run)
            nursery.start_soon(_serve, node, listener)
            node.use()
            task_status.started(node)
            try:
                await over.wait()
            finally:
                node.leave()
            nursery.cancel_scope.cancel()


async def _serve(node: PeerNode, listener: trio.SocketListener) -> None:
    with node.scope:
        uploads = Uploads(UploadLimits())
        node.store.room, node.swarm.coming = uploads.has_room, node.store.coming
        await serve([listener], node.store, OpenGate(), uploads, refer=node.swarm.refer)
