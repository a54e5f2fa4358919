"""
The distribution API's pull side: each request to its end, each error in the specification's words.

Layer: mirror. Who calls: mirror.web, through mirror.serving. Nothing is pushed or deleted here. Whatever cannot be
answered is 404, and soon: clients then ask the registry itself, with their own credentials. Bytes are never
re-encoded. An answer that has begun and cannot be ended is torn, so that the client asks for the rest.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import LazyfsError, NotFoundError
from lazyfs.image.digest import Digest
from lazyfs.mirror import lists
from lazyfs.mirror.ranges import NotSatisfiable, parse_range
from lazyfs.mirror.route import End, Refusal, find_route
from lazyfs.mirror.upstream import USER_AGENT
from lazyfs.registry.hosts import OWN_MIRROR

if TYPE_CHECKING:
    from lazyfs.mirror.blobs import PullBlobs
    from lazyfs.mirror.figures import Figures
    from lazyfs.mirror.manifests import Manifests
    from lazyfs.mirror.route import Route
    from lazyfs.mirror.upstream import Upstream
    from lazyfs.mirror.web import Reply, Request

_OWN_AGENT: Final = USER_AGENT.partition("/")[0] + "/"
_EMPTY: Final = Digest.of(b"")
_UNKNOWN: Final = {End.BLOB: "BLOB_UNKNOWN", End.TAGS: "NAME_UNKNOWN"}
_VERSION: Final = {"Docker-Distribution-Api-Version": "registry/2.0"}
_log = logging.getLogger("lazyfs.mirror")


class Pulling:
    """See the module."""

    def __init__(self, manifests: Manifests, blobs: PullBlobs, upstream: Upstream, figures: Figures) -> None:
        self._manifests = manifests
        self._blobs = blobs
        self._upstream = upstream
        self._figures = figures

    async def answer(self, request: Request, reply: Reply) -> bool:
        """False: the request is not of this API."""
        route = find_route(request.target)
        if route is None:
            return False
        if isinstance(route, Refusal):
            await refuse(reply, route)
        elif request.method not in {"GET", "HEAD"}:
            await refuse(reply, Refusal(405, "UNSUPPORTED", "this mirror is for pulling only"), {"Allow": "GET, HEAD"})
        elif request.headers.get("user-agent", "").startswith(_OWN_AGENT):
            await refuse(reply, Refusal(404, "NAME_UNKNOWN", "two mirrors ask each other: see hosts.toml"))
        else:
            await self._answer(route, request, reply)
        return True

    async def _answer(self, route: Route, request: Request, reply: Reply) -> None:
        headers = {**_VERSION, **({"OCI-Namespace": route.namespace} if route.namespace else {})}
        began = trio.current_time()
        source = ""
        try:
            if route.end is End.PING:
                own = {OWN_MIRROR: USER_AGENT, "Content-Type": "application/json"}
                await reply.whole(200, {**headers, **own}, b"{}")
            elif route.end is End.MANIFEST:
                source = await self._manifest(route, request, reply, headers)
            elif route.end is End.BLOB:
                source = await self._blob(route, request, reply, headers)
            else:
                source = await self._list(route, reply, headers)
        except LazyfsError as error:
            self._tell(route, reply, error)
            if reply.has_begun:
                raise trio.BrokenResourceError(str(error)) from error
            code = _UNKNOWN.get(route.end, "MANIFEST_UNKNOWN")
            await refuse(reply, Refusal(404, code, f"not to be had from this mirror: {error}"), headers)
        finally:
            self._figures.answered(route.end.value, source or "none", reply.status, reply.body_bytes,
                                   trio.current_time() - began)
        if source and reply.method == "GET":
            _log.info("served", extra={"fields": {
                "image": route.reference.identity, "what": route.end.value, "source": source,
                "digest": route.digest.short if route.digest else route.reference.tag, "bytes": reply.body_bytes,
                "seconds": round(trio.current_time() - began, 3)}})

    def _tell(self, route: Route, reply: Reply, error: LazyfsError) -> None:
        level = logging.DEBUG if isinstance(error, NotFoundError) else logging.WARNING
        _log.log(level, "%s %s: %s: %s", route.reference.text, route.end.value,
                 "torn" if reply.has_begun else "not served", error)

    async def _manifest(self, route: Route, request: Request, reply: Reply, headers: dict[str, str]) -> str:
        found = await self._manifests.find(route.reference)
        document = found.document
        headers = {**headers, "Content-Type": document.media_type, "Docker-Content-Digest": str(document.digest),
                   "ETag": f'"{document.digest}"'}
        if _has_it(request, document.digest):
            await reply.whole(304, headers, size=len(document.data))
        else:
            await reply.whole(200, headers, document.data)
        return found.source

    async def _blob(self, route: Route, request: Request, reply: Reply, headers: dict[str, str]) -> str:
        digest = route.digest
        assert digest is not None
        size = await self._blobs.size(route.reference, digest)
        headers = {**headers, "Content-Type": "application/octet-stream", "Docker-Content-Digest": str(digest),
                   "ETag": f'"{digest}"', "Accept-Ranges": "bytes", "Cache-Control": "max-age=31536000"}
        if size == 0 and digest != _EMPTY:
            raise NotFoundError(f"blob {digest.short}: {route.reference.identity} says that it is empty")
        wanted = parse_range(request.headers.get("range") if _may_range(request, digest) else None, size)
        if _has_it(request, digest):
            await reply.whole(304, headers, size=size)
            return "none"
        if isinstance(wanted, NotSatisfiable):
            await refuse(reply, Refusal(416, "RANGE_INVALID", "nothing of this range is there"),
                         {**headers, "Content-Range": f"bytes */{size}"})
            return "none"
        start, end = wanted or (0, size)
        status = 200 if wanted is None else 206
        if wanted is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if request.method == "HEAD" or size == 0:
            await reply.whole(status, headers, size=end - start)
            return "none"
        async with self._blobs.read(route.reference, digest, size, start, end) as reading:
            await reply.begin(status, {**headers, "Content-Length": str(end - start)})
            await reading.send(reply)
        await reply.end()
        return reading.source

    async def _list(self, route: Route, reply: Reply, headers: dict[str, str]) -> str:
        ask = lists.tags if route.end is End.TAGS else lists.referrers
        page = await self._manifests.in_thread(partial(ask, self._upstream, route))
        await reply.whole(200, {**headers, **page.headers, "Content-Type": page.content_type}, page.data)
        return "registry"


def _has_it(request: Request, digest: Digest) -> bool:
    """If-None-Match: the client has the very thing (RFC 9110 §13.1.2)."""
    listed = request.headers.get("if-none-match", "")
    return any(one.strip().removeprefix("W/") in {f'"{digest}"', str(digest)} for one in listed.split(",")[:16])


def _may_range(request: Request, digest: Digest) -> bool:
    """If-Range: a range of this very thing, else all of it (RFC 9110 §13.1.5)."""
    return request.headers.get("if-range", f'"{digest}"').strip() == f'"{digest}"'


async def refuse(reply: Reply, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
    """An error as the specification has it."""
    error = {"code": refusal.code, "message": refusal.message[:500], "detail": None}
    found = {key: value for key, value in (headers or {}).items()
             if key not in {"Docker-Content-Digest", "ETag", "Content-Type", "Cache-Control"}}
    await reply.whole(refusal.status, {**found, "Content-Type": "application/json"},
                      json.dumps({"errors": [error]}).encode())
