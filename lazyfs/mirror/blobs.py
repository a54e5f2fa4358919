"""
A blob for the mirror's clients: out of containerd's store, or in pieces from this node, its peers and the registry.

Layer: mirror. Who calls: mirror.pulling. Whose leave it needs is mirror.access' affair; this module knows where the
bytes are. State: which repositories' blobs are being read, so that a repository that has not shown a blob yet gets
nothing that came for another one.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import DeadlineError, IntegrityError, NotFoundError
from lazyfs.mirror.access import take_sample
from lazyfs.mirror.download import Span
from lazyfs.mirror.piecefile import resource_of
from lazyfs.peers.model import Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lazyfs.image.digest import Digest
    from lazyfs.mirror.access import Access
    from lazyfs.mirror.contentstore import ContentStore
    from lazyfs.mirror.download import Download
    from lazyfs.mirror.pieces import Blobs
    from lazyfs.mirror.upstream import Upstream
    from lazyfs.mirror.web import Reply
    from lazyfs.registry.place import ByteStream
    from lazyfs.registry.reference import RegistryReference

CONTENT: Final = "content"           # sources, for logs and metrics: containerd's store
PIECES: Final = "pieces"             # of this node, fetched before
PEERS: Final = "peers"
REGISTRY: Final = "registry"
FIRST_BYTE_S: Final = 30.0           # a client whose bytes do not begin by then can ask the registry itself


@dataclass(slots=True)
class Reading:
    """Bytes of a blob: `first`, then `rest`. `source`: where most of them come from."""

    first: Span | None
    rest: AsyncIterator[Span] | None
    source: str

    async def send(self, reply: Reply) -> None:
        """All of them. Raises LazyfsError: they did not come; trio.BrokenResourceError: the client has gone."""
        if self.first is not None:
            await reply.send_file(self.first.file, self.first.offset, self.first.size)
        if self.rest is not None:
            async for span in self.rest:
                await reply.send_file(span.file, span.offset, span.size)


@dataclass(frozen=True, slots=True)
class RegistryBlob:
    """mirror.fromorigin.Origin."""

    upstream: Upstream
    reference: RegistryReference
    digest: Digest
    ranges: bool = True

    @property
    def name(self) -> str:
        return self.reference.identity

    def read_range(self, offset: int, size: int, deadline: float) -> ByteStream:
        return self.upstream.read_range(self.reference, self.digest, offset, size, deadline)


class PullBlobs:
    """
    See the module.

    `peers_prove`: peers check this node's right to what they send (the cluster has tokens); else the registry is asked
    to show that it has what they sent.
    """

    def __init__(self, content: ContentStore, pieces: Blobs, access: Access, upstream: Upstream, *,
                 peers_prove: bool = False) -> None:
        self._content = content
        self._pieces = pieces
        self._access = access
        self._upstream = upstream
        self._peers_prove = peers_prove
        self._places: dict[str, list[str]] = {}     # of each resource that is being read, who reads: places

    async def size(self, reference: RegistryReference, digest: Digest) -> int:
        """
        The size of a blob that this repository has for us.

        Raises:
            NotFoundError, AuthError, SourceError: it has it not, or not for us, or nobody knows.

        """
        opened = self._content.open(digest)
        if opened is None:
            return await self._access.size_of(reference, digest)
        try:
            await self._check(reference, digest, opened.size, Span(opened.file, 0, opened.size))
        finally:
            opened.close()
        return opened.size

    @asynccontextmanager
    async def read(self, reference: RegistryReference, digest: Digest, size: int, start: int,
                   end: int) -> AsyncIterator[Reading]:
        """
        Bytes [start, end) of a blob of this size, not empty; the first ones are there when the block begins.

        Raises:
            LazyfsError: they cannot be had.

        """
        opened = self._content.open(digest, size)
        if opened is not None:
            try:
                await self._check(reference, digest, size, Span(opened.file, 0, size))
                yield Reading(Span(opened.file, start, end - start), None, CONTENT)
            finally:
                opened.close()
            return
        resource = resource_of(Kind.BLOB, digest, size)
        others = self._places.setdefault(resource.key, [])
        if any(one.resource.key == resource.key and one.resource != resource for one in self._pieces.under_way()):
            raise IntegrityError(f"blob {digest.short}: {reference.identity} says that it has {size} bytes")
        is_alone = all(one == reference.identity for one in others)
        others.append(reference.identity)
        try:
            origin = RegistryBlob(self._upstream, reference, digest)
            async with (self._pieces.open(resource, origin) as download,
                        self._begun(download, reference, start, end, is_alone=is_alone) as reading):
                yield reading
        finally:
            others.remove(reference.identity)
            if not others:
                self._places.pop(resource.key, None)

    @asynccontextmanager
    async def _begun(self, download: Download, reference: RegistryReference, start: int, end: int, *,
                     is_alone: bool) -> AsyncIterator[Reading]:
        resource = download.resource
        was_whole, was_here = download.file.is_whole, any(download.file.present)
        before = download.counted.peers
        async with aclosing(download.spans(start, end)) as spans:
            with trio.move_on_after(FIRST_BYTE_S) as scope:
                first = await anext(spans, None)
            if scope.cancelled_caught:
                raise DeadlineError(f"blob {resource.digest.short}: no bytes in {FIRST_BYTE_S:g} s")
            gave_itself = is_alone and not was_here and (self._peers_prove or download.counted.peers == before)
            if gave_itself:
                await self._access.served(reference, resource.digest, resource.size)
            elif first is not None:
                await self._check(reference, resource.digest, resource.size, first)
            source = PIECES if was_whole else REGISTRY if download.counted.peers == before else PEERS
            yield Reading(first, spans, source)

    async def _check(self, reference: RegistryReference, digest: Digest, size: int, span: Span) -> None:
        try:
            sample = await trio.to_thread.run_sync(take_sample, span.file, span.offset, span.offset + span.size)
        except OSError as error:
            raise NotFoundError(f"blob {digest.short} cannot be read here: {error.strerror}") from error
        await self._access.check_local(reference, digest, size, sample)

