"""
Health over HTTP: `/healthz` says that the worker's loop turns, `/readyz` that it serves mounts.

Layer: node. Who calls: node.daemonworker, if `daemon.health_address` is configured. Answers come from memory: no disk,
no network, no lock. While no worker runs (a moment, after a crash) connections are refused: not ready.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lazyfs import __version__
from lazyfs.node import web

if TYPE_CHECKING:
    from collections.abc import Callable

_CONNECTION_COUNT_MAX = 16
_CONNECTION_S = 5.0
_RETRY_S = 2.0
_BROKEN_COUNT_MAX = 20           # named in one answer


async def serve(address: str, health: Callable[[], dict[str, Any]]) -> None:
    """
    Answer for as long as the worker runs. Never raises an Exception: health is asked for, not needed.

    Args:
        address: host:port.
        health: as Worker.health(); quick, called in the loop.

    """
    def admit(request: web.Request) -> web.Answer:
        return respond(request.method, request.target, health)

    async def no_body(request: web.Request, _: bytes) -> web.Answer:
        return admit(request)

    await web.serve(address, web.Site("health_address", admit, no_body, 0, _CONNECTION_COUNT_MAX, _CONNECTION_S,
                                      _RETRY_S))


def respond(method: bytes, target: bytes, health: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of one request."""
    path = target.partition(b"?")[0]
    if path not in {b"/healthz", b"/readyz"}:
        return 404, {"error": "expected /healthz or /readyz"}
    if method not in {b"GET", b"HEAD"}:
        return 405, {"error": "expected GET or HEAD", "allow": "GET, HEAD"}
    if path == b"/healthz":
        return 200, {"alive": True, "version": __version__}
    found = health()
    found["broken"] = found.get("broken", [])[:_BROKEN_COUNT_MAX]
    return 200 if found["ready"] else 503, found
