"""
A small HTTP server for what a daemon tells or takes: bounded in size, time and number, one request a connection.

Layer: node. Who calls: node.health, node.collector. Nobody who can connect can do more than ask: a request's header is
looked at (`admit`) before its body is read.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import h11
import trio

from lazyfs.config import split_address
from lazyfs.guests import GONE, Guests, see_off

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    Answer = tuple[int, dict[str, Any] | "Text"]   # status, body: JSON, or something else

_HEADER_BYTES_MAX = 8 * 1024     # a probe sends 200 bytes
_PIECE_BYTES = 64 * 1024
_log = logging.getLogger("lazyfs.node.web")


class Text(NamedTuple):
    """A body that is not JSON."""

    content_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """A request's header; `peer`: the client's address, without its port. `headers`: names in lower case."""

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    peer: str


@dataclass(frozen=True, slots=True)
class Site:
    """
    What is served.

    Attributes:
        key: of the configuration, for messages: it names the address.
        admit: an answer at once, or None: read the body and call `respond`.
        respond: the answer.
        body_bytes_max: a larger body is refused.
        connection_count_max: more take the place of who has not asked anything yet, or wait in the kernel's queue.
        connection_s: from accept to close.
        retry_s: between two attempts to listen: the worker before us still has the port.
        context: of TLS; None: plain HTTP.

    """

    key: str
    admit: Callable[[Request], Answer | None]
    respond: Callable[[Request, bytes], Awaitable[Answer]]
    body_bytes_max: int
    connection_count_max: int
    connection_s: float
    retry_s: float
    context: ssl.SSLContext | None = None


async def serve(address: str, site: Site) -> None:
    """Answer for as long as the worker runs, at host:port. Never raises an Exception: nobody is served by its end."""
    said = False
    while True:
        try:
            host, port = split_address(address)
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            if not said:
                _log.warning("%s %s cannot be used, and is tried again: %s", site.key, address, error)
            said = True
            await trio.sleep(site.retry_s)
            continue
        _log.info("listening", extra={"fields": {"key": site.key, "address": address}})
        guests = Guests(site.connection_count_max, _log, f"{site.key}: a request")
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(guests.accept, listener, partial(_serve_one, site=site, guests=guests), nursery)


async def _serve_one(connection: trio.SocketStream, *, site: Site, guests: Guests) -> None:
    scope = trio.move_on_after(site.connection_s)
    guests.idle(scope)
    try:
        with scope:
            peer = str(connection.socket.getpeername()[0])
            stream: trio.abc.Stream = connection
            if site.context is not None:
                stream = trio.SSLStream(connection, site.context, server_side=True, https_compatible=True)
            await _exchange(stream, site, peer, partial(guests.busy, scope))
            guests.idle(scope)
            await see_off(connection)
    except (*GONE, h11.ProtocolError):
        pass   # the client's affair
    except Exception:  # noqa: BLE001 - must not end the worker
        _log.exception("%s: a request failed", site.key)
    finally:
        guests.busy(scope)


async def _exchange(connection: trio.abc.Stream, site: Site, peer: str, heard: Callable[[], object]) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES_MAX)
    request: Request | None = None
    body = bytearray()
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as error:
            await _answer(connection, http, error.error_status_hint, {"error": "not a request"})
            return
        answer: Answer | None = None
        if isinstance(event, h11.Request):
            heard()
            request = Request(event.method, event.target, dict(event.headers), peer)
            answer = site.admit(request)
            if answer is None and http.they_are_waiting_for_100_continue:
                await connection.send_all(http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > site.body_bytes_max:
                answer = 413, {"error": f"more than {site.body_bytes_max} bytes"}
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            answer = await site.respond(request, bytes(body))
        elif event is not h11.NEED_DATA:
            return
        else:
            http.receive_data(bytes(await connection.receive_some(_PIECE_BYTES if request else _HEADER_BYTES_MAX)))
        if answer is not None:
            assert request is not None
            await _answer(connection, http, *answer, without_body=request.method == b"HEAD")
            return


async def _answer(connection: trio.abc.Stream, http: h11.Connection, status: int, body: dict[str, Any] | Text, *,
                  without_body: bool = False) -> None:
    text = body if isinstance(body, Text) else Text("application/json", json.dumps(body).encode() + b"\n")
    data = text.data
    headers = [("Content-Type", text.content_type), ("Content-Length", str(len(data))), ("Connection", "close"),
               ("Cache-Control", "no-store")]
    if not isinstance(body, Text):
        headers += [("Allow", body["allow"])] if status == 405 else []
        headers += [("Retry-After", str(body["retry_after_s"]))] if status == 429 else []
    events: list[h11.Event] = [h11.Response(status_code=status, headers=headers)]
    if not without_body:
        events.append(h11.Data(data=data))
    events.append(h11.EndOfMessage())
    await connection.send_all(b"".join(http.send(event) or b"" for event in events))
