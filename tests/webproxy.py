"""
A web proxy on loopback, as companies have them: CONNECT for https, whole URLs for http.

    with WebProxy({"registry.test:443": registry.host}, password="kim:secret") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://kim:secret@{proxy.host}")
        proxy.requests               # list of Asked(method, target, authorization)

Names are what the table says, and nothing else is reached (502). `silent`: accepts connections and never answers.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import socketserver
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Asked:
    """One request: of the target what stood in its first line; the proxy's credentials as they came."""

    method: str
    target: str
    authorization: str


class WebProxy(socketserver.ThreadingTCPServer):
    """See the module's text."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, table: Mapping[str, str], *, password: str = "", silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.table = dict(table)
        self.expected = "Basic " + base64.b64encode(password.encode()).decode() if password else ""
        self.silent = silent
        self.requests: list[Asked] = []
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(socketserver.StreamRequestHandler):
    server: WebProxy
    timeout = _TIMEOUT_S

    def handle(self) -> None:
        if self.server.silent:
            self.server.ended.wait(_TIMEOUT_S)
            return
        with contextlib.suppress(OSError):
            self._answer()

    def _answer(self) -> None:
        method, target, version = self.rfile.readline().decode().split()
        lines = list(iter(lambda: self.rfile.readline().rstrip(b"\r\n"), b""))
        own = {line.partition(b":")[0].lower(): line.partition(b":")[2].strip().decode() for line in lines}
        authorization = own.get(b"proxy-authorization", "")
        self.server.requests.append(Asked(method, target, authorization))
        netloc = target if method == "CONNECT" else urlsplit(target).netloc
        where = self.server.table.get(netloc)
        if self.server.expected not in {"", authorization}:
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif where is None:
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        else:
            name, _, port = where.rpartition(":")
            with socket.create_connection((name, int(port)), _TIMEOUT_S) as other:
                if method == "CONNECT":
                    self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    path = target.split("/", 3)[3]
                    kept = [line for line in lines if not line.lower().startswith((b"proxy-", b"connection:"))]
                    head = [f"{method} /{path} {version}".encode(), *kept, b"Connection: close", b"", b""]
                    other.sendall(b"\r\n".join(head))
                self._pump(other)

    def _pump(self, other: socket.socket) -> None:
        """Both ways, until the other side has said all."""
        up = threading.Thread(target=self._copy_up, args=(other,), daemon=True)
        up.start()
        while piece := other.recv(65536):
            self.wfile.write(piece)
        self.connection.shutdown(socket.SHUT_RDWR)
        up.join(_TIMEOUT_S)

    def _copy_up(self, other: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while piece := self.rfile.read1(65536):
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)
