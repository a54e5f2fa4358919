"""
Ordinary blobs and files of URLs on this node: opened by any number of readers, fetched once, shared while they come.

    async with Blobs(directory, swarm=...).serving() as blobs:
        async with blobs.open(resource, origin) as download:
            async with aclosing(download.spans(0, resource.size)) as spans:
                async for span in spans: ...

Layer: mirror. Who calls: the pull mirror, the proxy, preheating; the peer server serves from PieceStore. State: who has
what open. A resource's Download lives from its first reader to LINGER_S after the last: a client that closes
early and comes back (containerd fetches ranges so) finds it as it was.
"""

from __future__ import annotations

import logging
import math
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import BugError, LazyfsError, PeerLacksError
from lazyfs.mirror.download import Counted, Download, Threads
from lazyfs.mirror.piecefile import file_name, resource_of
from lazyfs.peers.model import HERE_ONLY, FileRange, Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from lazyfs.mirror.contentstore import ContentStore
    from lazyfs.mirror.download import Fetching
    from lazyfs.mirror.fromorigin import Origin
    from lazyfs.mirror.piecedir import PieceDirectory
    from lazyfs.mirror.piecefile import PieceFile
    from lazyfs.peers.model import PieceRequest, Resource

LINGER_S: Final = 10.0
TRUST_S: Final = 600.0           # a whole one that was right is not looked at again for so long: it is in memory mostly
_log = logging.getLogger("lazyfs.mirror")


@dataclass(eq=False, slots=True)
class _Entry:
    """One resource that is, or was a moment ago, open. `scope`: of its `run`, while it runs."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    download: Download | None = None
    users: int = 0
    scope: trio.CancelScope | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """Something that this node has all (`whole`) or some of."""

    resource: Resource
    whole: bool


class Blobs:
    """
    See the module.

    Attributes:
        counted: bytes since the start, by source.
        on_open, on_close: told, on the loop, when this node begins and ends to take part in a resource.
        blame: told the id of a member that gave wrong bytes, and of what, once a piece.
        recall: told of what readers may have been given wrong bytes, when those are gone from here.

    """

    def __init__(self, directory: PieceDirectory, *, swarm: Fetching | None = None,
                 content: ContentStore | None = None) -> None:
        """`content`: containerd's blobs, which are served to peers as well."""
        self.directory, self.swarm, self.content = directory, swarm, content
        self.on_open: Callable[[Resource], None] | None = None
        self.on_close: Callable[[Resource], None] | None = None
        self.blame: Callable[[str, Download], None] | None = None
        self.recall: Callable[[Resource], Awaitable[None]] | None = None
        self.counted = Counted()
        self._threads = Threads()
        self._entries: dict[str, _Entry] = {}
        self._trusted: dict[str, float] = {}      # of what was whole on the disk and right: until when
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Blobs]:
        """While the block lasts it can be used; at its end everything is closed, what had come is kept."""
        try:
            async with trio.open_nursery() as self._nursery:
                yield self
                self._nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                for key, entry in list(self._entries.items()):
                    await self._close(key, entry)
            self._nursery = None

    @asynccontextmanager
    async def open(self, resource: Resource, origin: Origin, *, sums: bytes = b"",
                   verify: bool = True, shared: bool = True) -> AsyncIterator[Download]:
        """
        Take part in a resource; of `origin` the newest counts. `sums`, `verify`: as of Download. `shared`: with peers.

        Raises:
            DiskFullError: there is no room for it. CacheError: the disk does not let us.

        """
        async with self._entered(resource, origin, sums, verify=verify, shared=shared) as entry:
            assert entry.download is not None
            yield entry.download

    async def fetch(self, resource: Resource, origin: Origin, *, sums: bytes = b"", verify: bool = True) -> None:
        """All of it, in the background of what is read. Raises LazyfsError."""
        async with self.open(resource, origin, sums=sums, verify=verify) as download:
            download.want_all()
            await download.wait(0, whole=True)

    async def held(self) -> list[Held]:
        """What is on disk, and what is open. Raises OSError."""
        found = await trio.to_thread.run_sync(self.directory.held)
        return [Held(resource, whole) for resource, whole in found]

    def under_way(self) -> list[Download]:
        return [entry.download for entry in self._entries.values() if entry.download is not None]

    @asynccontextmanager
    async def offered(self, resource: Resource) -> AsyncIterator[Download | None]:
        """For a peer: what this node has of it, or has under way; None: nothing."""
        if resource.key not in self._entries and not await trio.to_thread.run_sync(self.directory.has, resource):
            yield None
            return
        async with self._entered(resource, None, b"", verify=True) as entry:
            yield entry.download

    @asynccontextmanager
    async def _entered(self, resource: Resource, origin: Origin | None, sums: bytes, *,
                       verify: bool, shared: bool = True) -> AsyncIterator[_Entry]:
        entry = self._entries.setdefault(resource.key, _Entry())
        entry.users += 1
        try:
            async with entry.lock:
                if entry.download is None:
                    file = await self._find(resource, make=origin is not None)
                    if file is not None:
                        entry.download = Download(file, self.directory, self._threads, self.counted, sums=sums,
                                                  verify=verify, blame=self._blame, recall=self.recall)
                    if file is not None and file.is_whole and resource.kind is Kind.BLOB:
                        self._doubt(resource.key, entry)
                if entry.download is not None and origin is not None:
                    self._start(resource, entry, entry.download, origin, shared=shared)
            yield entry
        finally:
            entry.users -= 1
            if not entry.users and self._nursery is not None:
                self._nursery.start_soon(self._linger, resource.key, entry)

    def _doubt(self, key: str, entry: _Entry) -> None:
        """What is whole on the disk is looked at again, once in TRUST_S, while it is being read."""
        download = entry.download
        if download is None or self._nursery is None or self._trusted.get(key, -math.inf) > trio.current_time():
            return
        download.is_doubted = True
        entry.users += 1                 # it stays open for that
        self._nursery.start_soon(self._recheck, key, entry, download)

    def _trust(self, key: str) -> None:
        """Its digest was right just now."""
        now = trio.current_time()
        self._trusted = {one: until for one, until in self._trusted.items() if until > now}
        self._trusted[key] = now + TRUST_S

    async def _recheck(self, key: str, entry: _Entry, download: Download) -> None:
        is_right = False
        with suppress(LazyfsError):      # a disk that cannot even read it
            is_right = await download.digest() == download.resource.digest
        if is_right:
            self._trust(key)
        else:
            _log.warning("%s: it has rotted on the disk, and is dropped", key)
            await trio.to_thread.run_sync(self.directory.drop, download.resource)
            if self.recall is not None:
                await self.recall(download.resource)
            if self._entries.get(key) is entry:
                del self._entries[key]   # who asks next begins anew
        download.decide(is_right=is_right)
        entry.users -= 1
        if not entry.users and self._nursery is not None:
            self._nursery.start_soon(self._linger, key, entry)

    async def _find(self, resource: Resource, *, make: bool) -> PieceFile | None:
        busy = {file_name(one.resource) for one in self.under_way()}
        return await trio.to_thread.run_sync(lambda: self.directory.find(resource, make=make, busy=busy),
                                             limiter=self._threads.disk)

    def _start(self, resource: Resource, entry: _Entry, download: Download, origin: Origin, *,
               shared: bool) -> None:
        if self._nursery is None:
            raise BugError("blobs are not being served")
        if download.resource != resource:
            raise BugError(f"{resource.key}: two sizes")
        was_shared = download.shared
        download.ask(origin, self.swarm, shared=shared or was_shared)
        if download.shared and not was_shared and self.on_open is not None:
            self.on_open(resource)
        if entry.scope is None and not download.file.is_whole:
            entry.scope = trio.CancelScope()
            self._nursery.start_soon(self._run, resource.key, entry, download, entry.scope)

    async def _run(self, key: str, entry: _Entry, download: Download, scope: trio.CancelScope) -> None:
        with scope:
            await download.run()
        entry.scope = None
        if download.file.is_whole:
            self._trust(key)
        if not download.file.is_whole and not scope.cancelled_caught and self._entries.get(key) is entry:
            del self._entries[key]     # its bytes were wrong, and are gone: who asks next begins anew
            if not entry.users:
                await self._close(key, entry)

    async def _linger(self, key: str, entry: _Entry) -> None:
        await trio.sleep(LINGER_S)
        if not entry.users:
            await self._close(key, entry)

    async def _close(self, key: str, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
        if entry.scope is not None:
            entry.scope.cancel()
        download, entry.download = entry.download, None
        if download is None:
            return
        download.file.retain()
        await trio.to_thread.run_sync(self.directory.save, download.file)
        download.file.release()
        download.file.release()
        if self.on_close is not None:
            self.on_close(download.resource)

    def _blame(self, member: str, download: Download) -> None:
        _log.warning("%s: the peer %s gave a wrong piece", download.resource.key, member)
        if self.blame is not None:
            self.blame(member, download)


class PieceStore:
    """peers.model.Store: what the mirror gives to peers."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def piece(self, request: PieceRequest, index: int) -> bytes | memoryview | FileRange:
        """See peers.model.Store.piece."""
        resource = request.resource
        if resource.kind is Kind.DEVICE or resource != resource_of(resource.kind, resource.digest, resource.size):
            raise PeerLacksError(f"{resource.key}: not shared here in pieces of {resource.piece_size}")
        size, offset = resource.piece_bytes(index), index * resource.piece_size
        content = self._blobs.content
        if content is not None and resource.kind is Kind.BLOB:
            opened = content.open(resource.digest, resource.size)
            if opened is not None:
                return FileRange(opened.file, offset, size, opened.close)
        deadline = trio.current_time() + request.seconds
        async with self._blobs.offered(resource) as download:
            if download is None:
                raise PeerLacksError(f"{resource.key}: not here")
            if not download.file.present[index]:
                if request.hops >= HERE_ONLY and not download.is_at_origin(index):
                    raise PeerLacksError(f"{resource.key}: piece {index} is not here")
                await download.piece(index, priority=request.priority, deadline=deadline, hops=request.hops + 1,
                                     request=request.request)
            download.file.retain()
            return FileRange(download.file.file, offset, size, download.file.release)

