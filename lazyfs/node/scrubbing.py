"""
Looking through the cache for damage, by and by: when each device's turn is, and what becomes of what was found.

A damaged chunk is not present any more (cache.scrub), so the next read fetches it: of a device that is served through
us. A device that the kernel reads natively asks nobody, so its missing chunks are fetched here, at once, verified as
all are, and written into the very file that is mounted (nothing of it is ever cut or made a hole: what the kernel
reads meanwhile is the damage, or the right bytes). Then the kernel is asked to forget the pages of the image's files
that it made of the damage; those that a program has mapped stay until it ends.

Layer: node. Who calls: node.worker has one Scrubbing; node.control passes on SCRUB. On the trio loop; what blocks goes
to one thread. State: none but counters: what is to be repaired is seen from what is not present.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

import trio

from lazyfs import limits
from lazyfs.cache import scrub
from lazyfs.errors import LazyfsError, UsageError
from lazyfs.fs.drivers import Driver
from lazyfs.image.digest import Digest
from lazyfs.image.model import FileType
from lazyfs.node.housekeeping import configured_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lazyfs import config
    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.image.erofs import ErofsImage
    from lazyfs.node.mounted import LazyDevice, MountedImage

_LOOK_S = 60.0                   # between two looks at what is due, and at what is to be repaired
_REPAIR_COUNT_MAX = 256          # chunks of a device in one go; the rest a look later
_log = logging.getLogger("lazyfs.node")


class Scrubbing:
    """Of one worker."""

    def __init__(self, cache: CacheDir, fetcher: Fetcher, mounts: Callable[[], Iterable[MountedImage]]) -> None:
        """`mounts`: all that are served, attached or not."""
        self._cache = cache
        self._fetcher = fetcher
        self._mounts = mounts
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._stop = False
        self._now = ""                   # hex of the device that is being looked at in the background
        self.scrubbed_bytes = 0
        self.repaired_chunks = 0         # of devices that the kernel reads natively

    async def run(self, configured: config.Cache | None = None) -> None:
        """In the background, for ever. `configured`: None reads it."""
        if configured is None:
            configured = await trio.to_thread.run_sync(configured_cache)
        try:
            while True:
                await trio.sleep(min(_LOOK_S, configured.scrub_interval_s or _LOOK_S))
                await self.repair()
                if configured.scrub_interval_s:
                    await self._run_due(configured.scrub_interval_s, configured.scrub_rate)
        finally:
            self._stop = True

    async def piece(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """
        Look at a piece of a device for somebody who asks (control operation SCRUB).

        Args:
            request: `device`: its digest; `first`: the chunk to begin with; `rate`: bytes/s, 0: no bound.

        Raises:
            UsageError, FormatError: malformed. CacheError: its files cannot be opened.

        """
        try:
            name, first, rate = Digest(str(request["device"])).hex, int(request["first"]), int(request["rate"])
        except (LookupError, TypeError, ValueError) as error:
            raise UsageError(f"malformed request to scrub: {error}") from error
        return (await self._look(name, max(0, first), max(0, rate))).to_json()

    async def repair(self) -> None:
        """Fetch what devices that the kernel reads natively have lost. What cannot be had now is tried again later."""
        for mounted in list(self._mounts()):
            for number, device in enumerate(list(mounted.devices)):
                if mounted.device_indexes[number : number + 1] == [-1] and not device.device.cached.complete:
                    await self._repair(mounted, number, device)

    def describe(self) -> dict[str, Any]:
        """For `stats`."""
        return {"scrubbing": self._now and f"sha256:{self._now}", "scrubbed_bytes": self.scrubbed_bytes,
                "repaired_chunks": self.repaired_chunks}

    async def _run_due(self, interval_s: float, rate: int) -> None:
        for name in await trio.to_thread.run_sync(scrub.due, self._cache.path, interval_s, time.time()):
            try:
                first = 0
                self._now = name
                while (piece := await self._look(name, first, rate)).next < piece.count:
                    first = piece.next
            except LazyfsError as error:
                _log.warning("device %s not looked through: %s", name[:12], error)
            finally:
                self._now = ""

    async def _look(self, name: str, first: int, rate: int) -> scrub.Piece:
        def look() -> scrub.Piece:
            return scrub.scrub_piece(self._cache, name, first, rate, lambda: self._stop)

        piece = await trio.to_thread.run_sync(look, limiter=self._one_at_a_time)
        self.scrubbed_bytes += piece.checked_bytes
        if piece.damaged:
            await self.repair()
        return piece

    async def _repair(self, mounted: MountedImage, number: int, device: LazyDevice) -> None:
        cached, size = device.device.cached, device.device.table.chunk_size
        if not cached.try_retain():
            return    # unmounted meanwhile
        try:
            lost = cached.missing(0, cached.chunk_count - 1)[:_REPAIR_COUNT_MAX]
            for index in lost:
                await self._fetch(device, index * size, min(size, device.size - index * size))
            there = [index for index in lost if cached.present(index, index)]
            await trio.to_thread.run_sync(cached.checkpoint)
            await self._forget_pages(mounted, number, [(index * size, (index + 1) * size) for index in there])
        except (LazyfsError, OSError) as error:
            _log.error("%s: the kernel reads damaged data of device %s until it can be fetched again: %s",
                       mounted.order.target, cached.digest.short, error)
        else:
            self.repaired_chunks += len(there)
            _log.warning("%s: %d damaged chunks of device %s were fetched again and written in place",
                         mounted.order.target, len(there), cached.digest.short)
        finally:
            cached.release()

    async def _fetch(self, device: LazyDevice, offset: int, size: int) -> None:
        deadline = time.monotonic() + limits.READ_DEADLINE_S
        await self._fetcher.read(device.device, offset, size, deadline=deadline)

    async def _forget_pages(self, mounted: MountedImage, number: int, ranges: list[tuple[int, int]]) -> None:
        if ranges and mounted.driver is Driver.EROFS and not mounted.detached:
            root, opened = os.fsencode(mounted.order.target), mounted.opened
            await trio.to_thread.run_sync(lambda: forget_pages(root, opened.tree, number, ranges))


def forget_pages(root: bytes, tree: ErofsImage, device: int, ranges: list[tuple[int, int]]) -> int:
    """
    Have the kernel drop its clean pages of all files of a mounted image that have bytes in ranges of a device.

    Args:
        root: where the image is mounted.
        tree: of the image.
        device: its number in the image.
        ranges: (start, end) in the device, bytes.

    Returns:
        How many ranges of files that was. Blocking; what cannot be opened is left out.

    """
    mount, done = os.stat(root).st_dev, 0    # noqa: PTH116 - bytes
    for path, pieces in _files_in(tree, device, ranges):
        try:
            fd = os.open(root + b"/" + path.lstrip(b"/"),
                         os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME)
        except OSError:
            continue
        try:
            if os.fstat(fd).st_dev == mount:
                for start, size in pieces:
                    os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)
                    done += 1
        finally:
            os.close(fd)
    return done


def _files_in(
    tree: ErofsImage, device: int, ranges: list[tuple[int, int]]
) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
    """Path, and (offset, size) in the file, of all files with bytes in the ranges; each inode once."""
    seen: set[int] = set()
    for path, nid in tree.walk():
        if nid in seen or tree.stat(nid).type is not FileType.REGULAR:
            continue
        seen.add(nid)
        pieces, position = [], 0
        for number, start, size in tree.extents(nid, 0, tree.size(nid)):
            if number == device and any(start < high and low < start + size for low, high in ranges):
                pieces.append((position, size))
            position += size
        if pieces:
            yield path, pieces
