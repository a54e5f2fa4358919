"""
The plan of a prefetch: chunks in the order of the hot blob, cut into windows when they start. Who calls: fetch.engine.

A window is one range request: entries of the plan that are neighbours in a blob, skipping those that are present or
on their way when it starts. The next one starts when little enough of the one before is left that the link does not
idle meanwhile (Transfer.is_nearly_done), so one image has one stream as a rule, and more only where its windows are
small, or the way is long. Pure, but for PrefetchHandle.wait.
"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING

import trio

from lazyfs.fetch.constants import PREFETCH_FAILURE_COUNT_MAX, PREFETCH_RATE_MIN, PREFETCH_SCAN_COUNT_MAX
from lazyfs.fetch.transfer import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.errors import LazyfsError
    from lazyfs.fetch.brake import Brake
    from lazyfs.fetch.constants import FetchLimits
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.transfer import Transfer

    Entry = tuple[FetchDevice, int]


class PrefetchHandle:
    """
    A running prefetch, as its caller sees it.

    :fetched_count, skipped_count: chunks; skipped ones were there or on their way already.
    :running: windows under way.
    :error: why it gave up, if it did; its chunks then come when they are read.
    :cancelled: it was; so it may be done without having fetched all.
    :priority: of its windows.
    """

    priority = Priority.PREFETCH

    def __init__(self, plan: Sequence[Entry], bounds: FetchLimits, brake: Brake) -> None:
        """`brake`: what makes its windows wait for others."""
        self._plan = plan
        self._bounds = bounds
        self.brake = brake
        self._window_bytes = bounds.window_bytes_first
        self._left_bytes = bounds.prefetch_bytes_max or sys.maxsize
        self._cursor = 0
        self._again: deque[Entry] = deque()    # of windows that failed; before the rest of the plan
        self._ended = trio.Event()
        self.cancelled = False
        self.running: set[Transfer] = set()
        self.paused_until = 0.0    # trio's clock; after a failure
        self.failure_count = 0     # consecutive
        self.fetched_count = 0
        self.skipped_count = 0
        self.error: LazyfsError | None = None
        self.last_error: LazyfsError | None = None    # of the last window, if that failed

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    async def wait(self) -> None:
        """Until all chunks are there, or it gave up, or was cancelled. Checkpoint: yes; on cancel: goes on."""
        await self._ended.wait()

    def cancel(self) -> None:
        """Start no further window; those under way are given up, unless a read waits for something of theirs."""
        self.cancelled = True
        self._again.clear()
        self._plan = ()
        for window in self.running:
            window.cancelled = not window.is_wanted()
        self.check_end()

    def failed(self, error: LazyfsError, entries: list[Entry], *, counts: bool = True) -> None:
        """A window failed; `entries` of it are wanted still. `counts`: False while the whole source is down."""
        self.failure_count += counts
        self.last_error = error
        if self.failure_count >= PREFETCH_FAILURE_COUNT_MAX:
            self.error = error
            self.cancel()
        if not self.cancelled:
            self.put_back(entries)

    def begin_at_peers(self) -> None:
        """Its next window comes from peers; its size is right for that as it is."""

    def check_end(self) -> None:
        if not self.running and not self._again and self._cursor >= len(self._plan):
            self._ended.set()

    @property
    def rate_min(self) -> float:
        """Bytes/s: a window slower than that is cut off."""
        if not self._bounds.prefetch_rate:
            return PREFETCH_RATE_MIN
        return min(PREFETCH_RATE_MIN, self._bounds.prefetch_rate / (2 * self._bounds.prefetch_streams))

    @property
    def is_hungry(self) -> bool:
        """Whether another window may start."""
        return all(window.is_nearly_done() for window in self.running)

    def window_ended(self, transfer: Transfer) -> None:
        """Account for it."""
        self.running.remove(transfer)
        self.fetched_count += transfer.landed_count
        if transfer.landed_count:
            self.last_error = None

    def next_window(
        self, handle_count: int, wanted: Callable[[FetchDevice, int], tuple[object, int, int] | None]
    ) -> tuple[list[Entry], bool]:
        """
        Take the next window out of the plan.

        Args:
            handle_count: so many images are being prefetched; the more, the smaller are their turns.
            wanted: of a chunk: (blob, start, stored bytes), or None if it is there or on its way.

        Returns:
            The window, empty at the end; and whether it is empty only because the scan stopped for others' sake.

        """
        first, largest = self._bounds.window_bytes_first, self._bounds.window_bytes_max
        bytes_max = min(self._window_bytes, max(first, largest // max(1, handle_count)))
        window: list[Entry] = []
        blob: object = None
        end = total = 0
        for _ in range(PREFETCH_SCAN_COUNT_MAX):
            entry = self.peek()
            if entry is None:
                return window, False
            place = wanted(*entry)
            if place is not None:
                if window and ((blob, end) != place[:2] or total + place[2] > bytes_max):
                    self._window_bytes = min(2 * self._window_bytes, largest)
                    return window, False
                if place[2] > self._left_bytes:
                    self._plan = ()
                    self._again.clear()
                    return window, False
                self._left_bytes -= place[2]
                blob, end = place[0], place[1] + place[2]
                total += place[2]
                window.append(entry)
            else:
                self.skipped_count += 1
            self._advance()
        return window, not window

    def put_back(self, window: list[Entry]) -> None:
        """What next_window() gave and was not started: the next one begins with it."""
        self._again.extendleft(reversed(window))

    def peek(self) -> Entry | None:
        """Its next window's first; None: there is none."""
        if self._again:
            return self._again[0]
        return self._plan[self._cursor] if self._cursor < len(self._plan) else None

    def _advance(self) -> None:
        if self._again:
            self._again.popleft()
        else:
            self._cursor += 1
