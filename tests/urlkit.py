"""A web server for files behind URLs, and a mirror beside it, both on loopback."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.config import Config
from lazyfs.mirror import web
from lazyfs.mirror.serving import opened
from tests.served import served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path


class WebServer(ThreadingHTTPServer):
    """
    GET and HEAD of `files` by path, with ranges, ETags; notes what it was asked.

    `cut_after`: so many bytes of a body, once, then the connection is gone. `redirects`: path to Location.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.secret = ""
        self.has_head = self.has_ranges = True
        self.cut_after = 0
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.body_bytes = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def count(self, method: str) -> int:
        return sum(asked == method for asked, _, _ in self.asked)


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        if path in server.redirects:
            self._answer(302, {"Location": server.redirects[path]}, b"")
        elif path not in server.files:
            self._answer(404, {}, b"no such file")
        elif server.secret and self.headers.get("Authorization") != server.secret:
            self._answer(403, {}, b"")
        elif self.command == "HEAD" and not server.has_head:
            self._answer(405, {}, b"")
        else:
            self._file(server.files[path], server.etags.get(path, '"one"'), server.headers.get(path, {}))

    def _file(self, data: bytes, etag: str, more: dict[str, str]) -> None:
        headers = {"ETag": etag, "Content-Type": "application/x-test", **more}
        if self.server.has_ranges:
            headers["Accept-Ranges"] = "bytes"
        asked = self.headers.get("Range", "") if self.server.has_ranges else ""
        if asked and self.headers.get("If-Range", etag) == etag:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self._answer(206, headers, data[start:end])
        else:
            self._answer(200, headers, data)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, self.server.cut_after = self.server.cut_after, 0
        self.wfile.write(body[:cut or len(body)])
        self.server.body_bytes += len(body[:cut or len(body)])
        if cut:
            self.close_connection = True


@contextmanager
def web_server(files: Mapping[str, bytes] | None = None) -> Iterator[WebServer]:
    """`files`: what it has from the beginning, by path."""
    server = WebServer()
    server.files.update(files or {})
    with served(server):
        yield server


@asynccontextmanager
async def mirror_beside(path: Path, **keys: Any) -> AsyncIterator[str]:
    """A mirror's host:port. `keys`: of [mirror]."""
    settings = Config()
    own = replace(settings.mirror, dir=str(path / "mirror"), containerd_root="", **keys)
    listeners = await web.listen("127.0.0.1:0")
    async with opened(replace(settings, mirror=own)) as mirror, trio.open_nursery() as nursery:
        nursery.start_soon(web.serve, listeners, mirror.handle)
        host, port = listeners[0].socket.getsockname()[:2]
        yield f"{host}:{port}"
        nursery.cancel_scope.cancel()
