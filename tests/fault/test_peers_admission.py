"""
A private image on a node's disk is not served to who may not pull it: a real registry with a token server, a tracker,
and nodes' own peer servers and clients between them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs import config
from lazyfs.errors import PeerError, PeerRefusedError, SourceError
from lazyfs.image.blob import parse_tail_table
from lazyfs.node.order import MountOrder
from lazyfs.node.peerproof import NodeProver
from lazyfs.peers.authority import make_gate
from lazyfs.peers.client import PeerClient
from lazyfs.peers.gate import TokenGate
from lazyfs.peers.model import Kind, Member, PieceRequest, Priority, Resource
from lazyfs.peers.server import serve
from lazyfs.peers.uploads import UploadLimits, Uploads
from lazyfs.registry import RegistryOptions, open_source
from lazyfs.registry.fields import to_fields
from lazyfs.registry.lazy import load_lazy_image
from lazyfs.registry.streams import read_exactly
from tests.convertkit import Layout, run_convert
from tests.registrykit import Registry, running_registry
from tests.tarbuilder import TarBuilder
from tests.tokenserver import TokenServer
from tests.trackerkit import tracker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from lazyfs.image.digest import Digest
    from tests.trackerkit import Running

KIM = RegistryOptions(username="kim", password="hunter2-of-kim", retry_count=0)
JOE = RegistryOptions(username="joe", password="hunter2-of-joe", retry_count=0)
DATA = b"nobody but kim may read this " * 2000


@dataclasses.dataclass
class Image:
    """A converted image in the registry, and the resource of its one layer."""

    text: str
    resource: Resource


@dataclasses.dataclass
class World:
    """`team/secret` is kim's alone, `team/open` everybody's."""

    tokens: TokenServer
    registry: Registry
    secret: Image
    open: Image


def convert(directory: Path, host: str, name: str, data: bytes) -> Image:
    layout = Layout(directory / name.replace("/", "-"))
    tar = TarBuilder()
    tar.file("data", data)
    layout.add_image("image", [tar.build()])
    text = f"{host}/{name}:lazy"
    run_convert(layout.reference("image"), f"docker://{text}", registry=KIM)
    return Image(text, _resource(text))


def _resource(text: str) -> Resource:
    source = open_source(text, KIM)
    try:
        device = load_lazy_image(source, source.root()).bootstrap.devices[0]
    finally:
        source.close()
    digest: Digest = device.digest
    return Resource(Kind.DEVICE, digest, device.table.device_size, device.table.chunk_size)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("admission")
    tokens = TokenServer(path, users={"kim": "hunter2-of-kim", "joe": "hunter2-of-joe"},
                         private={"team/secret": {"kim"}})
    with tokens, running_registry(path, **tokens.registry_arguments()) as registry:
        yield World(tokens, registry, convert(path, registry.host, "team/secret", DATA),
                    convert(path, registry.host, "team/open", DATA[::-1]))


def test_a_conversion_makes_a_seed_record_of_each_layer(world: World) -> None:
    """All that a first node must know to ask peers and to check what they give is in the bootstrap, before a read."""
    source = open_source(world.secret.text, KIM)
    try:
        image = load_lazy_image(source, source.root())
        assert len(image.lazy.layers) == len(image.bootstrap.devices) == 1
        for layer, device in zip(image.lazy.layers, image.bootstrap.devices, strict=True):
            with source.read_range(layer.digest, layer.size - layer.tail_size, layer.tail_size,
                                   time.monotonic() + 20) as stream:
                table = parse_tail_table(read_exactly(stream, layer.tail_size), layer.size)
            assert table.device_digest() == device.digest == world.secret.resource.digest
            assert table.rows["digest"].tobytes() == device.table.rows["digest"].tobytes()
            assert (table.device_size, table.chunk_size) == (device.table.device_size, device.table.chunk_size)
    finally:
        source.close()


class Disk:
    """A model.Store that has everything, in memory, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    async def piece(self, request: PieceRequest, index: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        return DATA[:1] * request.resource.piece_bytes(index)


class Node:
    """A member with a gate, a server and a client; it has mounted some images with somebody's credentials."""

    def __init__(self, name: str, settings: config.Peers, options: RegistryOptions, *images: Image) -> None:
        registry = to_fields(options)
        orders = {image.resource.key: [SimpleNamespace(image=MountOrder(image.text, "/mnt", registry=registry))]
                  for image in images}
        self.name, self.disk, self.prover = name, Disk(), NodeProver(orders)   # type: ignore[arg-type]
        self.in_use = orders
        self.gate = make_gate(settings, name, self.prover)
        self.client = PeerClient(self.gate)
        self.member = Member(name, "")

    async def get(self, other: Node, image: Image) -> int:
        """Bytes of the first piece."""
        request = PieceRequest(image.resource, (0,), 20.0, 0, Priority.FOREGROUND)
        async with self.client.ask(other.member, request) as pieces:
            return sum([len(piece.data) async for piece in pieces])

    async def run(self) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.member = Member(self.name, f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.client.run)
            if isinstance(self.gate, TokenGate):
                nursery.start_soon(self.gate.run)
            await serve(listeners, self.disk, self.gate, Uploads(UploadLimits()))

    async def close(self) -> None:
        """Its clients of registries."""
        self.in_use.clear()
        with contextlib.suppress(PeerError):
            await self.prover.proofs(["device/none"])


@contextlib.asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.run)
        with trio.fail_after(30):
            for node in nodes:
                while not node.member.address or not (isinstance(node.gate, TokenGate) and node.gate._public.by_id):  # noqa: ASYNC110 - looked at from outside
                    await trio.sleep(0.01)
        yield
        nursery.cancel_scope.cancel()
    for node in nodes:
        await node.close()


@contextlib.asynccontextmanager
async def cluster(world: World, **keys: str) -> AsyncIterator[tuple[Running, config.Peers]]:
    async with tracker(tokens="resource", registries=(world.registry.host,), **keys) as found:
        yield found, config.Peers(cluster="prod", tracker=(found.url,), tokens="resource")


@pytest.mark.trio
async def test_a_private_image_is_given_to_who_may_pull_it_and_to_nobody_else(world: World) -> None:
    async with cluster(world) as (_, settings):
        kim, other = (Node(name, settings, KIM, world.secret, world.open) for name in ("kim-1", "kim-2"))
        joe = Node("joe", settings, JOE, world.secret, world.open)       # he says that he has mounted it
        bare = Node("bare", settings, JOE)
        async with running(kim, other, joe, bare):
            assert await other.get(kim, world.secret) == await joe.get(kim, world.open) > 10_000
            given = kim.disk.asked
            for asker in (joe, bare):
                with pytest.raises(PeerRefusedError):
                    await asker.get(kim, world.secret)
            assert kim.disk.asked == given


async def refused_with(token: str, thief: Node, owner: Node, image: Image) -> None:
    """Somebody shows a token that is not for it, or not for this: the owner refuses, and reads nothing for it."""
    async def shown(key: str, to: str) -> str:
        return token

    thief.client._gate = SimpleNamespace(token=shown)   # type: ignore[assignment]
    with pytest.raises(PeerRefusedError):
        await thief.get(owner, image)
    assert owner.disk.asked == 0


@pytest.mark.trio
async def test_a_member_cannot_use_what_another_one_has_shown_it(world: World) -> None:
    """It is a member, announces that it has the image, is asked, and takes the token that it is shown to the owner."""
    async with cluster(world) as (_, settings):
        kim, other = (Node(name, settings, KIM, world.secret) for name in ("kim-1", "kim-2"))
        thief = Node("thief", settings, JOE)
        async with running(kim, other, thief):
            shown = await other.gate.token(world.secret.resource.key, "thief")
            assert thief.gate.admit(shown, world.secret.resource.key)[0] == "kim-2"

            await refused_with(shown, thief, kim, world.secret)


@pytest.mark.trio
async def test_a_token_of_another_image_or_cluster_opens_nothing(world: World) -> None:
    async with cluster(world) as (_, settings):
        kim = Node("kim", settings, KIM, world.secret)
        joe = Node("joe", settings, JOE, world.open)
        foreign = Node("foreign", dataclasses.replace(settings, cluster="test"), KIM, world.secret)
        async with running(kim, joe, foreign):
            with pytest.raises(PeerRefusedError):
                await foreign.get(kim, world.secret)     # she may pull it, but is not of this cluster
            await refused_with(await joe.gate.token(world.open.resource.key, "kim"), joe, kim, world.secret)


@pytest.mark.trio
async def test_without_the_tracker_those_who_had_a_token_go_on(world: World) -> None:
    async with cluster(world) as (found, settings):
        kim, other = (Node(name, settings, KIM, world.secret, world.open) for name in ("kim-1", "kim-2"))
        late = Node("late", settings, KIM, world.secret)
        async with running(kim, other, late):
            await other.get(kim, world.secret)
            found.kill()
            assert await other.get(kim, world.secret) > 10_000
            with pytest.raises(SourceError, match="no token"):
                await late.get(kim, world.secret)


@pytest.mark.trio
async def test_passwords_are_not_shown_to_a_tracker_without_tls(world: World, tmp_path: Path) -> None:
    del world
    settings = config.Peers(cluster="prod", tracker=("http://tracker.example:9450",), tokens="resource")
    with running_registry(tmp_path, username="kim", password="hunter2-of-kim") as registry:
        image = convert(tmp_path, registry.host, "app", DATA)
        node = Node("kim", settings, KIM, image)
        with pytest.raises(PeerRefusedError, match="without TLS"):
            await node.gate.token(image.resource.key, "other")
        await node.close()
