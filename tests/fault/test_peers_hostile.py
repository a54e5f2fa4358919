"""Peers that are not what they should be: on either side, each ends its own connection and nothing else."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import lz4.block
import pytest
import trio
import trustme

from lazyfs.errors import PeerBusyError, PeerError
from lazyfs.peers import answering, handshake, lateness, model, server, wire
from lazyfs.peers import client as peerclient
from lazyfs.peers.channel import Channel
from lazyfs.peers.client import PeerClient
from lazyfs.peers.model import Member
from lazyfs.peers.tlsfiles import TlsFiles
from lazyfs.peers.uploads import UploadLimits
from tests.certkit import issue
from tests.peerwire import FileStore, OpenGate, Pair, asking, pair_of, resource_of, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.trio
PIECE = 64 << 10
RESOURCE = resource_of(6 * PIECE)
NOISE = random.Random(5).randbytes(RESOURCE.size)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    path = tmp_path / "device"
    path.write_bytes(NOISE)
    return FileStore(path)


@contextlib.asynccontextmanager
async def raw(pair: Pair, *, upgraded: bool = True) -> AsyncIterator[trio.SocketStream]:
    """A connection to the server on which anything can be said."""
    host, _, port = pair.member.address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        if upgraded:
            await handshake.ask(Channel(stream), pair.member.address)
        yield stream


async def ended(stream: trio.SocketStream) -> bytes:
    """What comes until the server closes."""
    found = b""
    with trio.fail_after(20), contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(1 << 16):
            found += data
    return found


async def works(pair: Pair) -> None:
    request = asking(RESOURCE, range(6))
    assert await pair.get(request) == pair.content(request)
    await until(lambda: not pair.uploads.open_requests)


def request_frame(indexes: range = range(6), number: int = 1) -> bytes:
    return wire.request_frame(number, asking(RESOURCE, indexes), "good")


@pytest.mark.parametrize(("sent", "status"), [
    (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"200"), (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"404"),
    (b"POST /lazyfs-peer HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", b"405"),
    (b"GET /lazyfs-peer HTTP/1.1\r\nHost: a\r\nUpgrade: lazyfs-peer/99\r\nConnection: Upgrade\r\n\r\n", b"426"),
    (b"\x16\x03\x01\x00\x05 is TLS", b"400"), (b"GET /" + b"a" * 20_000, b"400"), (b"\xa7\x01" + bytes(400), b"400"),
], ids=["probe", "page", "method", "version", "tls", "long", "frame"])
async def test_who_speaks_http_is_answered(store: FileStore, sent: bytes, status: bytes) -> None:
    async with pair_of(store) as pair:
        async with raw(pair, upgraded=False) as stream:
            await stream.send_all(sent)
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_eof()
            assert (await ended(stream)).startswith(b"HTTP/1.1 " + status)
        await works(pair)


@pytest.mark.parametrize("sent", [
    b"\x00" * 12, b"GET / HTTP/1.1\r\n\r\n", wire.head(wire.Frame.PIECE, 1, 0), wire.head(wire.Frame.END, 1, 0),
    wire.HEAD.pack(wire.MARK, wire.Frame.REQUEST, 0, 1, 1 << 30), wire.head(wire.Frame.REQUEST, 1, 3) + b"\xc1\xc1\xc1",
    request_frame() * 20,
], ids=["zeros", "http", "piece", "end", "oversized", "garbage", "too many"])
async def test_who_breaks_the_protocol_is_cut_off(store: FileStore, sent: bytes) -> None:
    store.late = {0}
    async with pair_of(store) as pair:
        async with raw(pair) as stream:
            await stream.send_all(sent)
            await ended(stream)
        await until(lambda: not store.waiting)
        store.gate.set()
        await works(pair)


@pytest.mark.parametrize("upgraded", [True, False], ids=["frame", "header"])
async def test_who_says_it_byte_by_byte_is_cut_off(store: FileStore, monkeypatch: pytest.MonkeyPatch,
                                                   upgraded: bool) -> None:
    monkeypatch.setattr(server, "_REST_S", 0.3)
    monkeypatch.setattr(server, "_HANDSHAKE_S", 0.3)
    async with pair_of(store) as pair:
        async with raw(pair, upgraded=upgraded) as stream, trio.open_nursery() as nursery:
            async def drip() -> None:
                with contextlib.suppress(trio.BrokenResourceError):
                    for byte in request_frame() if upgraded else b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 9:
                        await stream.send_all(bytes([byte]))
                        await trio.sleep(0.05)

            nursery.start_soon(drip)
            assert b"200" not in await ended(stream)
            nursery.cancel_scope.cancel()
        await works(pair)


async def test_an_idle_connection_is_closed_and_one_that_waits_is_not(store: FileStore,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_IDLE_S", 0.4)
    store.late = {2}
    async with pair_of(store) as pair:
        async with raw(pair) as stream:
            assert await ended(stream) == b""
        async with raw(pair) as stream:
            await stream.send_all(request_frame(range(2, 3)))
            began = trio.current_time()
            while trio.current_time() - began < 1.0:      # more than twice the bound
                assert await stream.receive_some(wire.HEAD.size) == wire.head(wire.Frame.ALIVE, 1, 0)
            store.gate.set()
            with trio.fail_after(20):
                assert (await stream.receive_some(wire.HEAD.size))[1] in {wire.Frame.ALIVE, wire.Frame.PIECE}


async def test_who_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "_FRAME_S", 0.5)
    path = tmp_path / "large"
    large = resource_of(64 << 20, 1 << 20)
    with path.open("wb") as file:
        file.truncate(large.size)
    store = FileStore(path)
    async with pair_of(store) as pair:
        async with raw(pair) as stream:
            await stream.send_all(wire.request_frame(1, asking(large, range(64)), "good"))
            await until(lambda: pair.uploads.sending)
            await until(lambda: not pair.uploads.sending and not pair.uploads.open_requests)
        assert store.held == 0


async def test_an_asker_that_dies_in_the_middle(store: FileStore) -> None:
    store.late = {4}
    async with pair_of(store) as pair:
        async with raw(pair) as stream:
            await stream.send_all(request_frame())
            await until(lambda: store.waiting)
        await until(lambda: not store.waiting and not pair.uploads.open_requests)
        store.gate.set()
        await works(pair)


async def test_a_request_that_is_taken_back_before_its_turn(store: FileStore) -> None:
    store.late = {0}
    async with pair_of(store) as pair, raw(pair) as stream:
        await stream.send_all(request_frame(range(1)) + request_frame(range(1, 3), 2)
                              + wire.head(wire.Frame.CANCEL, 2, 0) + wire.head(wire.Frame.CANCEL, 77, 0)
                              + wire.head(wire.Frame.CANCEL, 1, 0))
        expected = wire.head(wire.Frame.END, 1, 0) + wire.head(wire.Frame.END, 2, 0)
        found = b""
        with trio.fail_after(20):
            while not found.endswith(expected):
                found += bytes(await stream.receive_some(1 << 16))
        assert wire.Frame.PIECE not in {found[at + 1] for at in range(0, len(found), wire.HEAD.size)}


async def test_more_connections_than_are_allowed(store: FileStore) -> None:
    """Idle ones make room; whoever is being answered stays."""
    store.late = {5}
    async with pair_of(store, UploadLimits(connections=4)) as pair, contextlib.AsyncExitStack() as stack:
        busy = await stack.enter_async_context(raw(pair))
        await busy.send_all(request_frame(range(5, 6)))
        await until(lambda: store.waiting)
        for _ in range(12):
            await stack.enter_async_context(raw(pair))
        assert len(await pair.get(asking(RESOURCE, range(5)))) == 5
        store.gate.set()
        found = b""
        with trio.fail_after(20):
            while not found.endswith(wire.head(wire.Frame.END, 1, 0)):
                found += bytes(await busy.receive_some(1 << 16))


# --- who is asked ---------------------------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def scripted(script: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[tuple[PeerClient, Member]]:
    """A server that says what the script says, once the connection is upgraded and a request has come."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    client = PeerClient(OpenGate())

    async def handle(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            if await handshake.answer(Channel(stream)) and await stream.receive_some(1000):
                await script(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        nursery.start_soon(client.run)
        yield client, Member("liar", f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        nursery.cancel_scope.cancel()


def piece_frame(index: int, encoding: wire.Encoding, data: bytes, size: int = PIECE) -> bytes:
    return wire.piece_head(1, index, size, encoding, len(data)) + data


GOOD = piece_frame(0, wire.Encoding.RAW, NOISE[:PIECE])
BOMB = lz4.block.compress(bytes(1 << 24), store_size=False)[:PIECE - 1]


@pytest.mark.parametrize(("sent", "match"), [
    (b"\x00" * 100, "not a frame"), (GOOD + wire.head(wire.Frame.END, 1, 0), "left out 5 of 6"),
    (GOOD + GOOD, "not asked for"), (piece_frame(9, wire.Encoding.RAW, NOISE[:PIECE]), "has no piece 9"),
    (piece_frame(1, wire.Encoding.LZ4, BOMB), "piece 1"), (piece_frame(1, wire.Encoding.LZ4, NOISE[:100]), "piece 1"),
    (piece_frame(1, wire.Encoding.LZ4, lz4.block.compress(bytes(50), store_size=False)), "instead of|decompressed"),
    (piece_frame(1, wire.Encoding.RAW, NOISE[:100]), "comes as 100"), (GOOD[:5000], "ended"), (b"", "ended"),
    (wire.head(wire.Frame.REQUEST, 1, 0), "from who was asked"),
    (wire.trouble_frame(1, wire.Trouble(wire.Code.BUSY, "full", 3.0, ("10.0.0.1:1",))), "full"),
], ids=["garbage", "left out", "twice", "no such", "bomb", "not lz4", "short lz4", "short", "cut", "nothing", "asks",
        "busy"])
async def test_an_answer_that_is_none(sent: bytes, match: str) -> None:
    async def script(stream: trio.SocketStream) -> None:
        await stream.send_all(sent)

    async with scripted(script) as (client, member):
        with pytest.raises(PeerError, match=match) as caught:
            async with client.ask(member, asking(RESOURCE, range(6))) as pieces:
                assert all([len(piece.data) == PIECE async for piece in pieces])
        if match == "full":
            assert isinstance(caught.value, PeerBusyError)
            assert caught.value.better == ("10.0.0.1:1",)


async def test_silence_is_an_error_and_beats_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerclient, "SILENCE_S", 0.6)

    async def beats(stream: trio.SocketStream) -> None:
        for _ in range(10):
            await stream.send_all(wire.head(wire.Frame.ALIVE, 1, 0))
            await trio.sleep(0.1)
        await stream.send_all(GOOD)
        await trio.sleep_forever()

    async with scripted(beats) as (client, member), client.ask(member, asking(RESOURCE, range(2))) as pieces:
        assert (await anext(pieces)).index == 0
        with pytest.raises(PeerError, match="silent"):
            await anext(pieces)


async def test_whatever_comes_of_a_member_is_heard_and_a_read_hears_of_it_soon() -> None:
    """A connection, a beat, some bytes of a piece."""
    async def beats(stream: trio.SocketStream) -> None:
        await stream.send_all(wire.head(wire.Frame.ALIVE, 1, 0))
        await trio.sleep(0.3)
        await stream.send_all(GOOD[:20])
        await trio.sleep_forever()

    async with scripted(beats) as (client, member):
        assert client.heard_at(member) == 0.0
        async with client.ask(member, asking(RESOURCE, range(2))) as pieces, trio.open_nursery() as nursery:
            nursery.start_soon(anext, pieces)
            began = trio.current_time()
            await until(lambda: client.heard_at(member) >= began + 0.3)
            nursery.cancel_scope.cancel()


async def test_a_piece_that_trickles_is_no_silence_and_one_that_stops_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little comes at a time, and however seldom somebody wakes up for it."""
    monkeypatch.setattr(peerclient, "SILENCE_S", 0.6)
    part = len(GOOD) // 12

    async def trickle(stream: trio.SocketStream) -> None:
        for start in range(0, len(GOOD), part):
            await stream.send_all(GOOD[start:start + part])
            await trio.sleep(0.1)
        await stream.send_all(piece_frame(1, wire.Encoding.RAW, NOISE[:PIECE])[:PIECE // 2])
        await trio.sleep_forever()

    async with scripted(trickle) as (client, member), client.ask(member, asking(RESOURCE, range(2))) as pieces:
        piece = await anext(pieces)
        assert bytes(piece.data) == GOOD[-len(piece.data):]
        with pytest.raises(PeerError, match="silent"), trio.fail_after(10):
            await anext(pieces)


async def test_who_cannot_be_reached_costs_no_more_than_the_bound() -> None:
    """A port that nobody listens on; and one whose queue is full, so that not even TCP answers."""
    client = PeerClient(OpenGate(), connect_s=0.3)
    request = asking(RESOURCE, [0])
    with trio.fail_after(10), contextlib.ExitStack() as stack:
        full = stack.enter_context(trio.socket.socket())
        await full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(trio.socket.socket())
            with trio.move_on_after(0.1):
                await waiting.connect(full.getsockname())
        for address in ("127.0.0.1:1", f"127.0.0.1:{full.getsockname()[1]}", "127.0.0.1:99999", "not an address"):
            with pytest.raises(PeerError, match="nobody at"):
                async with client.ask(Member("nobody", address), request) as pieces:
                    await anext(pieces)


async def test_another_service_on_the_port() -> None:
    async def web(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, web, listeners)
        member = Member("other", f"127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        with pytest.raises(PeerError, match="does not answer as a peer of lazyfs: status 200"):
            async with PeerClient(OpenGate()).ask(member, asking(RESOURCE, [0])) as pieces:
                await anext(pieces)
        nursery.cancel_scope.cancel()


async def test_tls(store: FileStore, tmp_path: Path) -> None:
    """The same over TLS; who shows no certificate, speaks plain, or meets another than it meant, gets nothing."""
    authority = trustme.CA()
    ours, theirs = (issue(tmp_path / name, authority, name) for name in ("server", "asker"))
    async with pair_of(store, tls=(ours, theirs)) as pair:
        await works(pair)
        await works(pair)
        assert pair.client.connections == 1
        store.late = {0}
        async with pair.client.ask(pair.member, asking(RESOURCE, range(3))) as pieces:
            await anext(pieces)
        await until(lambda: not store.waiting and not pair.uploads.open_requests)
        store.gate.set()
        bare = TlsFiles("peers", "", "", theirs.ca_file)
        other = replace(pair.member, id="another")
        for tls, member in ((bare, pair.member), (None, pair.member), (theirs, other)):
            with pytest.raises(PeerError):
                async with PeerClient(OpenGate(), tls=tls).ask(member, asking(RESOURCE, [1])) as pieces:
                    await anext(pieces)
        await works(pair)


async def test_the_bounds_fit() -> None:
    assert model.BEAT_S * 3 <= model.SILENCE_S, "two beats may be lost"
    assert model.BEAT_S * 2 <= lateness.GONE_S, "one beat may be late"
    assert model.BEAT_READ_S * 2 <= lateness.SUSPECT_READ_S
    assert peerclient._IDLE_S < server._IDLE_S, "the asker closes first"
