"""Servers that say too little, or what cannot be: `lazyfs get` and the proxy end in the right bytes or an error."""

from __future__ import annotations

from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from socketserver import BaseRequestHandler
from typing import TYPE_CHECKING

import pytest
import trio

from lazyfs.errors import SourceError
from lazyfs.mirror import proxy
from tests.fault.test_peers_urls import ask, get_async
from tests.served import served
from tests.urlkit import mirror_beside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.trio
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Says(ThreadingHTTPServer):
    """The same bytes to whoever asks, without those of the body for HEAD; then it closes."""

    daemon_threads = True

    def __init__(self, answer: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Says)    # type: ignore[arg-type]
        self.answer = answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class _Says(BaseRequestHandler):
    server: Says

    def handle(self) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked:
            data = self.request.recv(65536)
            if not data:
                return
            asked += data
        head, end, body = self.server.answer.partition(b"\r\n\r\n")
        self.request.sendall(head + end + (b"" if asked.startswith(b"HEAD") else body))


@contextmanager
def saying(answer: bytes) -> Iterator[Says]:
    server = Says(answer)
    with served(server):
        yield server


@pytest.mark.parametrize("way", ["mirror", "direct"])
@pytest.mark.parametrize(("answer", "expected"), [
    (CHUNKS + b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
    (CHUNKS + b"0\r\n\r\n", b""),
    (HEAD + b'X-Name: \xe4\xff\r\nContent-Type: a\x00b\r\nETag: "\xe4"\r\nContent-Length: 3\r\n\r\nabc', b"abc"),
    (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"abc"),
    (CHUNKS + b"5\r\nab", None),
    (CHUNKS + b"zz\r\nab", None),
    (HEAD + b"Content-Length: 9\r\n\r\nabc", None),
    (HEAD + b"Content-Length: -3\r\n\r\nabc", None),
    (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nabc", None),
    (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", None),
    (b"HTTP/1.1 101 Other\r\nUpgrade: x\r\n\r\n", None),
    (b"\x00\x01garbage\r\n\r\n", None),
], ids=["chunks", "no chunks", "odd headers", "two lengths", "a chunk cut", "a broken chunk", "cut", "negative",
        "endless", "two sizes", "upgrade", "garbage"])
async def test_a_file_comes_whole_or_not_at_all(tmp_path: Path, answer: bytes, expected: bytes | None, way: str,
                                                caplog: pytest.LogCaptureFixture) -> None:
    with saying(answer) as server:
        place = server.url.split("/")[2]
        async with mirror_beside(tmp_path, proxy_hosts=(place,)) as mirror:
            file = tmp_path / "file"
            if expected is None:
                with pytest.raises(SourceError):
                    await get_async(server.url, file, mirror if way == "mirror" else "")
                assert not file.exists()
            else:
                await get_async(server.url, file, mirror if way == "mirror" else "")
                assert file.read_bytes() == expected
            with trio.fail_after(20):
                status, _, body = await ask(mirror, f"GET {server.url} HTTP/1.1\nHost: x\n")
            assert status in {200, 502}
            assert status == 502 or expected in {None, body} or expected in body
    assert not [record for record in caplog.records if record.exc_info]


async def test_another_machine_gets_only_what_rules_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with saying(HEAD + b"Content-Length: 3\r\n\r\nabc") as server:
        place = server.url.split("/")[2]
        async with mirror_beside(tmp_path, proxy_hosts=(place,), proxy=(r"/named\Z",)) as mirror:
            url = f"http://{place}"
            own = [f"GET {url}/file HTTP/1.1\nHost: x\n", f"GET /url/{url}/file HTTP/1.1\nHost: x\nX-Lazyfs-Get: 1\n"]
            named = f"GET {url}/named HTTP/1.1\nHost: x\n"
            assert [(await ask(mirror, one))[0] for one in (*own, named)] == [200, 200, 200]
            monkeypatch.setattr(proxy, "is_here", lambda peer: False)
            for one in own:
                status, _, body = await ask(mirror, one)
                assert status == 403
                assert b"mirror.proxy" in body
            assert (await ask(mirror, named))[0] == 200


async def test_of_a_length_that_nobody_says_none_is_said(tmp_path: Path) -> None:
    with saying(CHUNKS + b"3\r\nabc\r\n0\r\n\r\n") as server:
        async with mirror_beside(tmp_path, proxy_hosts=(server.url.split("/")[2],)) as mirror:
            status, headers, body = await ask(mirror, f"HEAD {server.url} HTTP/1.1\nHost: x\n")
    assert (status, body) == (200, b"")
    assert "content-length" not in headers
