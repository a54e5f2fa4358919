"""The mirror's HTTP server with clients that are slow, silent, hostile or gone."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import trio

from lazyfs.mirror import web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

WAIT_S = 20.0
BIG = 64 * 1024 * 1024


class Site:
    """Answers by path."""

    def __init__(self) -> None:
        self.file = -1
        self.gone = trio.Event()

    async def handle(self, request: web.Request, reply: web.Reply) -> None:
        if request.target == "/hello":
            await reply.whole(200, {"X-Body": str(len(request.body))}, b"hello")
        elif request.target == "/file":
            try:
                await reply.begin(200, {"Content-Length": str(BIG)})
                await reply.send_file(self.file, 0, BIG)
                await reply.end()
            finally:
                self.gone.set()
        elif request.target == "/chunked":
            await reply.begin(200, {})
            for part in (b"a" * 10, b"b" * 10):
                await reply.write(part)
            await reply.end()
        else:
            raise RuntimeError("a bug")


@contextlib.asynccontextmanager
async def serving(site: Site) -> AsyncIterator[int]:
    """The port."""
    listeners = await web.listen("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(web.serve, listeners, site.handle)
        with trio.fail_after(WAIT_S):
            yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def say(port: int, data: bytes) -> bytes:
    """All that comes back until the server closes, or 4 MiB."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(data)
        got = b""
        with contextlib.suppress(trio.BrokenResourceError):      # it was closed while it was being sent something
            while len(got) < 4 * 1024 * 1024 and (part := await stream.receive_some()):
                got += part
        return got


GOOD = b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_what_is_no_request_is_refused_and_the_next_one_is_served() -> None:
    async def main() -> None:
        async with serving(Site()) as port:
            for data, status in ((b"\0\1\2garbage\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\n\r\n", b"400"),
                                 (b"GET /hello HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000, b"431"),
                                 (b"PUT /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n" + b"z" * 70_000,
                                  b"413"),
                                 (b"PUT /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
                                  b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GOOD, b"400")):
                assert (await say(port, data)).startswith(b"HTTP/1.1 " + status)
                assert b"hello" in await say(port, GOOD)

    trio.run(main)


def test_bodies_several_requests_and_chunks() -> None:
    async def main() -> None:
        async with serving(Site()) as port:
            put = b"PUT /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc"
            got = await say(port, put + b"GET /chunked HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD)
            assert b"X-Body: 3" in got
            assert b"a\r\naaaaaaaaaa\r\na\r\nbbbbbbbbbb\r\n0\r\n\r\n" in got
            assert got.endswith(b"hello")

    trio.run(main)


def test_a_bug_ends_its_connection_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(Site()) as port:
            assert await say(port, b"GET /bug HTTP/1.1\r\nHost: x\r\n\r\n") == b""
            assert b"hello" in await say(port, GOOD)

    trio.run(main)
    assert "a request failed" in caplog.text


def test_silent_and_slow_clients_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CONNECTION_COUNT_MAX", 4)
    monkeypatch.setattr(web, "HEADER_S", 0.2)

    async def main() -> None:
        async with serving(Site()) as port:
            silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(12)]
            assert b"hello" in await say(port, GOOD)
            slow = await trio.open_tcp_stream("127.0.0.1", port)
            await slow.send_all(b"GET /hel")
            assert await slow.receive_some() == b""       # closed after HEADER_S
            for one in [*silent, slow]:
                await one.aclose()

    trio.run(main)


def test_a_client_that_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(web, "STALL_S", 0.2)
    (tmp_path / "big").write_bytes(b"")
    os.truncate(tmp_path / "big", BIG)

    async def main() -> None:
        site = Site()
        site.file = os.open(tmp_path / "big", os.O_RDONLY)
        async with serving(site) as port, await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
            await site.gone.wait()
        os.close(site.file)

    trio.run(main)


def test_a_file_that_shrinks_tears_the_answer(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 1000)

    async def main() -> None:
        site = Site()
        site.file = os.open(tmp_path / "small", os.O_RDONLY)
        async with serving(site) as port:
            got = await say(port, b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n" + GOOD)
            assert got.endswith(b"x" * 1000)
            assert b"hello" not in got
            assert b"hello" in await say(port, GOOD)
        os.close(site.file)

    trio.run(main)
