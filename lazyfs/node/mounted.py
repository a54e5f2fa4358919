"""
One mounted image in the worker: what it holds, and how it lets go of it.

Layer: node. Who calls: node.worker, on the trio loop.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lazyfs.cache.inventory import ImageRecord
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.hotview import HotDevice, HotView
from lazyfs.fs import drivers
from lazyfs.node.recorder import TOUCH_COUNT_MAX, TOUCH_COUNT_RECORDING_MAX, Recorder
from lazyfs.node.rundir import MountRecord

if TYPE_CHECKING:
    import mmap
    from collections.abc import Awaitable, Sequence
    from pathlib import Path

    import trio

    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.device import Blob
    from lazyfs.fetch.engine import CopyHandle, Fetcher, PrefetchHandle
    from lazyfs.fs.drivers import Driver
    from lazyfs.fs.served import Served
    from lazyfs.node.hotstart import HotStart
    from lazyfs.node.opening import OpenedImage
    from lazyfs.node.order import MountOrder
    from lazyfs.node.rundir import ProcessIdentity


@dataclass(frozen=True, slots=True, eq=False)
class LazyDevice:
    """A layer device of one mounted image, as fs.served wants it."""

    fetcher: Fetcher
    device: FetchDevice
    read_timeout_s: float
    recorder: Recorder
    number: int                  # in the recorder
    seen: mmap.mmap = field(init=False)
    seen_shift: int = field(init=False)
    waiting: set[trio.CancelScope] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Looked up once: every read asks whether it is new to the recorder."""
        object.__setattr__(self, "seen", self.recorder.seen[self.number])
        object.__setattr__(self, "seen_shift", self.recorder.shifts[self.number])

    @property
    def size(self) -> int:
        return self.device.size

    def read_now(self, offset: int, size: int, pid: int = 0) -> bytes | None:
        """The short way for what was read before: the fetcher itself counts first touches and sees to misses."""
        device = self.device
        end = offset + size
        if device.hot is not None:
            device.hot.hot.count_read(pid)
        if self.seen.find(b"\0", offset >> self.seen_shift, ((end - 1) >> self.seen_shift) + 1) >= 0:
            self.recorder.note(self.number, offset, size, pid)
        # asked even if the recorder knows it: a read that has to wait comes here twice
        fresh = device.touched.find(0, offset >> device.shift, ((end - 1) >> device.shift) + 1) >= 0
        data = None if fresh else device.cached.read_if_present(offset, size)
        if data is None and device.hot is not None:
            data = device.hot.read_now(offset, size)
            self.fetcher.statistics.hot_reads += data is not None
        if data is not None:
            self.fetcher.statistics.hits += 1
        return data

    def read(self, offset: int, size: int, deadline: float) -> Awaitable[bytes | memoryview]:
        return self.fetcher.read(self.device, offset, size, deadline=deadline)


@dataclass(slots=True, eq=False)
class MountedImage:
    """
    A mount and what it keeps open.

    Attributes:
        device_indexes: its files dev/<index>, in order; -1: the kernel reads that device directly from the cache.
        hot: its hot device; None: there is none, or all layer devices were complete when it was opened.
        start: while the kernel is to read nothing ahead, because the image starts from its hot part.
        bdi_names: of its EROFS mount, under /sys/class/bdi.
        detached: taken from its directory while still in use; served until it is not.
        local: everything is cached, and read-ahead was set accordingly.
        plan_from: where what is fetched ahead comes from (node.prefetching); "": nothing is, or it is not known yet.
        resting: no container uses it.
        read_before: it is on record that somebody has read from it.
        copy: its copy in the background, if that is made from this mount (node.fullcopy).
        attempted: the kernel was asked to mount: there may be something to unmount.

    """

    order: MountOrder
    slot: int
    opened: OpenedImage
    driver: Driver
    devices: list[LazyDevice] = field(default_factory=list)
    recorder: Recorder = field(default_factory=lambda: Recorder(()))
    hot: HotDevice | None = None
    start: HotStart | None = None
    device_indexes: list[int] = field(default_factory=list)
    bdi_names: list[str] = field(default_factory=list)
    prefetch: PrefetchHandle | None = None
    copy: CopyHandle | None = None
    read_before: bool = False
    mount_id: int = 0
    attempted: bool = False
    detached: bool = False
    local: bool = False
    plan_from: str = ""
    resting: bool = False

    def is_for(self, order: MountOrder) -> bool:
        """Whether this is the image that `order` wants."""
        return order.image == self.order.image and (order.layer is None or order.layer == self.order.layer)

    def in_use(self, served: Served) -> bool:
        """Whether somebody still reads through us."""
        ours = (index for index in self.device_indexes if index >= 0)
        return any(map(served.device_in_use, ours)) or served.image_in_use(self.slot)

    def record(self, worker: ProcessIdentity, cache_dir: Path) -> MountRecord:
        """What a worker that takes over must know."""
        layer = self.opened.layer
        return MountRecord(
            self.order.target, self.order.image, str(self.driver), str(layer.digest), str(cache_dir), self.slot,
            worker.pid, worker.start_ticks, worker.boot_id, self.mount_id, layer.size, layer.raw_size,
            list(self.device_indexes), list(self.bdi_names), self.detached, self.order.to_json(),
            self.was_read,
        )

    def fetch_devices(self) -> list[FetchDevice]:
        """Those of its layers, and the hot one."""
        return [*(one.device for one in self.devices), *([] if self.hot is None else [self.hot.device])]

    @property
    def was_read(self) -> bool:
        """Whether anybody has read from it, through this worker or one before."""
        return self.read_before or self.recorder.count > 0

    def tend_read_ahead(self) -> None:
        """More when its start is over, and more again when all of it is here."""
        if not self.local and self.complete():
            self.local, size_kib = True, drivers.READ_AHEAD_LOCAL_KIB
        elif self._start_is_over():
            size_kib = drivers.READ_AHEAD_STARTING_KIB
        else:
            return
        drivers.set_read_ahead(self.bdi_names, size_kib, ours=self.start is not None)
        self.start = None

    def _start_is_over(self) -> bool:
        if self.start is None or self.hot is None:
            return False
        cold_bytes = sum(one.device.touched.count(1) * one.device.table.chunk_size for one in self.devices)
        return self.start.is_over(self.hot.read_count, cold_bytes)

    def complete(self) -> bool:
        return all(device.device.cached.complete for device in self.devices)

    def abort_reads(self) -> None:
        """End all reads that wait, with an errno: an umount would wait for them in the kernel."""
        for device in self.devices:
            for scope in device.waiting:
                scope.cancel()

    def release(self, served: Served) -> None:
        """Stop serving it; reads that wait end. Its inodes then answer ESTALE."""
        self.abort_reads()
        for handle in (self.prefetch, self.copy):
            if handle is not None:
                handle.cancel()
        for index in self.device_indexes:
            if index >= 0:
                served.remove_device(index)
        if self.slot in served.images:
            served.remove_image(self.slot)
        if self.devices:
            self.devices[0].fetcher.peering.leave(self.fetch_devices())
        for device in self.devices:
            device.device.cached.release()
        self.devices.clear()
        if self.hot is not None:
            self.hot.device.cached.release()
            self.hot = None
        self.device_indexes.clear()
        with contextlib.suppress(OSError):
            os.utime(self.opened.erofs_path)   # when it was used last, for `lazyfs cache ls`
        self.opened.close()

    def describe(self) -> dict[str, Any]:
        """For `list`: JSON."""
        return {
            "image": self.order.image,
            "target": self.order.target,
            "driver": str(self.driver),
            "bootstrap": str(self.opened.layer.digest),
            "detached": self.detached,
            "complete": self.complete(),
            "touched_stored_bytes": sum(device.touched_stored_bytes for device in self.fetch_devices()),
            "device_bytes": sum(device.size for device in self.devices),
            "prefetch_plan": self.plan_from,
            "prefetched_chunks": self.prefetch.fetched_count if self.prefetch else 0,
        }


def open_devices(mounted: MountedImage, cache: CacheDir, fetcher: Fetcher) -> None:
    """Blocking: opens the devices' files in the cache: all or none. Raises CacheError, DiskFullError."""
    opened = mounted.opened
    blobs = [(opened.source, blob.digest, blob.size) for blob in opened.blobs]
    mounted.recorder = recorder = Recorder([table.device_size for _, table in opened.devices],
                                           TOUCH_COUNT_RECORDING_MAX if mounted.order.record else TOUCH_COUNT_MAX)
    try:
        for number, (digest, table) in enumerate(opened.devices):
            cached = cache.device(digest, table.chunk_size, table.device_size)
            try:
                device = FetchDevice(table, cached, blobs)
            except BaseException:
                cached.release()
                raise
            mounted.devices.append(LazyDevice(fetcher, device, mounted.order.read_timeout_s, recorder, number))
        mounted.hot = None if mounted.complete() else _open_hot(opened, cache, blobs)
    except BaseException:
        for one in mounted.devices:
            one.device.cached.release()
        mounted.devices.clear()
        raise
    if mounted.hot is not None:
        for number, one in enumerate(mounted.devices):
            one.device.hot = HotView(mounted.hot, number)
    hot = "" if mounted.hot is None or opened.hot is None else opened.hot.digest.hex
    record = ImageRecord(mounted.order.image, tuple(digest.hex for digest, _ in opened.devices), hot)
    with contextlib.suppress(OSError):   # a full disk; then its files go with the first eviction after the unmount
        record.write(cache.path, opened.layer.digest)


def _open_hot(opened: OpenedImage, cache: CacheDir, blobs: Sequence[Blob]) -> HotDevice | None:
    if opened.hot is None:
        return None
    table = opened.hot.table
    cached = cache.device(opened.hot.digest, table.chunk_size, table.device_size)
    try:
        return HotDevice(FetchDevice(table, cached, blobs), opened.hot.extents)
    except BaseException:
        cached.release()
        raise


def hot_plan(mounted: MountedImage) -> list[tuple[FetchDevice, int]]:
    """What a start wants and is not there, in the order in which it wants it: chunks of the hot device."""
    if mounted.hot is None:
        return []
    wanted = mounted.hot.wanted_chunks([one.device for one in mounted.devices])
    return [(mounted.hot.device, index) for index in wanted]
