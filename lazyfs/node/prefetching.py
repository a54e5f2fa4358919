"""
What is fetched ahead of the images of one worker: where its plan comes from, when it begins, when it stops.

The plan is the image's hot part. An image without one is asked about in its registry (node.listed): after the mount, in
the background, few at a time; whatever goes wrong there is one line of the debug log.

Layer: node. Who calls: node.mounting, node.worker, node.control (`rest`); on the trio loop. State: the images that wait
to be asked about; else all of it is in MountedImage (`prefetch`, `plan_from`, `resting`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import LazyfsError
from lazyfs.fetch.engine import FetchLimits
from lazyfs.node.mounted import hot_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lazyfs.config import Daemon
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.node.mounted import MountedImage

HOT, LISTED, NONE = "hot", "list", "none"
_WAITING_COUNT_MAX = 1024     # images: more are not mounted at once; those beyond have no list
_LOOK_COUNT_MAX = 4           # at a time: a registry that hangs must not hold up the others' for long
_GROUP_COUNT = 16             # chunks of a list that may change places, so that neighbours are one request
_log = logging.getLogger("lazyfs.node")


def bounds_of(settings: Daemon) -> FetchLimits:
    """The fetcher's, by the configuration."""
    return FetchLimits(prefetch_streams=settings.prefetch_streams, prefetch_rate=settings.prefetch_rate,
                       prefetch_bytes_max=settings.prefetch_max_bytes)


class Prefetching:
    """See the module."""

    def __init__(self, fetcher: Fetcher, cache_path: Path, *, lists: bool) -> None:
        """`lists`: whether to ask for lists at all."""
        self._fetcher = fetcher
        self._cache_path = cache_path
        self._lists = lists
        self._asking: set[MountedImage] = set()
        self._threads = trio.CapacityLimiter(_LOOK_COUNT_MAX)
        self._send, self._receive = trio.open_memory_channel["MountedImage"](_WAITING_COUNT_MAX)

    def begin_hot(self, mounted: MountedImage) -> None:
        """Fetch the hot part of an image that is being mounted; one without is asked about when it is mounted."""
        if mounted.order.prefetch and mounted.opened.hot is not None and mounted.prefetch is None:
            mounted.plan_from = HOT
            mounted.prefetch = self._fetcher.prefetch(hot_plan(mounted))

    def begin(self, mounted: MountedImage) -> None:
        """Fetch ahead of an image that has just been mounted, or gets another container. Cheap where that was done."""
        mounted.resting = False
        handle = mounted.prefetch
        if not mounted.order.prefetch or mounted in self._asking or (handle is not None and not handle.cancelled):
            return
        if mounted.opened.hot is not None:
            mounted.plan_from = HOT
            mounted.prefetch = self._fetcher.prefetch(hot_plan(mounted))
        elif self._lists and not mounted.order.record and not mounted.complete():
            self._asking.add(mounted)
            try:
                self._send.send_nowait(mounted)
            except trio.WouldBlock:
                self._asking.discard(mounted)

    @staticmethod
    def rest(mounted: MountedImage) -> bool:
        """No container uses it any more: no further request is made ahead of it. False: nothing was under way."""
        mounted.resting = True
        handle = mounted.prefetch
        if handle is None or handle.done or handle.cancelled:
            return False
        handle.cancel()
        return True

    async def run(self) -> None:
        """Look for lists, for ever."""
        async with trio.open_nursery() as nursery:
            async for mounted in self._receive:
                nursery.start_soon(self._look, mounted)

    async def _look(self, mounted: MountedImage) -> None:
        from lazyfs.node import listed  # noqa: PLC0415 - most images have a hot part

        try:
            chunks = await trio.to_thread.run_sync(
                listed.find_plan, mounted.order, mounted.opened, self._cache_path, limiter=self._threads,
                abandon_on_cancel=True)
        except LazyfsError as error:
            _log.debug("%s: no prefetch list: %s", mounted.order.image, error)
            return
        except Exception as error:  # noqa: BLE001 - a list is no more than advice: nothing may end with it
            _log.debug("%s: no prefetch list: %s", mounted.order.image, type(error).__name__)
            return
        finally:
            self._asking.discard(mounted)
        mounted.plan_from = LISTED if chunks else NONE
        if chunks and mounted.devices and not mounted.resting:
            mounted.prefetch = self._fetcher.prefetch(_in_groups(mounted, chunks))


def _in_groups(mounted: MountedImage, chunks: Sequence[tuple[int, int]]) -> list[tuple[FetchDevice, int]]:
    """In the list's order, but for neighbours in a blob that are wanted at nearly the same time."""
    plan: list[tuple[FetchDevice, int]] = []
    for start in range(0, len(chunks), _GROUP_COUNT):
        group = sorted((device, int(mounted.opened.devices[device][1].rows["blob_offset"][index]), index)
                       for device, index in chunks[start : start + _GROUP_COUNT])
        plan += [(mounted.devices[device].device, index) for device, _, index in group]
    return plan
