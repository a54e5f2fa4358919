"""
Making a mount: devices, records, the kernel; and driver fuse where the kernel does not take the erofs way.

Layer: node. Who calls: node.worker, on the trio loop; what blocks goes to threads, what may hang to the mounter
(fs.mounter). Invariant: a record is written before the kernel is asked, so that there is always somebody who knows
what is to be unmounted, or taken over. A mount that fails is undone by the caller.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.errors import HostError, TargetError
from lazyfs.fs import drivers, mountapi
from lazyfs.fs.drivers import Driver
from lazyfs.node.hotstart import HotStart
from lazyfs.node.mounted import MountedImage, open_devices
from lazyfs.node.opening import store_tree
from lazyfs.node.warming import Warming

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.fs.mounter import MounterClient
    from lazyfs.fs.served import Served
    from lazyfs.image.erofs import ErofsImage
    from lazyfs.node.housekeeping import Housekeeper
    from lazyfs.node.rundir import ProcessIdentity, WorkerDir

MOUNT_TIMEOUT_S = 30.0           # one mount or umount call in the kernel
_log = logging.getLogger("lazyfs.node")


class Mounting:
    """Of one worker."""

    def __init__(
        self, directory: WorkerDir, cache: CacheDir, fetcher: Fetcher, served: Served, mounter: MounterClient,
        *, identity: ProcessIdentity, housekeeper: Housekeeper, on_lost: Callable[[], None],
    ) -> None:
        """`identity`: of this process. `on_lost`: called when the mounter process is gone."""
        self._directory = directory
        self._cache = cache
        self._fetcher = fetcher
        self._served = served
        self._mounter = mounter
        self._housekeeper = housekeeper
        self._on_lost = on_lost
        self._one_call = trio.CapacityLimiter(1)
        self._identity = identity
        self.warming = Warming()

    async def attach(
        self, mounted: MountedImage, erofs: bytes | memoryview, fetch_ahead: Callable[[MountedImage], None]
    ) -> None:
        """
        Mount it on its target.

        Args:
            mounted: opened by open_tables().
            erofs: its EROFS image, unchecked.
            fetch_ahead: called as soon as that can begin: data comes while the tree is checked, and mounted.

        Raises:
            LazyfsError: not possible; devices, numbers, records and perhaps a mount are left for the caller to undo.

        """
        await self._housekeeper.with_room(open_devices, mounted, self._cache, self._fetcher)
        self._fetcher.peering.use(mounted.fetch_devices(), mounted.order)
        fetch_ahead(mounted)
        try:
            mounted.opened, tree = await self._housekeeper.with_room(store_tree, mounted.opened, erofs, mounted.order)
            if mounted.driver is Driver.EROFS and mounted.hot is not None:
                order = mounted.order
                mounted.start = HotStart() if order.prefetch and not order.record else None
            self.warming.prepare(mounted, tree)
            del tree
            await self._attach(mounted)
        except BaseException:
            self.warming.forget(mounted)
            raise
        self.warming.begin(mounted)

    async def _attach(self, mounted: MountedImage) -> None:
        if mounted.driver is Driver.EROFS:
            try:
                await self._mount_erofs(mounted)
            except HostError as error:
                if mounted.order.driver != "auto":
                    raise
                # tmpfs and overlayfs cannot be mounted from, and only the kernel knows which others cannot
                _log.warning("%s is served by driver fuse: %s", mounted.order.target, error)
                await self._turn_to_fuse(mounted)
        if mounted.driver is Driver.FUSE:
            await self._mount_tree(mounted)
        order = mounted.order
        entry = mountapi.mount_at(order.target)
        if entry is None:
            raise TargetError(f"{order.target} was unmounted while it was being mounted")
        mounted.mount_id = entry.mount_id
        if order.record and mounted.driver is Driver.FUSE:
            drivers.set_read_ahead([entry.device], drivers.READ_AHEAD_RECORDING_KIB)   # of all images of this worker
        self._write_record(mounted)

    async def unmount(self, mounted: MountedImage, flags: int) -> None:
        """Have its target unmounted, with none of our own files open below it. Raises as call()."""
        await self.warming.stop(mounted)
        await self.call("unmount", mounted.order.target, flags)

    async def call(self, name: str, *arguments: Any) -> Any:
        """
        Have the mounter do it, one call at a time.

        Raises:
            LazyfsError: as fs.mounter says; `on_lost` was called if it is gone.

        """
        def call() -> Any:
            return self._mounter.call(name, *arguments, timeout_s=MOUNT_TIMEOUT_S)

        try:
            return await trio.to_thread.run_sync(call, limiter=self._one_call)
        finally:
            if self._mounter.lost:
                self._on_lost()

    async def _mount_erofs(self, mounted: MountedImage) -> None:
        paths = await self._device_paths(mounted)
        mounted.local = all(index < 0 for index in mounted.device_indexes)
        self._note(mounted)
        target = mounted.order.target
        one_page = mounted.order.record or mounted.start is not None
        for last in (False, False, False, True):
            mounted.bdi_names = await self.call(
                "mount_erofs", str(mounted.opened.erofs_path), target, paths)
            if last or not one_page or len(mounted.bdi_names) == 1:
                break
            await self.call("unmount", target, 0)   # whose is whose? others' mounts must not get our read-ahead
        if len(mounted.bdi_names) != 1 and not mounted.order.record:
            mounted.start = None
        size_kib = drivers.READ_AHEAD_NATIVE_KIB if mounted.local else drivers.READ_AHEAD_STARTING_KIB
        if mounted.start is not None:
            size_kib = drivers.READ_AHEAD_HOT_KIB
        drivers.set_read_ahead(
            mounted.bdi_names, drivers.READ_AHEAD_RECORDING_KIB if mounted.order.record else size_kib)

    async def _mount_tree(self, mounted: MountedImage) -> None:
        # what is recorded is what was read, not what was opened
        image = self._served.add_image(
            mounted.slot, mounted.opened.tree, tuple(mounted.devices), giving=not mounted.order.record)
        self._note(mounted)
        source = self._directory.fuse / "tree" / os.fsdecode(image.name)
        await self.call("mount_tree", str(source), mounted.order.target)

    async def _turn_to_fuse(self, mounted: MountedImage) -> None:
        """What was opened for driver erofs, for driver fuse instead."""
        def parse() -> ErofsImage:
            return mounted.opened.tree

        for index in mounted.device_indexes:
            self._served.remove_device(index)
        mounted.device_indexes.clear()
        mounted.local = False
        mounted.start = None    # one bdi for all images of this worker: it stays as it is
        mounted.opened = replace(mounted.opened, parsed=await trio.to_thread.run_sync(parse))
        mounted.driver = Driver.FUSE

    def _note(self, mounted: MountedImage) -> None:
        """Before the kernel is asked to mount: from now on there may be something to unmount, or to take over."""
        self._directory.write_numbers(*self._served.next_numbers)
        self._write_record(mounted)
        mounted.attempted = True

    def _write_record(self, mounted: MountedImage) -> None:
        self._directory.write_record(mounted.record(self._identity, self._cache.path))

    async def _device_paths(self, mounted: MountedImage) -> list[str]:
        """The files that the kernel's EROFS reads: ours, or the cache's own where a device is complete."""
        paths = []
        for device in mounted.devices:
            local = not mounted.order.record and device.device.cached.complete
            if local and await trio.to_thread.run_sync(device.device.cached.make_durable):
                paths.append(_short_path(str(device.device.cached.data_path), device.device.cached.fd))
                mounted.device_indexes.append(-1)
            else:
                index = self._served.add_device(device)
                mounted.device_indexes.append(index)
                paths.append(str(self._directory.fuse / "dev" / str(index)))
        return paths


def _short_path(path: str, descriptor: int) -> str:
    """A path that fits a mount option; through this process's descriptor if the real one does not."""
    if len(os.fsencode(path)) <= mountapi.FSCONFIG_STRING_BYTES_MAX:
        return path
    return f"/proc/{os.getpid()}/fd/{descriptor}"
