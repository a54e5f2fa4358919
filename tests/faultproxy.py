"""
An HTTP proxy that misbehaves on demand, to be put in front of a registry (tests/registrykit.py).

    with FaultProxy(registry.host) as proxy:          # listens on 127.0.0.1, random port
        source = open_source(f"docker://{proxy.host}/repo:tag", ...)
        proxy.add(Fault(Kind.CUT, path=r"/blobs/", at=1000, times=1))
        ...
        proxy.clear()                                   # well behaved again
        proxy.requests                                  # list of Seen(method, path, headers, fault), as they came

Kinds of faults, and how they are chosen: tests/faultkinds.py (Fault, Kind and Seen can be imported from here too).

`ssl_context` makes it an https server. `proxy.down()` refuses connections (RST), `proxy.up()` accepts again.
Upstream "" means none: every request must be met by a fault (404 otherwise). Closing ends every connection and thread.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

from tests.faultkinds import Fault, Kind, Seen, shift_range, spoil

if TYPE_CHECKING:
    import ssl

__all__ = ["Fault", "FaultProxy", "Kind", "Seen"]
UPSTREAM_SECONDS = 60.0
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade", "expect"}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True
    proxy: FaultProxy
    ssl_context: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.proxy.track(connection)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The TLS handshake is made here, in the connection's own thread."""
        if self.ssl_context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(UPSTREAM_SECONDS)
        with self.ssl_context.wrap_socket(request, server_side=True) as secure:
            self.proxy.track(secure)
            try:
                super().finish_request(secure, client_address)
            finally:
                self.proxy.untrack(secure)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.proxy.untrack(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away, and failed handshakes, are what these tests are about."""


class FaultProxy:
    """See the module's text. A context manager; `start()`/`close()` do the same."""

    def __init__(
        self, upstream: str, *, address: str = "127.0.0.1", port: int = 0, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self.upstream = upstream
        self.requests: list[Seen] = []
        self.refused = 0
        self.body_bytes_sent = 0
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._down = False
        self._server = _Server((address, port), _Handler)
        self._server.proxy = self
        self._server.ssl_context = ssl_context
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._address = address

    @property
    def host(self) -> str:
        """host:port to use in a reference."""
        return f"{self._address}:{self._server.server_address[1]}"

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """End the listener, every connection and (soon) every handler's thread."""
        self.closing.set()
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(5)
        self._server.server_close()
        self.disconnect()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def forget(self) -> None:
        """Empty the request log."""
        with self._lock:
            self.requests.clear()

    def down(self) -> None:
        """From now on every connection, present and new, is reset."""
        self._down = True
        self.disconnect()

    def up(self) -> None:
        self._down = False

    def disconnect(self) -> None:
        """Cut all open connections."""
        with self._lock:
            sockets, self._sockets = list(self._sockets), set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def seen(self, method: str = "", path: str = "") -> list[Seen]:
        """The logged requests with this method whose path matches."""
        with self._lock:
            return [s for s in self.requests if (not method or s.method == method) and re.search(path, s.path)]

    # --- for the handlers -----------------------------------------------------------------------------------------

    def track(self, connection: socket.socket) -> None:
        if self._down:
            self.refused += 1
            reset(connection)
            raise OSError("the proxy is down")
        with self._lock:
            self._sockets.add(connection)

    def untrack(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(connection)

    def choose(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        """Log the request and take the fault that applies to it."""
        with self._lock:
            chosen = None
            for fault in self._faults:
                if not fault.meets(method, path):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                if fault.times == 0:
                    continue
                fault.times -= 1 if fault.times > 0 else 0
                fault.applied += 1
                chosen = fault
                break
            self.requests.append(Seen(method, path, headers, chosen.kind if chosen else None))
            return chosen


def reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Detach first: http.server's file objects hold the descriptor open after close().
    with contextlib.suppress(OSError):
        socket.close(connection.detach())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = self._read_chunked()
        headers = {name.lower(): value for name, value in self.headers.items()}
        fault = self.server.proxy.choose(self.command, self.path, headers)
        try:
            if fault is None or not self._answer_alone(fault):
                self._forward(body, fault)
        except (OSError, http.client.HTTPException):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _any  # noqa: N815 - http.server's names

    def _read_chunked(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer_alone(self, fault: Fault) -> bool:
        """Faults that need no upstream. True: the request is done."""
        if fault.kind is Kind.BLACK_HOLE:
            self.server.proxy.closing.wait()
            self.close_connection = True
        elif fault.kind is Kind.RESET and fault.at < 0:
            self._reset()
        elif fault.kind is Kind.GARBAGE:
            self.wfile.write(b"SSH-2.0-this-is-no-web-server\r\n\r\n")
            self.close_connection = True
        elif fault.kind is Kind.STATUS:
            self._simple(fault.status, fault.headers, fault.body)
        elif fault.kind is Kind.REDIRECT:
            location = fault.location if fault.exact else fault.location + self.path
            self._simple(fault.status if 300 <= fault.status < 400 else 307, {"Location": location}, b"")
        else:
            return False
        return True

    def _simple(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.server.proxy.untrack(self.connection)
        reset(self.connection)

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        proxy = self.server.proxy
        kind = fault.kind if fault else None
        if not proxy.upstream:
            self._simple(404, {}, b"no upstream")
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        if proxy._server.ssl_context is not None:
            headers["X-Forwarded-Proto"] = "https"
        if kind is Kind.IGNORE_RANGE:
            headers = {name: value for name, value in headers.items() if name.lower() != "range"}
        if body or self.command in {"PUT", "POST", "PATCH"}:
            headers["Content-Length"] = str(len(body))
        if kind is Kind.DELAY and fault is not None and proxy.closing.wait(fault.seconds):
            return
        upstream = http.client.HTTPConnection(proxy.upstream, timeout=UPSTREAM_SECONDS)
        try:
            upstream.request(self.command, self.path, body or None, headers)
            with upstream.getresponse() as response:
                if kind is Kind.LOSE_UPLOAD:
                    response.read()
                    self._reset()
                else:
                    self._relay(response, fault)
        finally:
            upstream.close()

    def _relay(self, response: http.client.HTTPResponse, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        size = 0 if fault is None else fault.size
        length = response.getheader("Content-Length")
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() in _HOP_BY_HOP or (kind is Kind.NO_CONTENT_RANGE and name.lower() == "content-range"):
                continue
            wrong = kind is Kind.WRONG_RANGE and name.lower() == "content-range"
            self.send_header(name, shift_range(value, size) if wrong else value)
        chunked = length is None or kind is Kind.CHUNKED
        if kind is Kind.ENCODING:
            self.send_header("Content-Encoding", "gzip")
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            delta = {Kind.SHORT: -size, Kind.LONG: size, Kind.WRONG_LENGTH: size}.get(kind, 0) if kind else 0
            self.send_header("Content-Length", str(max(int(length or 0) + delta, 0)))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(response, fault, chunked=chunked)
        if kind is Kind.WRONG_LENGTH:
            self.close_connection = True

    def _send_body(self, response: http.client.HTTPResponse, fault: Fault | None, *, chunked: bool) -> None:
        for piece in spoil(response, fault):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            self.server.proxy.body_bytes_sent += len(piece)
            if fault and fault.kind is Kind.DRIP and self.server.proxy.closing.wait(fault.seconds):
                return
        if fault and fault.kind is Kind.CUT:
            self.close_connection = True
        elif fault and fault.kind is Kind.RESET:
            self._reset()
        elif fault and fault.kind is Kind.STALL:
            self.server.proxy.closing.wait()
            self.close_connection = True
        elif chunked:
            self.wfile.write(b"0\r\n\r\n")
