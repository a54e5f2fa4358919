"""A tracker that answers, and what it says is none: nodes keep what they know, and ask the next one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.peers import tracked, trackerclient
from lazyfs.peers.model import Member
from lazyfs.peers.tracked import TrackedMembership
from lazyfs.peers.trackerclient import TrackerClient
from tests.trackerkit import KEY, Node, tracker, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long; who answered wrongly is left alone for as long as the test."""
    monkeypatch.setattr(tracked, "AGAIN_MAX_S", 1.0)
    monkeypatch.setattr(trackerclient, "AWAY_S", 60.0)


async def answer(body: bytes, status: bytes, stream: trio.SocketStream) -> None:
    """Everything that is asked on a connection, with this."""
    async with stream:
        while await stream.receive_some(65536):
            await stream.send_all(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))


@pytest.mark.trio
@pytest.mark.parametrize(("status", "body"), [
    (b"200 OK", b""), (b"200 OK", b"<html>log in first</html>"), (b"200 OK", b"[" * 100_000),
    (b"200 OK", b'{"seconds": -1}'), (b"200 OK", b'{"seconds": 1e999}'), (b"200 OK", b'{"seconds": 4.0, "views": [7]}'),
    (b"200 OK", b'{"seconds": 4.0, "members": -5}'), (b"200 OK", b'{"seconds": 4.0, "isolated": "all"}'),
    (b"404 Not Found", b"no such page"),
    (b"403 Forbidden", b"log in first"), (b"500 Oops", b"\xff\xfe"),
])
async def test_the_next_tracker_is_asked(status: bytes, body: bytes) -> None:
    node = Node()
    async with tracker() as good, trio.open_nursery() as nursery:
        handle = partial(answer, body, status)
        serve: Callable[..., Awaitable[object]] = partial(trio.serve_tcp, handle, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        wrong = "http://{}:{}".format(*listeners[0].socket.getsockname())
        membership = TrackedMembership(Member("a", "a.example:9451"), node, TrackerClient([wrong, good.url]), "prod")
        nursery.start_soon(membership.run)
        await until(lambda: node.sees(KEY) == ["a"], 20)
        assert membership.describe()["tracker"] == good.url
        nursery.cancel_scope.cancel()
