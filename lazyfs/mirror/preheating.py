"""
What the mirror does of a preheat task: all blobs of an ordinary image, or a file, onto this node's disk.

Layer: mirror. Who calls: peers.jobs.Agent, in mirror.serving. A lazy image is not its affair: the node's daemon fetches
it. State: none. Blobs come through the same pieces as those that a client waits for, behind them; what containerd has
already is not fetched again. Where the task brings a credential, that is shown, and nothing else.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import LazyfsError, UsageError
from lazyfs.image.manifest import is_lazy
from lazyfs.image.oci import is_index, parse_index, parse_manifest
from lazyfs.mirror.blobs import RegistryBlob
from lazyfs.mirror.manifests import listed_in
from lazyfs.mirror.piecefile import resource_of
from lazyfs.mirror.upstream import Upstream
from lazyfs.mirror.urls import Target, check_url
from lazyfs.peers.model import Kind
from lazyfs.registry.addresses import Reach
from lazyfs.registry.options import Secret
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.registry.select import select_platform

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from lazyfs.image.digest import Digest
    from lazyfs.mirror.contentstore import ContentStore
    from lazyfs.mirror.download import Download
    from lazyfs.mirror.files import Files
    from lazyfs.mirror.pieces import Blobs
    from lazyfs.peers.jobs import Progress, Task
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.place import Document

_BLOBS_AT_ONCE: Final = 3            # as containerd: each has 32 MiB on its way
_PROGRESS_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Preheating:
    """See the module. `options`: of registries; for tasks with a credential of their own."""

    blobs: Blobs
    upstream: Upstream
    options: RegistryOptions
    content: ContentStore
    files: Files

    async def do(self, task: Task, progress: Progress) -> bool:
        """peers.jobs.Doing."""
        if task.kind == "file":
            headers = {"authorization": task.authorization} if task.authorization else {}
            async with self.files.kept(Target(check_url(task.source), headers, Reach.PRIVATE)) as download:
                await _all_of(download, lambda done: progress.show(done, download.resource.size))
            return True
        reference = parse_reference(task.source)
        if not isinstance(reference, RegistryReference):
            raise UsageError("expected an image of a registry")
        async with self._asking(task) as upstream:
            document = await self._manifest(upstream, reference, task.platform)
            if is_lazy(parse_manifest(document.data, document.media_type)):
                return False
            await self._blobs_of(upstream, reference, dict(listed_in(document.data)), progress)
        return True

    @asynccontextmanager
    async def _asking(self, task: Task) -> AsyncIterator[Upstream]:
        if not task.authorization:
            yield self.upstream
            return
        upstream = Upstream(replace(self.options, shown=Secret(task.authorization)))
        try:
            yield upstream
        finally:
            upstream.close()

    async def _manifest(self, upstream: Upstream, reference: RegistryReference, platform: str) -> Document:
        """Of the image itself: an index is followed to this node's platform."""
        document = await _in_thread(partial(upstream.manifest, reference, reference.digest))
        if is_index(document.media_type, document.data):
            chosen = select_platform(parse_index(document.data, document.media_type), platform or None,
                                     name=reference.text)
            document = await _in_thread(partial(upstream.manifest, reference, chosen.digest))
        return document

    async def _blobs_of(self, upstream: Upstream, reference: RegistryReference, listed: dict[Digest, int],
                        progress: Progress) -> None:
        """Raises LazyfsError: of the first blob that cannot be had."""
        limit = trio.CapacityLimiter(_BLOBS_AT_ONCE)
        done = dict.fromkeys(listed, 0)
        failures: list[LazyfsError] = []

        async def fetch(digest: Digest, size: int, scope: trio.CancelScope) -> None:
            def show(count: int) -> None:
                done[digest] = count
                progress.show(sum(done.values()), sum(listed.values()))

            async with limit:
                try:
                    if size and not self._is_in_containerd(digest, size):
                        resource = resource_of(Kind.BLOB, digest, size)
                        async with self.blobs.open(resource, RegistryBlob(upstream, reference, digest)) as download:
                            await _all_of(download, show)
                    show(size)
                except LazyfsError as error:
                    failures.append(error)
                    scope.cancel()

        async with trio.open_nursery() as nursery:
            for digest, size in listed.items():
                nursery.start_soon(fetch, digest, size, nursery.cancel_scope)
        if failures:
            raise failures[0].with_traceback(None)

    def _is_in_containerd(self, digest: Digest, size: int) -> bool:
        opened = self.content.open(digest, size)
        if opened is not None:
            opened.close()
        return opened is not None


async def _all_of(download: Download, show: Callable[[int], None]) -> None:
    """All of it, checked. Raises LazyfsError."""
    async def look() -> None:
        while True:
            show(min(download.file.present_count * download.resource.piece_size, download.resource.size))
            await trio.sleep(_PROGRESS_S)

    failures: list[LazyfsError] = []
    download.want_all()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        try:
            await download.wait(0, whole=True)
        except LazyfsError as error:
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]


async def _in_thread(ask: Callable[[], Document]) -> Document:
    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)

