"""
The mirror as an HTTP proxy, and as the way of `lazyfs get` to the peers.

    GET http://host/path        a proxy's request: kept and shared if a rule names the URL, else passed on
    CONNECT host:port           a tunnel, to places of `mirror.proxy_hosts` only
    GET /url/https://host/path  the same file for who shows X-Lazyfs-Get (no web page can: it would need our leave)

Layer: mirror. Who calls: mirror.serving. State: none. A client may be led to public and private addresses, but to this
machine and its link (where clouds give out credentials) only if `mirror.proxy_hosts` names the place. A client on
another machine, where `mirror.address` lets it in, gets only what rules name, and tunnels.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import (
    AuthError,
    DeadlineError,
    FormatError,
    LazyfsError,
    NotFoundError,
    RateLimitedError,
    SourceError,
    UsageError,
)
from lazyfs.image.digest import Digest
from lazyfs.mirror.files import DIGEST_HEADER
from lazyfs.mirror.upstream import USER_AGENT
from lazyfs.mirror.urls import Target, check_url
from lazyfs.registry.addresses import Reach, origin_of, printable, reach_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lazyfs.mirror.files import Files
    from lazyfs.mirror.web import Reply, Request

GET_HEADER: Final = "x-lazyfs-get"
PATH: Final = "/url/"
_OWN_AGENT: Final = USER_AGENT.partition("/")[0] + "/"
_CONNECT_S: Final = 10.0
_TUNNEL_IDLE_S: Final = 600.0
_TUNNEL_BYTES: Final = 64 * 1024
# Of the client's headers these are not the server's: they are the connection's, ours, or said anew by us.
_NOT_SENT_ON: Final = frozenset({
    "host", "connection", "keep-alive", "proxy-authorization", "proxy-connection", "te", "trailer", "upgrade",
    "transfer-encoding", "content-length", "expect", "range", "if-range", "if-none-match", "if-modified-since",
    "if-match", "if-unmodified-since", "accept-encoding", "user-agent", GET_HEADER, DIGEST_HEADER})
_log = logging.getLogger("lazyfs.mirror")


class Proxy:
    """`hosts`: host:port of tunnels, and of servers that may be on this machine."""

    def __init__(self, files: Files, hosts: Collection[str]) -> None:
        self._files, self._hosts = files, frozenset(one.lower() for one in hosts)

    async def answer(self, request: Request, reply: Reply) -> bool:
        """False: the request is none for a proxy."""
        asks_for_url = request.target.startswith(PATH)
        if request.method == "CONNECT":
            await self._tunnel(request.target.lower(), reply)
        elif asks_for_url and (GET_HEADER not in request.headers or request.method not in {"GET", "HEAD"}):
            await _refuse(reply, 403, f"{PATH} is for GET and HEAD, with the header {GET_HEADER}")
        elif asks_for_url:
            await self._file(request.target.removeprefix(PATH), request, reply, is_covered=True)
        elif request.target.startswith(("http://", "https://")):
            await self._file(request.target, request, reply, is_covered=False)
        else:
            return False
        return True

    async def _file(self, url: str, request: Request, reply: Reply, *, is_covered: bool) -> None:
        began = trio.current_time()
        source = ""
        try:
            if request.headers.get("user-agent", "").startswith(_OWN_AGENT):
                raise UsageError("two mirrors ask each other")
            target = self._target(check_url(url), request.headers)
            digest = Digest(text) if (text := request.headers.get(DIGEST_HEADER)) else None
            has_rule = self._files.rules.covers(url)
            if not has_rule and not is_here(request.peer):
                raise AuthError("a client on another machine is served only what a rule names",
                                hint="mirror.proxy, proxy_immutable; else whoever reaches this port reaches what we do")
            if request.method in {"GET", "HEAD"} and (is_covered or has_rule):
                source = await self._files.answer(target, request, reply, digest)
            else:
                source = await self._files.pass_on(target, request, reply)
        except LazyfsError as error:
            _log.info("%s: %s: %s", printable(url), "torn" if reply.has_begun else "not served", error)
            if reply.has_begun:
                raise trio.BrokenResourceError(str(error)) from error
            await _refuse(reply, _status_of(error), str(error), error.hint or self._hint(url))
        if source:
            _log.info("served", extra={"fields": {"url": printable(url), "source": source, "bytes": reply.body_bytes,
                                                  "seconds": round(trio.current_time() - began, 3)}})

    @staticmethod
    def _hint(url: str) -> str:
        try:
            is_own = reach_of(origin_of(url).host) is Reach.MACHINE
        except SourceError:
            return ""
        return "mirror.proxy_hosts names what it may reach on this machine" if is_own else ""

    def _target(self, url: str, headers: Mapping[str, str]) -> Target:
        origin = origin_of(url)
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        reach = Reach.MACHINE if f"{host}:{origin.port}" in self._hosts else Reach.PRIVATE
        named = {word.strip().lower() for word in headers.get("connection", "").split(",")}
        kept = {name: value for name, value in headers.items() if name not in _NOT_SENT_ON and name not in named}
        return Target(url, kept, reach)

    async def _tunnel(self, place: str, reply: Reply) -> None:
        if place not in self._hosts:
            await _refuse(reply, 403, f"no tunnel to {place[:300]!r}", "mirror.proxy_hosts names those there may be")
            return
        host, _, port = place.rpartition(":")
        try:
            with trio.fail_after(_CONNECT_S):
                server = await trio.open_tcp_stream(host.strip("[]"), int(port))
        except (OSError, ValueError, trio.TooSlowError):
            await _refuse(reply, 502, f"{place} cannot be reached")
            return
        async with server:
            await reply.begin(200, {})
            client, early = reply.tunnel()
            if early:
                await server.send_all(early)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, client, server, nursery.cancel_scope)
                await _pump(server, client, nursery.cancel_scope)


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, both: trio.CancelScope) -> None:
    """Until one side ends, or nothing comes for long; a half-closed tunnel is given what is left of that time."""
    try:
        while True:
            with trio.move_on_after(_TUNNEL_IDLE_S) as scope:
                data = await source.receive_some(_TUNNEL_BYTES)
                if not data:
                    await sink.send_eof()
                    return
                await sink.send_all(data)
            if scope.cancelled_caught:
                break
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    both.cancel()


def is_here(peer: str) -> bool:
    """Whether a client is on this machine: it could go wherever it has us go."""
    return reach_of(peer) is Reach.MACHINE


def _status_of(error: LazyfsError) -> int:
    for kind, status in ((NotFoundError, 404), (AuthError, 403), (RateLimitedError, 429), (DeadlineError, 504),
                         (UsageError, 400), (FormatError, 400), (SourceError, 502)):
        if isinstance(error, kind):
            return status
    return 502


async def _refuse(reply: Reply, status: int, text: str, hint: str = "") -> None:
    body = json.dumps({"error": text[:500], **({"hint": hint} if hint else {})}).encode() + b"\n"
    await reply.whole(status, {"Content-Type": "application/json"}, body)
