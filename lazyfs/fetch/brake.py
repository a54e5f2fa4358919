"""
What keeps a prefetch from being in the way: reads go first on the link, and a configured rate is not exceeded.

Layer: fetch. Who calls: fetch.scheduler on the loop (`begin`, `end`), the threads of prefetch windows (`hold`).
A window's thread that does not read lets its connection's receive buffer fill, and then the sender stops: so the link
is free for the reads after at most one round trip's bytes, and nothing has to be asked for again.
State: since when reads are under way, and how far the rate's allowance is used up; both under one lock.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lazyfs.fetch.constants import COURTESY_S, PACE_SLICE_S

if TYPE_CHECKING:
    from collections.abc import Callable


class Brake:
    """One for all windows of a fetcher. `rate_bytes_s`: of all of them together; 0: no bound."""

    def __init__(self, rate_bytes_s: int = 0) -> None:
        self._rate = rate_bytes_s
        self._lock = threading.Lock()
        self._paid_until = 0.0                # time.monotonic(): when what has come so far was due
        self._busy_since: float | None = None
        self._free = threading.Event()
        self._free.set()

    def begin(self) -> None:
        """The first read asks for something of its own."""
        self._busy_since = time.monotonic()
        self._free.clear()

    def end(self) -> None:
        """None does any more."""
        self._busy_since = None
        self._free.set()

    def hold(self, count: int, goes_first: Callable[[], bool]) -> float:
        """
        After `count` bytes of a window: wait until the next may be read. Returns the seconds that it waited.

        Args:
            count: bytes that have just come.
            goes_first: whether this window need not wait (any more): a read waits for it, or it is given up.

        """
        began = time.monotonic()
        self._give_way(goes_first)
        if self._rate:
            self._slow_down(count, goes_first)
        return time.monotonic() - began

    def _give_way(self, goes_first: Callable[[], bool]) -> None:
        """Reads that go on and on get their share of the link, not all of it: COURTESY_S after they began."""
        since = self._busy_since
        while since is not None and not goes_first():
            left_s = since + COURTESY_S - time.monotonic()
            if left_s <= 0 or self._free.wait(min(left_s, PACE_SLICE_S)):
                return
            since = self._busy_since

    def _slow_down(self, count: int, goes_first: Callable[[], bool]) -> None:
        with self._lock:
            self._paid_until = due = max(self._paid_until, time.monotonic() - PACE_SLICE_S) + count / self._rate
        while (left_s := due - time.monotonic()) > 0 and not goes_first():
            time.sleep(min(left_s, PACE_SLICE_S))
