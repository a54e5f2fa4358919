"""
The tracker's HTTP server: connections that stay open, bounded in number, size and time; routes are added from outside.

Layer: tracker. Who calls: tracker.service; whoever has routes of its own calls Routes.add before. Plain enough for
10,000 nodes that each ask every few seconds: a connection costs a task, a request one read and one write. Whatever a
client does costs that client its connection, and nobody else anything. node.web is the other server: there each request
has its own connection.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import h11
import trio

from lazyfs.errors import (
    AuthError,
    ConfigError,
    FormatError,
    LazyfsError,
    NotFoundError,
    PeerBusyError,
    PeerRefusedError,
    RateLimitedError,
    SourceError,
    UsageError,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

CONNECTION_COUNT_MAX = 16_384    # 10,000 nodes, each with one; a connection holds some 10 KiB
_HEADER_BYTES_MAX = 16 * 1024    # a request of ours has 300; one with a registry's token 5,000
_BODY_BYTES_MAX = 512 * 1024     # a beat with 2,000 resources; a route may say less or more
_REQUEST_S = 15.0                # from its first byte to its last
_ANSWER_S = 30.0                 # to make one, and to send one
_IDLE_S = 180.0                  # between two requests: longer than any beat's interval
_ENDING_S = 5.0                  # for answers under way when the tracker ends
_PIECE_BYTES = 64 * 1024
_DRAIN_S = 2.0                   # for a client that is refused to stop sending
_DRAIN_PIECES = 256
_LINE_CHARS_MAX = 500
_log = logging.getLogger("lazyfs.tracker.web")


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Request:
    """
    What came in, whole.

    Attributes:
        path: decoded, without query; `query`: as it was sent.
        headers: names in lower case.
        peer: the client's address, without its port.
        names: what the route's {placeholders} stand for.
        certified: the client has shown a certificate of the authority that the tracker was told of.

    """

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    peer: str
    names: dict[str, str] = field(default_factory=dict)
    certified: bool = False

    def header(self, name: str) -> str:
        """Empty: it was not sent."""
        return self.headers.get(name.encode(), b"").decode("latin-1")


if TYPE_CHECKING:
    Handler = Callable[[Request], Awaitable[Answer]]


class _Route(NamedTuple):
    parts: tuple[str, ...]
    handler: Handler
    guarded: bool
    body_bytes_max: int


class Routes:
    """Who answers what. `guard` is asked before each route that is guarded; it raises PeerRefusedError or AuthError."""

    def __init__(self, guard: Callable[[Request], None]) -> None:
        self._guard = guard
        self._exact: dict[tuple[str, str], _Route] = {}
        self._patterns: dict[tuple[str, int], list[_Route]] = {}

    def add(self, method: str, pattern: str, handler: Handler, *, guarded: bool = True,
            body_bytes_max: int = _BODY_BYTES_MAX) -> None:
        """
        Have `handler` answer a method at a path.

        Args:
            method: in capitals; HEAD is answered wherever GET is.
            pattern: `/v1/clusters/{cluster}/beat`; a {name} stands for one part, a last {name...} for all the rest.
            handler: may raise any LazyfsError: it becomes a status and one line of text.
            guarded: only for who may use the tracker; False: the handler looks itself, or it is for everybody.
            body_bytes_max: a longer body is refused with 413.

        """
        parts = tuple(pattern.split("/")[1:])
        route = _Route(parts, handler, guarded, body_bytes_max)
        if "{" not in pattern:
            self._exact[method, pattern] = route
        else:
            self._patterns.setdefault((method, -1 if parts[-1].endswith("...}") else len(parts)), []).append(route)

    def find(self, method: str, path: str) -> tuple[_Route, dict[str, str]] | None:
        """The route, and what its placeholders stand for; a path's own name is stronger than a placeholder."""
        method = "GET" if method == "HEAD" else method
        exact = self._exact.get((method, path))
        if exact is not None:
            return exact, {}
        given = path.split("/")[1:]
        for count in (len(given), -1):
            for route in self._patterns.get((method, count), ()):
                names = _match(route.parts, given)
                if names is not None:
                    return route, names
        return None

    def body_bytes_max(self, method: str, path: str) -> int:
        """Nothing is read for a route that is not there."""
        found = self.find(method, path)
        return found[0].body_bytes_max if found else 0

    async def answer(self, request: Request) -> Answer:
        """Never raises an Exception: what goes wrong is an answer too."""
        try:
            found = self.find(request.method, request.path)
            if found is None:
                return refusal(404, "there is nothing here")
            route, request.names = found
            if route.guarded:
                self._guard(request)
            with trio.fail_after(_ANSWER_S):
                return await route.handler(request)
        except LazyfsError as error:
            return of_error(error)
        except trio.TooSlowError:
            return refusal(503, f"this took longer than {_ANSWER_S:g} s")
        except Exception:  # noqa: BLE001 - must not end the tracker
            _log.exception("a request failed: %s %.200s", request.method, request.path)
            return refusal(500, "a fault of the tracker; its log says more")


def _match(parts: tuple[str, ...], given: list[str]) -> dict[str, str] | None:
    names: dict[str, str] = {}
    for index, part in enumerate(parts):
        if part.endswith("...}"):
            names[part[1:-4]] = "/".join(given[index:])
            return names if index < len(given) else None
        if part.startswith("{"):
            names[part[1:-1]] = given[index]
        elif index >= len(given) or part != given[index]:
            return None
    return names


def refusal(status: int, text: str, hint: str = "", headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    """An error, as one line of JSON."""
    found = {"error": text[:_LINE_CHARS_MAX]} | ({"hint": hint[:_LINE_CHARS_MAX]} if hint else {})
    return Answer(status, json.dumps(found).encode() + b"\n", headers=headers)


def of_error(error: LazyfsError) -> Answer:
    """The status that says best what went wrong."""
    headers: tuple[tuple[str, str], ...] = ()
    status = 500
    if isinstance(error, PeerBusyError | RateLimitedError):
        status, headers = 429, (("Retry-After", str(max(1, round(error.retry_after_s or 1)))),)
    elif isinstance(error, PeerRefusedError):
        status = 403
    elif isinstance(error, AuthError):
        status, headers = 401, (("WWW-Authenticate", 'Bearer realm="lazyfs-tracker"'),)
    elif isinstance(error, NotFoundError):
        status = 404
    elif isinstance(error, UsageError | FormatError | ConfigError):
        status = 400
    elif isinstance(error, SourceError):
        status = 503
    return refusal(status, str(error), error.hint, headers)


@dataclass(slots=True)
class Traffic:
    """What went on, for metrics; `statuses`: answers by their code."""

    connections: int = 0
    refused: int = 0
    statuses: dict[int, int] = field(default_factory=dict)


class Server:
    """Serves routes on listeners that are open already. One a process is enough."""

    def __init__(self, routes: Routes, tls: Callable[[], ssl.SSLContext] | None = None) -> None:
        """`tls`: the context for the next connection; None: plain HTTP."""
        self.traffic = Traffic()
        self._routes = routes
        self._tls = tls
        self._idle: dict[trio.CancelScope, None] = {}     # connections without a request, the longest idle first
        self._accepting = trio.CancelScope()
        self.ending = False

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Until `end`, or cancelled."""
        async with trio.open_nursery() as nursery:
            with self._accepting:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self._accept, listener, nursery)
            nursery.cancel_scope.deadline = trio.current_time() + _ENDING_S

    def end(self) -> None:
        """Accept nobody any more; requests under way are answered, other connections end (nodes ask another one)."""
        self.ending = True
        self._accepting.cancel()
        for scope in self._idle:
            scope.cancel()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                try:
                    connection = await listener.accept()
                except OSError as error:   # no descriptor is left, the client is gone
                    _log.warning("a connection was not accepted: %s", error)
                    await trio.sleep(0.1)
                    continue
                if self.traffic.connections >= CONNECTION_COUNT_MAX:
                    self._make_room()
                self.traffic.connections += 1
                nursery.start_soon(self._serve_one, connection)

    def _make_room(self) -> None:
        """Who has been idle for longest goes; it connects again when it has something to say."""
        self.traffic.refused += 1
        if self._idle:
            scope = next(iter(self._idle))
            del self._idle[scope]
            scope.cancel()

    async def _serve_one(self, connection: trio.SocketStream) -> None:
        try:
            with trio.CancelScope() as scope:
                async with connection:
                    peer = str(connection.socket.getpeername()[0])
                    if self._tls is None:
                        await _Conversation(self, connection, peer, scope).run()
                    else:
                        stream = trio.SSLStream(connection, self._tls(), server_side=True, https_compatible=True)
                        await self._secure(stream, peer, scope)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, h11.ProtocolError, OSError):
            pass   # the client's affair
        except Exception:  # noqa: BLE001 - must not end the tracker
            _log.exception("a connection failed")
        finally:
            self.traffic.connections -= 1

    async def _secure(self, stream: trio.SSLStream[trio.SocketStream], peer: str, scope: trio.CancelScope) -> None:
        with trio.fail_after(_REQUEST_S):
            await stream.do_handshake()
        await _Conversation(self, stream, peer, scope, certified=bool(stream.getpeercert())).run()

    async def respond(self, request: Request) -> Answer:
        """For a conversation."""
        answer = await self._routes.answer(request)
        self.count(answer.status)
        return answer

    def count(self, status: int) -> None:
        self.traffic.statuses[status] = self.traffic.statuses.get(status, 0) + 1

    def body_bytes_max(self, method: str, path: str) -> int:
        return self._routes.body_bytes_max(method, path)

    def idle(self, scope: trio.CancelScope, *, idle: bool) -> None:
        """A connection waits for its next request, or has it."""
        if idle and self.ending:
            scope.cancel()
        elif idle:
            self._idle[scope] = None
        else:
            self._idle.pop(scope, None)


class _Conversation:
    """One connection's requests, one after the other."""

    def __init__(self, server: Server, stream: trio.abc.Stream, peer: str, scope: trio.CancelScope, *,
                 certified: bool = False) -> None:
        self._server, self._stream, self._peer, self._certified = server, stream, peer, certified
        self._scope = scope
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES_MAX)

    async def run(self) -> None:
        while await self._one():
            self._http.start_next_cycle()

    async def _one(self) -> bool:
        """One request and its answer; False: the connection is over."""
        self._server.idle(self._scope, idle=True)
        deadline = trio.current_time() + _IDLE_S
        head: h11.Request | None = None
        body: list[bytes] = []
        size = size_max = 0
        try:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    with trio.fail_at(deadline):
                        data = bytes(await self._stream.receive_some(_PIECE_BYTES))
                    self._http.receive_data(data)
                    if data and head is None and size == 0:
                        size = -1   # the first byte of a request: from now on it has to come
                        deadline = trio.current_time() + _REQUEST_S
                        self._server.idle(self._scope, idle=False)
                elif isinstance(event, h11.Request):
                    head, size = event, 0
                    size_max = self._server.body_bytes_max(_text(event.method), _split(event.target)[0])
                elif isinstance(event, h11.Data):
                    size += len(event.data)
                    body.append(bytes(event.data))
                    if size > size_max:
                        await self._refuse(413, f"more than {size_max} bytes", head)
                        return False
                elif isinstance(event, h11.EndOfMessage) and head is not None:
                    return await self._respond(head, b"".join(body))
                else:   # the client has closed it
                    return False
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint, "this is not HTTP", head)
            return False
        finally:
            self._server.idle(self._scope, idle=False)

    async def _respond(self, head: h11.Request, body: bytes) -> bool:
        path, query = _split(head.target)
        request = Request(_text(head.method), path, query, dict(head.headers), body, self._peer,
                          certified=self._certified)
        answer = await self._server.respond(request)
        await self._send(answer, head)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _refuse(self, status: int, text: str, head: h11.Request | None) -> None:
        self._server.count(status)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send(refusal(status, text, headers=(("Connection", "close"),)), head)
            await self._drain()

    async def _drain(self) -> None:
        """Read what is still being sent, for a moment: closed before, the client would see a reset, and no answer."""
        if isinstance(self._stream, trio.SocketStream):
            with trio.move_on_after(_DRAIN_S):
                await self._stream.send_eof()
                for _ in range(_DRAIN_PIECES):
                    if not await self._stream.receive_some(_PIECE_BYTES):
                        break

    async def _send(self, answer: Answer, head: h11.Request | None) -> None:
        headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body))),
                   ("Cache-Control", "no-store"), *answer.headers]
        data = self._http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        body = answer.body if head is None or head.method != b"HEAD" else b""
        if body:    # a view has half a megabyte: h11 counts it, and does not copy it
            self._http.send_with_data_passthrough(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())   # nothing: the length was said
        with trio.fail_after(_ANSWER_S):
            if len(body) < _PIECE_BYTES:
                await self._stream.send_all(data + body)
            else:
                await self._stream.send_all(data)
                await self._stream.send_all(body)


def _split(target: bytes) -> tuple[str, str]:
    path, _, query = target.decode("latin-1").partition("?")
    return unquote(path) if "%" in path else path, query


def _text(method: bytes) -> str:
    return method.decode("latin-1")
