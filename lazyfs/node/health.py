"""
Health over HTTP: `/healthz` says that the worker's loop turns, `/readyz` that it serves mounts.

Layer: node. Who calls: node.daemonworker, if `daemon.health_address` is configured. Answers come from memory: no disk,
no network, no lock. One request a connection; size, time and number are bounded, so that nobody who can connect can do
more than ask. While no worker runs (a moment, after a crash) connections are refused: not ready.
"""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING, Any

import h11
import trio

from lazyfs import __version__
from lazyfs.config import split_address

if TYPE_CHECKING:
    from collections.abc import Callable

_REQUEST_BYTES_MAX = 8 * 1024    # a probe sends 200 bytes
_CONNECTION_COUNT_MAX = 16       # more wait in the kernel's queue
_CONNECTION_S = 5.0              # from accept to close
_RETRY_S = 2.0                   # the worker before us still has the port
_BROKEN_COUNT_MAX = 20           # named in one answer
_log = logging.getLogger("lazyfs.node.health")


async def serve(address: str, health: Callable[[], dict[str, Any]]) -> None:
    """
    Answer for as long as the worker runs. Never raises an Exception: health is asked for, not needed.

    Args:
        address: host:port.
        health: as Worker.health(); quick, called in the loop.

    """
    said = False
    while True:
        try:
            host, port = split_address(address)
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            if not said:
                _log.warning("health_address %s cannot be used, and is tried again: %s", address, error)
            said = True
            await trio.sleep(_RETRY_S)
            continue
        _log.info("health is served", extra={"fields": {"address": address}})
        limit = trio.CapacityLimiter(_CONNECTION_COUNT_MAX)
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(_accept, listener, health, limit, nursery)


async def _accept(listener: trio.SocketListener, health: Callable[[], dict[str, Any]], limit: trio.CapacityLimiter,
                  nursery: trio.Nursery) -> None:
    async with listener:
        while True:
            token = object()
            await limit.acquire_on_behalf_of(token)
            try:
                connection = await listener.accept()
            except OSError as error:   # no descriptor is left, the client is gone
                limit.release_on_behalf_of(token)
                _log.warning("a health request was not accepted: %s", error)
                await trio.sleep(0.1)
                continue
            nursery.start_soon(_serve_one, connection, health, limit, token)


async def _serve_one(connection: trio.SocketStream, health: Callable[[], dict[str, Any]], limit: trio.CapacityLimiter,
                     token: object) -> None:
    try:
        with trio.move_on_after(_CONNECTION_S):
            async with connection:
                await _exchange(connection, health)
    except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
        pass   # the client's affair
    except Exception:  # noqa: BLE001 - must not end the worker
        _log.exception("health request failed")
    finally:
        limit.release_on_behalf_of(token)


async def _exchange(connection: trio.SocketStream, health: Callable[[], dict[str, Any]]) -> None:
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_REQUEST_BYTES_MAX)
    while True:
        try:
            event = http.next_event()
        except h11.RemoteProtocolError as error:
            await _answer(connection, http, error.error_status_hint, {"error": "not a request"})
            return
        if isinstance(event, h11.Request):
            status, body = respond(event.method, event.target, health)
            await _answer(connection, http, status, body, without_body=event.method == b"HEAD")
            return
        if event is not h11.NEED_DATA:
            return
        http.receive_data(await connection.receive_some(_REQUEST_BYTES_MAX))


def respond(method: bytes, target: bytes, health: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of one request."""
    path = target.partition(b"?")[0]
    if path not in {b"/healthz", b"/readyz"}:
        return 404, {"error": "expected /healthz or /readyz"}
    if method not in {b"GET", b"HEAD"}:
        return 405, {"error": "expected GET or HEAD"}
    if path == b"/healthz":
        return 200, {"alive": True, "version": __version__}
    found = health()
    found["broken"] = found.get("broken", [])[:_BROKEN_COUNT_MAX]
    return 200 if found["ready"] else 503, found


async def _answer(connection: trio.SocketStream, http: h11.Connection, status: int, body: dict[str, Any], *,
                  without_body: bool = False) -> None:
    data = json.dumps(body).encode() + b"\n"
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(data))), ("Connection", "close"),
               ("Cache-Control", "no-store"), *([("Allow", "GET, HEAD")] if status == 405 else [])]
    events: list[h11.Event] = [h11.Response(status_code=status, headers=headers)]
    if not without_body:
        events.append(h11.Data(data=data))
    events.append(h11.EndOfMessage())
    await connection.send_all(b"".join(http.send(event) or b"" for event in events))
    with contextlib.suppress(trio.BrokenResourceError):
        await connection.send_eof()
