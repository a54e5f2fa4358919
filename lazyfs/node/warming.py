"""
Hot data into the kernel's page cache as it arrives, so that a start finds it there: the kernel is asked to read exactly
the hot ranges of the image's files, in requests of up to 128 KiB instead of one for each page that the program faults
on: a start of tensorflow took half of the worker's CPU (6.7 -> 3.2 s), one of numpy had 20 major faults, not 2,000.

Layer: node. Who calls: node.worker. Only for driver erofs: there opening a file below the mount asks nobody, and what
POSIX_FADV_WILLNEED starts is not waited for; a thread that waits for room in FUSE's queue can be killed. With driver
fuse an open asks this very process, and a worker that is killed in that moment would not end.

On the trio loop, but for the thread that opens and asks. State: what is being warmed. Invariants: at most one thread an
image, for BATCH_BYTES at a time; after stop() no file below the mount is open. Only a hint: whatever fails is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import LazyfsError
from lazyfs.fs.drivers import Driver
from lazyfs.limits import KIB, MIB
from lazyfs.node.warmplan import WarmPlan, make_warm_plan

if TYPE_CHECKING:
    from lazyfs.image.erofs import ErofsImage
    from lazyfs.node.mounted import MountedImage

STEP_BYTES = 128 * KIB           # of one call: the kernel takes no more than its default read-ahead, and drops the rest
BATCH_BYTES = 2 * MIB            # of one call into a thread: 16 of FUSE's 256 requests in the background
_PAUSE_S = 0.01                  # a link of 1 Gbit/s brings a chunk of 512 KiB in 2 ms to 4 ms
_PAUSE_MAX_S = 0.5               # while nothing arrives
_STOP_S = 5.0                    # a thread ends after the call that it is in
_THREADS_MAX = 2                 # of all images: there is the program's work to do, and ours
_WAITING_COUNT_MAX = 1024
_log = logging.getLogger("lazyfs.node")


class Warm:
    """
    One image's: `stop` tells the thread, `ended` is set when nothing is open any more.

    `mounted`: set when its files may be opened. `tree`: the parsed one, if there is, until the plan is made.
    """

    def __init__(self, tree: ErofsImage | None) -> None:
        self.stop = False
        self.tree = tree
        self.mounted = trio.Event()
        self.ended = trio.Event()

    def end(self) -> None:
        self.stop = True
        self.mounted.set()


class Warming:
    """Of one worker."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel["MountedImage"](_WAITING_COUNT_MAX)
        self._threads = trio.CapacityLimiter(_THREADS_MAX)
        self._warm: dict[MountedImage, Warm] = {}

    def prepare(self, mounted: MountedImage, tree: ErofsImage | None = None) -> None:
        """
        Plan for an image that is about to be mounted and starts from its hot part; others are left alone.

        `tree`: of that image, if it is at hand. To be followed by begin() or forget().
        """
        if mounted.driver is Driver.EROFS and mounted.start is not None and mounted not in self._warm:
            with contextlib.suppress(trio.WouldBlock):
                self._send.send_nowait(mounted)
                self._warm[mounted] = Warm(tree)

    def begin(self, mounted: MountedImage) -> None:
        """Of an image that has just been mounted; or of one that a worker before this one has mounted."""
        if mounted.start is None or mounted.driver is not Driver.EROFS:
            self.forget(mounted)
            return
        self.prepare(mounted)
        if mounted in self._warm:
            self._warm[mounted].mounted.set()

    def forget(self, mounted: MountedImage) -> None:
        """It was not mounted, or does not start from its hot part after all: nothing of it was opened."""
        if mounted in self._warm:
            self._warm[mounted].end()

    async def stop(self, mounted: MountedImage) -> None:
        """No file below it is open afterwards. Checkpoint: perhaps."""
        warm = self._warm.get(mounted)
        if warm is not None:
            warm.end()
            with trio.move_on_after(_STOP_S):
                await warm.ended.wait()

    async def run(self) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            async for mounted in self._receive:
                nursery.start_soon(self._run_one, mounted, self._warm[mounted])

    async def _run_one(self, mounted: MountedImage, warm: Warm) -> None:
        try:
            await self._warm_up(mounted, warm)
        except (LazyfsError, OSError) as error:
            _log.debug("%s: not warmed: %s", mounted.order.target, error)
        finally:
            del self._warm[mounted]
            warm.ended.set()

    async def _warm_up(self, mounted: MountedImage, warm: Warm) -> None:
        hot = mounted.hot
        if hot is None:
            return
        opened, device, extents = mounted.opened, hot.device, hot.extents
        root = os.fsencode(mounted.order.target)

        def plan_it() -> WarmPlan:
            tree, warm.tree = warm.tree or opened.tree, None
            return make_warm_plan(extents, device.table.chunk_size, tree)

        def read(begin: int, end: int) -> None:
            hot.warmer_id = threading.get_native_id()
            ask_for(root, plan, begin, end, warm)

        plan = await trio.to_thread.run_sync(plan_it, abandon_on_cancel=True, limiter=self._threads)
        await warm.mounted.wait()
        position, pause_s = 0, _PAUSE_S
        while position < len(plan.chunks) and not warm.stop:
            end = _batch(plan, position)
            # `hot` of the image goes with its mount
            if mounted.hot is None:
                return
            if device.cached.present(plan.chunks[position], plan.chunks[end - 1]):
                await trio.to_thread.run_sync(read, position, end, abandon_on_cancel=True, limiter=self._threads)
                position, pause_s = end, _PAUSE_S
            elif mounted.prefetch is None or mounted.prefetch.done:
                position = end    # it does not come, or is there as chunks of the layers
            else:
                await mounted.devices[0].fetcher.watch(device, plan.chunks[position], pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)


def _batch(plan: WarmPlan, position: int) -> int:
    """Where a batch ends that begins there: after BATCH_BYTES, or with its chunk."""
    end, size = position + 1, plan.sizes[position]
    while end < len(plan.chunks) and plan.chunks[end] == plan.chunks[position] and size < BATCH_BYTES:
        size += plan.sizes[end]
        end += 1
    return end


def ask_for(root: bytes, plan: WarmPlan, begin: int, end: int, warm: Warm) -> None:
    """Have the kernel read rows `begin` to before `end` of the plan. Blocking; a file that cannot be opened is left."""
    device = os.stat(root).st_dev    # noqa: PTH116 - bytes
    descriptor, opened = -1, -1
    try:
        for row in range(begin, end):
            if warm.stop:
                return
            nid = plan.nids[row]
            if nid != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                opened, descriptor = nid, _open(root + b"/" + plan.paths[nid], device)
            if descriptor >= 0:
                start, stop = plan.starts[row], plan.starts[row] + plan.sizes[row]
                for offset in range(start, stop, STEP_BYTES):
                    os.posix_fadvise(descriptor, offset, min(STEP_BYTES, stop - offset), os.POSIX_FADV_WILLNEED)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: bytes, device: int) -> int:
    """A file of the image, which is on `device`; -1: it is hidden by another mount, or was never there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME)
    except OSError:
        return -1
    if os.fstat(descriptor).st_dev != device:
        os.close(descriptor)
        return -1
    return descriptor
