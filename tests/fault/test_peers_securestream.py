"""TLS between peers as a stream of bytes: all of them, in order, whatever is cancelled; an end is an end."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from lazyfs.limits import MIB
from lazyfs.peers.securestream import SecureStream
from tests.certkit import issue

if TYPE_CHECKING:
    from lazyfs.peers.tlsfiles import TlsFiles


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return issue(tmp_path_factory.mktemp("tls"), trustme.CA(), "node-1")


def pair_of(files: TlsFiles) -> tuple[SecureStream, SecureStream]:
    """Server and client, connected."""
    ends = [trio.SocketStream(trio.socket.from_stdlib_socket(one)) for one in _connected()]
    return (SecureStream(ends[0], files.server(), server_side=True),
            SecureStream(ends[1], files.client(), server_hostname="node-1"))


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return theirs, ours


async def read_all(stream: SecureStream, count: int, patience_s: float = 60.0) -> bytes:
    """So many bytes, or what came before the end; each wait is cancelled again and again."""
    got, room = bytearray(), memoryview(bytearray(100_000))
    while len(got) < count:
        with trio.move_on_after(patience_s) as scope:
            number = await stream.receive_into(room[:min(len(room), count - len(got))])
        if scope.cancelled_caught:
            continue
        if not number:
            break
        got += room[:number]
    return bytes(got)


@pytest.mark.trio
@pytest.mark.parametrize("patience_s", [60.0, 0.0005])
async def test_both_ways_at_once_and_nothing_is_lost(files: TlsFiles, patience_s: float) -> None:
    """A minute of patience for each read, or so little that most of them are cancelled, also while the other sends."""
    server, client = pair_of(files)
    there, back, got = os.urandom(5 * MIB + 3), os.urandom(3 * MIB + 7), {}

    async def read(name: str, stream: SecureStream, count: int) -> None:
        got[name] = await read_all(stream, count, patience_s)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.shake_hands)
            await client.shake_hands()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, there)
            nursery.start_soon(client.send_all, back)
            nursery.start_soon(read, "there", client, len(there))
            nursery.start_soon(read, "back", server, len(back))
    assert got == {"there": there, "back": back}
    await server.aclose()
    await client.aclose()


@pytest.mark.trio
async def test_who_goes_without_a_word_has_ended(files: TlsFiles) -> None:
    server, client = pair_of(files)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"last words")
            assert await read_all(client, 10) == b"last words"
        await server.aclose()
        assert await read_all(client, 1) == b""
    await client.aclose()


@pytest.mark.trio
async def test_what_is_no_tls_breaks_the_connection(files: TlsFiles) -> None:
    server, client = pair_of(files)
    with trio.fail_after(60):
        await client.transport.send_all(b"GET / HTTP/1.1\r\n\r\n" * 10)
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_into(memoryview(bytearray(10)))
    await server.aclose()
    await client.aclose()
