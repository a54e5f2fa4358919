"""
How a connection between peers begins: an HTTP/1.1 request to upgrade, so that proxies, probes and curl see HTTP.

Layer: peers. Who calls: peers.client (ask), peers.server (answer). Both have the caller's deadline, a header has a
bound.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import h11

from lazyfs.errors import FormatError, PeerError, UsageError
from lazyfs.peers.questions import PREFIX, question_of, status_of
from lazyfs.peers.wire import PROTOCOL

if TYPE_CHECKING:
    from lazyfs.peers.channel import Channel
    from lazyfs.peers.questions import Desk

PATH = "/lazyfs-peer"
_HEADER_BYTES_MAX = 8 * 1024
_READ_BYTES = 4 * 1024


async def ask(channel: Channel, host: str) -> None:
    """
    Upgrade a connection, as who asks. `host`: host:port as we know it.

    Raises PeerError: it broke, or the other side speaks something else.
    """
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADER_BYTES_MAX)
    headers = [("Host", host), ("Connection", "Upgrade"), ("Upgrade", PROTOCOL)]
    hello = http.send(h11.Request(method="GET", target=PATH, headers=headers)) or b""
    await channel.send(hello + (http.send(h11.EndOfMessage()) or b""))
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await _some(channel))
    except h11.RemoteProtocolError:
        raise PeerError(f"{host}: does not answer as a peer of lazyfs", hint=_HINT) from None
    upgraded = isinstance(event, h11.InformationalResponse) and event.status_code == 101
    if not upgraded or dict(event.headers).get(b"upgrade") != PROTOCOL.encode():   # type: ignore[union-attr]
        status = f"status {event.status_code}" if isinstance(event, h11.Response) else "another protocol"
        raise PeerError(f"{host}: does not answer as a peer of lazyfs: {status}", hint=_HINT)
    if http.trailing_data[0]:
        raise PeerError(f"{host}: speaks before it is asked")


_HINT = "compare [peers] address and advertise of that node, and the versions of both"


async def answer(channel: Channel, desk: Desk | None = None) -> bool:
    """
    Take a connection's first request: upgrade it (True), or answer as a web server of few pages (False).

    `desk`: answers small questions (peers.questions); None: there are none.

    Raises PeerError: it broke, or is not HTTP.
    """
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEADER_BYTES_MAX)
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await _some(channel))
    except h11.RemoteProtocolError:
        await _reply(channel, http, 400, {"error": "not a request"})
        return False
    if not isinstance(event, h11.Request):
        return False
    path, headers = event.target.partition(b"?")[0], dict(event.headers)
    if event.method not in {b"GET", b"HEAD"}:
        await _reply(channel, http, 405, {"error": "GET only"}, [("Allow", "GET, HEAD")])
    elif path == b"/healthz":
        await _reply(channel, http, 200, {"status": "ok", "protocol": PROTOCOL}, bare=event.method == b"HEAD")
    elif path.startswith(PREFIX.encode()) and desk is not None:
        await _reply_to_question(channel, http, desk, question_of(path, headers), bare=event.method == b"HEAD")
    elif path != PATH.encode():
        await _reply(channel, http, 404, {"error": "no such page"}, bare=event.method == b"HEAD")
    elif PROTOCOL.encode() not in [word.strip() for word in headers.get(b"upgrade", b"").split(b",")]:
        await _reply(channel, http, 426, {"error": f"{PROTOCOL} is spoken here"},
                     [("Upgrade", PROTOCOL), ("Connection", "Upgrade")])
    elif not isinstance(http.next_event(), h11.EndOfMessage):
        await _reply(channel, http, 400, {"error": "no body is taken"})
    elif http.trailing_data[0]:
        return False     # it did not wait for the answer: what it sent is in nobody's protocol
    else:
        switch = [("Connection", "Upgrade"), ("Upgrade", PROTOCOL)]
        await channel.send(http.send(h11.InformationalResponse(status_code=101, headers=switch)) or b"")
        return True
    return False


async def _reply_to_question(channel: Channel, http: h11.Connection, desk: Desk, question: tuple[str, str], *,
                             bare: bool) -> None:
    try:
        data = await desk(*question)
    except PeerError as error:
        await _reply(channel, http, status_of(error), {"error": str(error)}, bare=bare)
    except (FormatError, UsageError) as error:
        await _reply(channel, http, 400, {"error": str(error)}, bare=bare)
    else:
        await _reply(channel, http, 200, data, bare=bare)


async def _reply(channel: Channel, http: h11.Connection, status: int, body: dict[str, str] | bytes,
                 headers: list[tuple[str, str]] | None = None, *, bare: bool = False) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode() + b"\n"
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    said = [("Content-Type", kind), ("Content-Length", str(len(data))), ("Cache-Control", "no-store"),
            *(headers or [("Connection", "close")])]
    if http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
        return
    events: list[h11.Event] = [h11.Response(status_code=status, headers=said)]
    if not bare:
        events.append(h11.Data(data=data))
    await channel.send(b"".join(http.send(event) or b"" for event in events))


async def _some(channel: Channel) -> bytes:
    room = bytearray(_READ_BYTES)
    return bytes(room[:await channel.receive(memoryview(room))])
