"""Connections of a server: bounded, the longest idle makes room, an answer gets through to who is still sending."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.guests import Guests, see_off

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.trio
LOG = logging.getLogger("test")
WAIT_S = 20.0


class Host:
    """Serves on loopback: says "busy" or "idle" of each connection as it is told by its first byte."""

    def __init__(self, guests: Guests, port: int) -> None:
        self.guests = guests
        self.port = port

    async def serve(self, stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            self.guests.idle(scope)
            async for data in stream:
                if data == b"b":
                    self.guests.busy(scope)
                await stream.send_all(data)
        self.guests.busy(scope)

    async def connect(self, first: bytes) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        await stream.send_all(first)
        return stream

    async def served(self, first: bytes) -> trio.SocketStream:
        """A connection that has been answered, so it is known by then what it is."""
        stream = await self.connect(first)
        assert await stream.receive_some(1) == first
        return stream


@asynccontextmanager
async def hosting(guests: Guests) -> AsyncIterator[Host]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    host = Host(guests, listener.socket.getsockname()[1])
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guests.accept, listener, host.serve, nursery)
            yield host
            nursery.cancel_scope.cancel()


async def is_over(stream: trio.SocketStream) -> bool:
    """Whether the server has closed it; waits for that, or for an answer."""
    async with stream:
        try:
            return not await stream.receive_some(1)
        except trio.BrokenResourceError:
            return True


async def test_the_longest_idle_makes_room() -> None:
    guests = Guests(2, LOG, "a connection")
    async with hosting(guests) as host:
        first, second = await host.served(b"i"), await host.served(b"i")
        async with await host.served(b"i"):
            assert await is_over(first)
            assert (guests.count, guests.sent_away) == (2, 1)
            await second.aclose()


async def test_who_is_busy_stays_and_the_next_waits() -> None:
    guests = Guests(2, LOG, "a connection")
    async with hosting(guests) as host:
        first, second = await host.served(b"b"), await host.served(b"b")
        async with second, await host.connect(b"i") as third:
            with trio.move_on_after(0.2) as waiting:
                await third.receive_some(1)
            assert waiting.cancelled_caught
            await first.aclose()
            assert await third.receive_some(1) == b"i"
            assert guests.count == 2


async def test_who_has_somewhere_else_to_go_is_turned_away() -> None:
    guests = Guests(1, LOG, "a connection", turn_away=True)
    async with hosting(guests) as host, await host.served(b"b") as first:
        assert await is_over(await host.connect(b"i"))
        assert guests.count == 1
        await first.send_all(b"x")
        assert await first.receive_some(1) == b"x"


async def test_all_that_are_idle_are_sent_home() -> None:
    guests = Guests(3, LOG, "a connection")
    async with hosting(guests) as host, await host.served(b"b") as first:
        others = [await host.served(b"i"), await host.served(b"i")]
        guests.send_home()
        assert [await is_over(one) for one in others] == [True, True]
        await first.send_all(b"x")
        assert await first.receive_some(1) == b"x"


async def test_what_fails_in_one_leaves_room_for_the_next() -> None:
    guests = Guests(1, LOG, "a connection")

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        raise ValueError("of this one")

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="of this one")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guests.accept, listener, serve, nursery)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"x")
                with trio.fail_after(WAIT_S):
                    await is_over(stream)
                    await trio.sleep_forever()
    assert guests.count == 0


@pytest.mark.parametrize("size", [0, 1 << 20])
async def test_who_is_still_sending_gets_the_answer(size: int) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        await stream.send_all(b"too much")
        await see_off(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Guests(1, LOG, "a connection").accept, listener, serve, nursery)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"x" * (1 + size))
                got = b""
                while data := await stream.receive_some(100):
                    got += data
            assert got == b"too much"
            nursery.cancel_scope.cancel()
