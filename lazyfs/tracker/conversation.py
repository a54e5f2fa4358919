"""
One connection to the tracker: its requests, one after the other, each with a bound on its size and its time.

Layer: tracker. Who calls: tracker.server makes one a connection. Requests of the form that nodes send are taken by
plainhttp; the first one that is not hands the connection over to h11 for good. State: what was received beyond the
last request. A plain request's time is bounded by the deadline of the connection's scope, which is moved from step to
step: a scope of its own for each step would cost more than the request.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import unquote

import h11
import trio

from lazyfs.guests import see_off
from lazyfs.tracker.plainhttp import HEAD_BYTES_MAX, format_head, parse_head
from lazyfs.tracker.web import ANSWER_S, Answer, Request, refusal

if TYPE_CHECKING:
    from lazyfs.tracker.plainhttp import Head

REQUEST_S = 15.0                 # from its first byte to its last
_IDLE_S = 180.0                  # between two requests: longer than any beat's interval
_PIECE_BYTES = 64 * 1024


class Host(Protocol):
    """The server, as a conversation sees it."""

    async def respond(self, request: Request) -> Answer: ...

    def refusal_of_body(self, request: Request, size: int) -> Answer | None:
        """Why that many bytes that belong to this head are not read; None: they are."""
        ...

    def take(self, size: int) -> bool:
        """Room for a body that has not come yet; False: there is none. `give` gives it back."""
        ...

    def give(self, size: int) -> None: ...

    def count(self, status: int) -> None:
        """Of an answer that `respond` has not given."""
        ...

    def idle(self, scope: trio.CancelScope, *, idle: bool) -> None:
        """A connection waits for its next request (and may be closed), or has it."""
        ...


class Caller(NamedTuple):
    """Who is at the other end: its address, and whether it has shown a certificate that counts."""

    peer: str
    certified: bool = False


class Conversation:
    """One connection's requests. `scope`: around it; that it was cancelled is the connection's end."""

    def __init__(self, host: Host, stream: trio.abc.Stream, caller: Caller, scope: trio.CancelScope) -> None:
        self._host, self._stream, self._caller, self._scope = host, stream, caller, scope
        self._left = b""

    async def run(self) -> None:
        """Until one of both closes it. Raises trio's errors of streams, trio.TooSlowError, h11.ProtocolError."""
        while await self._plain():
            pass
        if self._left:
            await _General(self._host, self._stream, self._caller, self._scope).run(self._left)

    async def _plain(self) -> bool:
        """One request and its answer; False: it is over, or what is left is for h11. Late: the connection ends."""
        data = self._left or await self._first()
        self._left = data
        self._scope.deadline = trio.current_time() + 2 * ANSWER_S    # to make one (bounded there), and to send it
        head = parse_head(data)
        if head is None:
            self._scope.deadline = inf      # from here on each step has its own
            return False
        path, query = _split(head.target)
        request = Request(head.method, path, query, head.headers, b"", self._caller.peer,
                          certified=self._caller.certified)
        body = head.rest
        if len(body) < head.size:
            if self._host.refusal_of_body(request, head.size) is not None or not self._host.take(head.size):
                self._scope.deadline = inf
                return False
            try:
                body = await self._rest(head)
            finally:
                self._host.give(head.size)
        self._left = body[head.size :]
        request.body = body[: head.size]
        answer = await self._host.respond(request)
        first = format_head(answer.status, len(answer.body), answer.content_type, answer.headers)
        await _send(self._stream, first, answer.body)
        return True

    async def _first(self) -> bytes:
        """The next request's first bytes; empty: the client has closed it."""
        self._scope.deadline = trio.current_time() + _IDLE_S
        self._host.idle(self._scope, idle=True)
        try:
            data = await self._stream.receive_some(_PIECE_BYTES)
        finally:
            self._host.idle(self._scope, idle=False)
        return bytes(data)

    async def _rest(self, head: Head) -> bytes:
        """A body whose end has not come yet."""
        found = bytearray(head.rest)
        self._scope.deadline = trio.current_time() + REQUEST_S
        while len(found) < head.size:
            data = await self._stream.receive_some(_PIECE_BYTES)
            if not data:
                raise trio.BrokenResourceError
            found += data
        self._scope.deadline = trio.current_time() + 2 * ANSWER_S
        return bytes(found)


class _General:
    """The same for any HTTP/1.1, by h11."""

    def __init__(self, host: Host, stream: trio.abc.Stream, caller: Caller, scope: trio.CancelScope) -> None:
        self._host, self._stream, self._caller, self._scope = host, stream, caller, scope
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def run(self, data: bytes) -> None:
        """`data`: what has come already."""
        self._http.receive_data(data)
        has_begun = True
        while await self._one(has_begun=has_begun):
            self._http.start_next_cycle()
            has_begun = False

    async def _one(self, *, has_begun: bool) -> bool:
        """One request and its answer; False: the connection is over."""
        self._host.idle(self._scope, idle=not has_begun)
        deadline = trio.current_time() + (REQUEST_S if has_begun else _IDLE_S)
        head: h11.Request | None = None
        request: Request | None = None
        body: list[bytes] = []
        size = 0
        try:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    with trio.fail_at(deadline):
                        data = bytes(await self._stream.receive_some(_PIECE_BYTES))
                    self._http.receive_data(data)
                    if data and not has_begun:
                        has_begun = True    # the first byte of a request: from now on it has to come
                        deadline = trio.current_time() + REQUEST_S
                        self._host.idle(self._scope, idle=False)
                elif isinstance(event, h11.Request):
                    head, has_begun = event, True
                    request, announced = self._head(event)
                    if announced and not await self._wants(request, head, announced):
                        return False
                elif isinstance(event, h11.Data) and request is not None:
                    if not self._host.take(len(event.data)):
                        await self._refuse(refusal(503, "too many requests come at once"), head)
                        return False
                    size += len(event.data)
                    body.append(bytes(event.data))
                    if not await self._wants(request, head, size):
                        return False
                elif isinstance(event, h11.EndOfMessage) and head is not None and request is not None:
                    request.body = b"".join(body)
                    return await self._respond(head, request)
                else:   # the client has closed it
                    return False
        except h11.RemoteProtocolError as error:
            await self._refuse(refusal(error.error_status_hint, "this is not HTTP"), head)
            return False
        finally:
            self._host.give(size)
            self._host.idle(self._scope, idle=False)

    def _head(self, head: h11.Request) -> tuple[Request, int]:
        """
        The request without its body, and that body's length as it is announced; 0: it is not.

        Raises h11.RemoteProtocolError: the length is said in two ways, and who stands between may believe the other.
        """
        path, query = _split(head.target)
        headers = dict(head.headers)
        if b"transfer-encoding" in headers and b"content-length" in headers:
            raise h11.RemoteProtocolError("two lengths")
        request = Request(_text(head.method), path, query, headers, b"", self._caller.peer,
                          certified=self._caller.certified)
        return request, int(headers.get(b"content-length", b"0"))

    async def _wants(self, request: Request, head: h11.Request | None, size: int) -> bool:
        """Whether so much of a body is read; else the client has been told why not."""
        answer = self._host.refusal_of_body(request, size)
        if answer is not None:
            await self._refuse(answer, head)
        return answer is None

    async def _respond(self, head: h11.Request, request: Request) -> bool:
        answer = await self._host.respond(request)
        await self._send(answer, head)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _refuse(self, answer: Answer, head: h11.Request | None) -> None:
        self._host.count(answer.status)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send(answer._replace(headers=(*answer.headers, ("Connection", "close"))), head)
            if isinstance(self._stream, trio.SocketStream):
                await see_off(self._stream)

    async def _send(self, answer: Answer, head: h11.Request | None) -> None:
        headers = [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body))),
                   ("Cache-Control", "no-store"), *answer.headers]
        data = self._http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        body = answer.body if head is None or head.method != b"HEAD" else b""
        if body:    # a view has half a megabyte: h11 counts it, and does not copy it
            self._http.send_with_data_passthrough(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())   # nothing: the length was said
        with trio.fail_after(ANSWER_S):
            await _send(self._stream, data, body)


async def _send(stream: trio.abc.Stream, head: bytes, body: bytes) -> None:
    """A whole answer; a small one at once."""
    if len(body) < _PIECE_BYTES:
        await stream.send_all(head + body)
    else:
        await stream.send_all(head)
        await stream.send_all(body)


def _split(target: bytes) -> tuple[str, str]:
    path, _, query = target.decode("latin-1").partition("?")
    return unquote(path) if "%" in path else path, query


def _text(method: bytes) -> str:
    return method.decode("latin-1")
