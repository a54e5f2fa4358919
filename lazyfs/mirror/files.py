"""
Files behind URLs for clients of the mirror: kept on this node, shared with peers, or just passed on.

Layer: mirror. Who calls: mirror.proxy. State: what servers said of URLs under a rule of immutable ones. Each request
asks the server first (HEAD, with the asker's own headers), so nobody gets from here what the server would not give to
him, and nothing that has changed; only URLs that the operator calls immutable are not asked about again, and only
for who shows no credentials. Peers are asked if somebody vouches for the bytes: the asker's digest, the server's, or
the operator (`share_unverified`), for a cluster whose nodes trust each other.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import DiskFullError, FormatError, IntegrityError, LazyfsError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.mirror.piecefile import resource_of
from lazyfs.mirror.ranges import NotSatisfiable, parse_range
from lazyfs.mirror.urls import UrlOrigin, passable
from lazyfs.peers.model import Kind, Resource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from lazyfs.mirror.download import Download
    from lazyfs.mirror.pieces import Blobs
    from lazyfs.mirror.urls import Looked, Target, Urls
    from lazyfs.mirror.web import Reply, Request

_KNOWN_COUNT_MAX: Final = 4096
_PASS_S: Final = 3600.0              # of something that is passed on: a file of any size; who drips is left earlier
_PASS_BYTES: Final = 256 * 1024
DIGEST_HEADER: Final = "x-lazyfs-digest"     # what the asker expects, and what the mirror has checked


@dataclass(frozen=True, slots=True)
class Rules:
    """Of the configuration: regular expressions, searched in the URL without its query."""

    cached: tuple[re.Pattern[str], ...] = ()
    immutable: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def of(cls, cached: tuple[str, ...], immutable: tuple[str, ...]) -> Rules:
        """Raises re.error."""
        return cls(tuple(map(re.compile, cached)), tuple(map(re.compile, immutable)))

    def is_immutable(self, url: str) -> bool:
        return any(rule.search(_bare(url)) for rule in self.immutable)

    def covers(self, url: str) -> bool:
        return self.is_immutable(url) or any(rule.search(_bare(url)) for rule in self.cached)


class Files:
    """See the module."""

    def __init__(self, blobs: Blobs, urls: Urls, rules: Rules, *, share_unverified: bool) -> None:
        self.rules = rules
        self._blobs, self._urls, self._share_unverified = blobs, urls, share_unverified
        self._known: OrderedDict[str, Looked] = OrderedDict()

    async def answer(self, target: Target, request: Request, reply: Reply, digest: Digest | None) -> str:
        """
        A GET or HEAD; returns where the bytes came from: files, passed.

        `digest`: that the asker expects; without it a file under credentials is passed on, never kept.

        Raises:
            LazyfsError: it cannot be had; where the answer has begun it is torn.

        """
        looked = await self._look(target)
        if digest is not None and looked.digest is not None and digest != looked.digest:
            raise IntegrityError(f"{target.where}: the server says {looked.digest.short}, expected {digest.short}")
        digest = digest or looked.digest
        resource = self._resource(target, looked, digest)
        if resource is None:
            return await self.pass_on(target, request, reply)
        headers = {**looked.headers, "Accept-Ranges": "bytes", **({"X-Lazyfs-Digest": str(digest)} if digest else {})}
        if _has_it(request.headers, looked):
            await reply.whole(304, headers, size=resource.size)
            return "files"
        may_range = request.headers.get("if-range", looked.validator).strip() == looked.validator
        wanted = parse_range(request.headers.get("range") if may_range else None, resource.size)
        if isinstance(wanted, NotSatisfiable):
            await reply.whole(416, {**headers, "Content-Range": f"bytes */{resource.size}"})
            return "files"
        start, end = wanted or (0, resource.size)
        status = 200 if wanted is None else 206
        if wanted is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{resource.size}"
        if request.method == "HEAD":
            await reply.whole(status, headers, size=end - start)
            return "files"
        try:
            async with self._open(target, looked, resource, digest) as download:
                await _send(download, reply, (status, headers, start, end))
        except DiskFullError:
            if reply.has_begun:
                raise
            return await self.pass_on(target, request, reply)
        return "files"

    @asynccontextmanager
    async def kept(self, target: Target) -> AsyncIterator[Download]:
        """
        Something that is to be on this node's disk, before anybody asks for it.

        Raises:
            UsageError: it is not of a kind that is kept. LazyfsError: it cannot be had.

        """
        looked = await self._look(target)
        resource = self._resource(target, looked, looked.digest)
        if resource is None:
            raise UsageError(f"{target.where}: its server says no size or no version of it, or it needs credentials",
                             hint="only files that can be told apart are kept (docs/get.md)")
        async with self._open(target, looked, resource, looked.digest) as download:
            yield download

    def _open(self, target: Target, looked: Looked, resource: Resource,
              digest: Digest | None) -> AbstractAsyncContextManager[Download]:
        shares = digest is not None or (self._share_unverified and not target.has_credentials)
        return self._blobs.open(resource, UrlOrigin(self._urls, target, looked), verify=digest is not None,
                                shared=shares)

    async def _look(self, target: Target) -> Looked:
        immutable = self.rules.is_immutable(target.url) and not target.has_credentials
        key = target.identity
        if immutable and (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        found = await trio.to_thread.run_sync(self._urls.look, target, abandon_on_cancel=True)
        if immutable:
            self._known[key] = found
            if len(self._known) > _KNOWN_COUNT_MAX:
                self._known.popitem(last=False)
        return found

    def _resource(self, target: Target, looked: Looked, digest: Digest | None) -> Resource | None:
        """None: it is not to be kept."""
        if not looked.size or (digest is None and (target.has_credentials or not looked.validator)):
            return None
        named = digest or Digest.of(f"{target.identity}\n{looked.validator}\n{looked.size}".encode())
        try:
            return resource_of(Kind.FILE, named, looked.size)
        except FormatError:
            return None

    async def pass_on(self, target: Target, request: Request, reply: Reply) -> str:
        """The request as it is, and its answer as it comes. Raises LazyfsError."""
        kept = {name: value for name, value in request.headers.items()
                if name in {"range", "if-range", "if-none-match", "if-modified-since", "accept", "content-type"}}
        deadline = time.monotonic() + _PASS_S
        answer = await trio.to_thread.run_sync(
            lambda: self._urls.send(target, request.method, kept, deadline, request.body or None))
        try:
            headers = {name: value for name, value in passable(answer.headers).items()
                       if name.lower() not in _HOP_BY_HOP}
            if answer.length is None:
                headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
            await reply.begin(answer.status, headers)
            if request.method == "HEAD" or answer.status in {204, 304}:
                await reply.end()        # without a length, where the server has said none: not of 0 bytes
                return "passed"
            while data := await trio.to_thread.run_sync(answer.read, _PASS_BYTES):
                await reply.write(data)
            await reply.end()
        except LazyfsError as error:
            raise trio.BrokenResourceError(str(error)) from error
        finally:
            answer.close()
        return "passed"


async def _send(download: Download, reply: Reply, head: tuple[int, dict[str, str], int, int]) -> None:
    """`head`: status, headers, and the bytes [start, end). Raises LazyfsError: before anything was sent, or in it."""
    status, headers, start, end = head
    async with aclosing(download.spans(start, end)) as spans:
        first = await anext(spans)
        await reply.begin(status, {**headers, "Content-Length": str(end - start)})
        await reply.send_file(first.file, first.offset, first.size)
        async for span in spans:
            await reply.send_file(span.file, span.offset, span.size)
    await reply.end()


_HOP_BY_HOP: Final = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade", "proxy-connection"})


def _bare(url: str) -> str:
    return url.partition("?")[0].partition("#")[0]


def _has_it(headers: Mapping[str, str], looked: Looked) -> bool:
    """If-None-Match, or else If-Modified-Since, names what is there now."""
    listed = headers.get("if-none-match")
    if listed is not None:
        return bool(looked.etag) and looked.etag in [one.strip() for one in listed.split(",")[:16]]
    since = headers.get("if-modified-since")
    return since is not None and since == looked.headers.get("Last-Modified")
