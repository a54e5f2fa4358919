"""
Health over HTTP: `/healthz` says that the worker's loop turns, `/readyz` that it serves mounts; `/metrics`.

Layer: node. Who calls: node.daemonworker, if `daemon.health_address` is configured. Health comes from memory: no disk,
no network, no lock; metrics are put together in a thread, once a second at most. While no worker runs (a moment, after
a crash) connections are refused: not ready.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lazyfs import __version__
from lazyfs.node import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_CONNECTION_COUNT_MAX = 16
_CONNECTION_S = 5.0
_RETRY_S = 2.0
_BROKEN_COUNT_MAX = 20           # named in one answer
_METRICS = b"/metrics"
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def serve(address: str, health: Callable[[], dict[str, Any]],
                metrics: Callable[[], Awaitable[bytes]] | None = None) -> None:
    """
    Answer for as long as the worker runs. Never raises an Exception: health is asked for, not needed.

    Args:
        address: host:port.
        health: as Worker.health(); quick, called in the loop.
        metrics: as Observer.page(); None: there are none.

    """
    def admit(request: web.Request) -> web.Answer | None:
        is_metrics = metrics is not None and request.target.partition(b"?")[0] == _METRICS
        if is_metrics and request.method in {b"GET", b"HEAD"}:
            return None
        return respond(request.method, request.target, health, also_metrics=metrics is not None)

    async def answer(_request: web.Request, _body: bytes) -> web.Answer:
        assert metrics is not None
        return 200, web.Text(_METRICS_TYPE, await metrics())

    await web.serve(address, web.Site("health_address", admit, answer, 0, _CONNECTION_COUNT_MAX, _CONNECTION_S,
                                      _RETRY_S))


def respond(method: bytes, target: bytes, health: Callable[[], dict[str, Any]], *,
            also_metrics: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of one request. `also_metrics`: there are, and they are answered elsewhere."""
    path = target.partition(b"?")[0]
    known = [b"/healthz", b"/readyz", *([_METRICS] if also_metrics else [])]
    if path not in known:
        return 404, {"error": f"expected {', '.join(one.decode() for one in known)}"}
    if method not in {b"GET", b"HEAD"}:
        return 405, {"error": "expected GET or HEAD", "allow": "GET, HEAD"}
    if path == b"/healthz":
        return 200, {"alive": True, "version": __version__}
    found = health()
    found["broken"] = found.get("broken", [])[:_BROKEN_COUNT_MAX]
    return 200 if found["ready"] else 503, found
