"""
One full copy of one image: from what is missing to a durable cache. As long as it takes, or until it is told to stop.

Checkpoints: what lands is made durable every CHECKPOINT_BYTES, while the copy goes on; if the disk is so slow that as
much has landed again before that is done, the copy waits for it. So a power cut costs at most twice that, and what is
on its way: 64 MiB.

Layer: node. Who calls: node.fullcopy (in the background), node.fetching (`lazyfs cache fetch`). On the trio loop; what
blocks goes to threads.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import trio

from lazyfs.limits import MIB
from lazyfs.node.copyplan import CopyPlan, Share, distinct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.errors import LazyfsError
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.engine import CopyHandle, CopyTerms, Fetcher

# Stored bytes. 24 + 24 + 4 (a window ends beyond the mark) + 8 (two under way) < 64 MiB. Measured, 192 MiB as quick as
# they go: 8 checkpoints instead of 1 take 0.02 of 0.26 s of CPU, and no more time.
CHECKPOINT_BYTES = 24 * MIB
SAVING = "the disk"              # a reason to hold
_RATE_S = 5.0                    # what "now" means for a rate


class CopyRun:
    """
    A copy under way.

    :holds: why no further window starts, for people; empty: nothing holds it.
    :ended: whether run() is over; then `error` says why it did not get everything, if so.
    """

    def __init__(self, fetcher: Fetcher, devices: Sequence[FetchDevice], terms: CopyTerms) -> None:
        """`devices`: open as long as this runs, or else it ends by itself."""
        self._fetcher = fetcher
        self._devices = distinct(devices)
        self.holds: set[str] = set()
        self.ended = False
        self.error: LazyfsError | None = None
        self._saved_bytes = 0            # handle.landed_bytes when the last checkpoint began
        self._saving = False
        self._landed = trio.Event()
        self._received: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=256)
        self.handle: CopyHandle = fetcher.copy(CopyPlan(self._devices), terms)
        self.handle.on_window = self._window_ended

    async def run(self) -> None:
        """Until all is there and durable, or not to be had now. Checkpoint: yes; on cancel: the copy is stopped."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._save_now_and_then)
                await self.handle.wait()
                nursery.cancel_scope.cancel()
            await self._save()
        finally:
            self.handle.cancel()
            self.error = self.handle.error
            self.ended = True

    def hold(self, reason: str, *, held: bool) -> None:
        """Start no further window for this reason, or no longer for this one."""
        if held == (reason in self.holds):
            return
        if held:
            self.holds.add(reason)
        else:
            self.holds.discard(reason)
        self.handle.hold(held=bool(self.holds))
        if not self.holds:
            self._fetcher.nudge()

    @property
    def share(self) -> Share:
        return Share.of(self._devices)

    @property
    def rate_bytes_s(self) -> float:
        """Received in the last seconds."""
        now = time.monotonic()
        self._received.append((now, self.handle.received_bytes))
        while len(self._received) > 2 and self._received[1][0] < now - _RATE_S:
            self._received.popleft()
        began, before = self._received[0]
        return (self.handle.received_bytes - before) / max(now - began, 0.1)

    def _window_ended(self) -> None:
        self._received.append((time.monotonic(), self.handle.received_bytes))
        unsaved = self.handle.landed_bytes - self._saved_bytes
        if unsaved < CHECKPOINT_BYTES:
            return
        self._landed.set()
        if self._saving:
            self.hold(SAVING, held=True)

    async def _save_now_and_then(self) -> None:
        while True:
            await self._landed.wait()
            self._landed = trio.Event()
            await self._save()

    async def _save(self) -> None:
        self._saving, self._saved_bytes = True, self.handle.landed_bytes
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_checkpoint, self._devices)
        finally:
            self._saving = False
            self.hold(SAVING, held=False)


def _checkpoint(devices: list[FetchDevice]) -> None:
    for device in devices:
        if device.cached.try_retain():
            try:
                device.cached.checkpoint()
            finally:
                device.cached.release()
