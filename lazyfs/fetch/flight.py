"""
A chunk on its way: the one object that all its waiters and its transfer share.

Life: queued (in a FlightQueue, or in a prefetch window about to start) -> in a transfer (a thread works on it) ->
done (landed, or failed), perhaps after rounds of trying again. It is in Fetcher's map from its making to its end.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from lazyfs.errors import LazyfsError
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.transfer import Transfer
    from lazyfs.image.digest import Digest
    from lazyfs.registry.place import ImageSource


class Flight:
    """
    Written by the loop, but for `done`, `data`, `checked` and `bad`, which the transfer's thread sets.

    No lost wake-up: the thread sets `done` and then looks at `event`; a waiter makes the event and then looks at
    `done`. Under the interpreter lock one of them sees the other. Who waits for `checked` is woken by `done` as well.

    :waiters: reads that want it, whether they sleep on it or on one of its neighbours.
    :wanted: a read has asked for it; without waiters it is abandoned then, and not tried again.
    :event: made by the first read that sleeps on it.
    :stored_start, stored_size: where in `blob`, bytes.
    :deadline: the latest of all its waiters', time.monotonic() seconds.
    :data: the chunk's bytes, when it is done but could not be stored.
    :checked: its bytes while they are being stored, if somebody waits for no more than that their digest is good.
    :early: made by the first who does.
    :last_error: of the last attempt that failed; the reason to give when the time runs out.
    :bad: what was wrong with the bytes of the last attempt.
    :window: the transfer of a prefetch window that it was made for; else None.
    :overtaken: another flight of the same chunk was begun, which will be sooner.
    :request: the first read that waited for it (lazyfs.requestid); empty: for none.
    :server: which server gave its bytes, of the last attempt; empty: none has answered.
    :made_at, begun_at, answered_at, received_at, decoded_at, settled_at: of the last attempt, time.monotonic() seconds;
        0.0: it did not come so far.
    """

    __slots__ = (
        "answered_at", "attempt_count", "bad", "bad_count", "begun_at", "blob", "checked", "codec", "data", "deadline",
        "decoded_at", "device", "digest", "done", "early", "error", "event", "index", "last_error", "made_at",
        "overtaken", "received_at", "request", "server", "settled_at", "size", "source", "stored_size", "stored_start",
        "waiters", "wanted", "window",
    )  # fmt: skip

    def __init__(self, device: FetchDevice, index: int, deadline: float) -> None:
        row = device.table.rows[index].item()
        self.stored_start: int
        self.stored_size: int
        self.codec: int
        self.digest: bytes
        self.stored_start, self.stored_size, blob_index, self.codec, _, self.digest = row
        self.source: ImageSource
        self.blob: Digest
        self.source, self.blob, _ = device.blobs[blob_index]
        self.device = device
        self.index = index
        self.size = device.table.chunk_bytes(index)
        self.deadline = deadline
        self.waiters = 0
        self.wanted = False
        self.done = False
        self.data: bytes | memoryview | None = None
        self.error: LazyfsError | None = None
        self.bad: LazyfsError | None = None
        self.bad_count = 0
        self.last_error: LazyfsError | None = None
        self.attempt_count = 0
        self.event: trio.Event | None = None
        self.checked: bytes | memoryview | None = None
        self.early: trio.Event | None = None
        self.window: Transfer | None = None
        self.overtaken = False
        self.request = ""
        self.server = ""
        self.made_at = time.monotonic()
        self.begun_at = self.answered_at = self.received_at = self.decoded_at = self.settled_at = 0.0

    @property
    def stored_end(self) -> int:
        return self.stored_start + self.stored_size

    def wake(self) -> None:
        """On the loop, once done."""
        self.checked = None
        if self.event is not None:
            self.event.set()
        self.tell()

    def tell(self) -> None:
        """On the loop, once its bytes are `checked`, or it is done."""
        if self.early is not None:
            self.early.set()

    def fail(self, error: LazyfsError) -> None:
        """On the loop."""
        self.error = error
        self.done = True
        self.wake()

    async def wait(self) -> None:
        """Until done. Checkpoint: only if it is not done yet; on cancel: the transfer goes on."""
        if self.event is None:
            self.event = trio.Event()
        if not self.done:
            await self.event.wait()

    async def wait_checked(self) -> None:
        """Until its bytes are good, which may be before they are stored, or until done. Otherwise as `wait`."""
        if self.early is None:
            self.early = trio.Event()
        if not self.done and self.checked is None:
            await self.early.wait()
