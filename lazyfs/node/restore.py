"""
From a record to a mount that is served again: by the worker that takes over from one that died or stepped aside.

The records say what was mounted where, under which numbers; the cache directory holds bootstraps, EROFS images and
data. No network is needed. Layer: node. Who calls: node.worker.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lazyfs.fs import mountapi
from lazyfs.fs.drivers import Driver
from lazyfs.node.hotstart import HotStart
from lazyfs.node.mounted import MountedImage, open_devices
from lazyfs.node.opening import open_image
from lazyfs.node.order import MountOrder
from lazyfs.node.rundir import read_boot_id
from lazyfs.node.unmount import is_ours

if TYPE_CHECKING:
    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.fs.mountapi import MountEntry
    from lazyfs.fs.served import Served
    from lazyfs.node.rundir import MountRecord, WorkerDir


class State(enum.Enum):
    """What has become of a record's mount."""

    MOUNTED = enum.auto()
    DETACHED = enum.auto()    # not at its target any more; an overlay, or a process, may still use it
    GONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Broken:
    """A mount that cannot be served now, and why."""

    record: MountRecord
    reason: str

    def describe(self) -> dict[str, Any]:
        return {"target": self.record.target, "image": self.record.image, "reason": self.reason}


def state_of(record: MountRecord, directory: WorkerDir, entries: list[MountEntry] | None = None) -> State:
    """Look at what is mounted (mountinfo only: nothing that can hang). `entries`: who asks for many has looked."""
    if record.boot_id != read_boot_id():
        return State.GONE
    entries = mountapi.mounts() if entries is None else entries
    entry = mountapi.mount_at(record.target, entries)
    if entry is not None and is_ours(record, directory, entries) and record.mount_id in {0, entry.mount_id}:
        return State.MOUNTED
    # mount_id 0: it was never mounted. All devices in the cache: nobody needs us.
    if record.mount_id == 0 or (record.driver == Driver.EROFS and all(index < 0 for index in record.device_indexes)):
        return State.GONE
    return State.DETACHED


def reopen(record: MountRecord, cache: CacheDir, fetcher: Fetcher, offline: bool) -> MountedImage:
    """
    Open a record's image and devices again. Blocking; `offline`: asks no registry.

    Raises:
        LazyfsError: the cache directory does not have it any more, or its files are damaged.

    """
    order = MountOrder.from_record(record.order)
    layer = (record.bootstrap, record.layer_size, record.raw_size)
    order = replace(order, layer=layer, checked=True, seed=None, document=None, driver=record.driver,
                    origin="")
    opened = open_image(order, cache.path, offline=offline)
    mounted = MountedImage(order, record.slot, opened, Driver(record.driver), attempted=True)
    mounted.mount_id, mounted.bdi_names = record.mount_id, list(record.bdi_names)
    try:
        open_devices(mounted, cache, fetcher)
    except BaseException:
        for device in mounted.devices:
            device.device.cached.release()
        opened.close()
        raise
    mounted.recorder.whole = False
    mounted.read_before = record.was_read
    return mounted


def serve(mounted: MountedImage, record: MountRecord, served: Served) -> None:
    """Serve it under the numbers that the kernel knows."""
    mounted.device_indexes = list(record.device_indexes)
    if mounted.driver is Driver.FUSE:
        served.restore_image(mounted.slot, mounted.opened.tree, tuple(mounted.devices))
        return
    for index, device in zip(record.device_indexes, mounted.devices, strict=True):
        if index >= 0:
            served.restore_device(index, device)
    mounted.local = all(index < 0 for index in record.device_indexes)
    if mounted.order.prefetch and mounted.hot is not None and not mounted.order.record and len(mounted.bdi_names) == 1:
        mounted.start = HotStart(begun=True)    # if it was over, its end once more changes nothing
