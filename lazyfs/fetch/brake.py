"""
What keeps windows from being in the way: those who wait go first on the link, and a configured rate is not exceeded.

Layer: fetch. Who calls: fetch.scheduler on the loop (`begin`, `end`), the threads of windows (`hold`).
A window's thread that does not read lets its connection's receive buffer fill, and then the sender stops: so the link
is free for the others after at most one round trip's bytes, and nothing has to be asked for again.
State: since when others are under way (Traffic), and how far a rate's allowance is used up (Brake), under a lock.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lazyfs.fetch.constants import COURTESY_S, PACE_SLICE_S

if TYPE_CHECKING:
    from collections.abc import Callable


class Traffic:
    """
    Transfers under way that windows make way for. Changed on the loop, read by threads.

    :busy_since: time.monotonic() seconds; None: there are none.
    """

    def __init__(self) -> None:
        self.busy_since: float | None = None
        self.free = threading.Event()
        self.free.set()
        self._count = 0

    def begin(self) -> None:
        """One more asks for something."""
        self._count += 1
        if self._count == 1:
            self.busy_since = time.monotonic()
            self.free.clear()

    def end(self) -> None:
        """One less does."""
        self._count -= 1
        if not self._count:
            self.busy_since = None
            self.free.set()


class Brake:
    """For windows that share a rate. `rate_bytes_s`: of all of them together; 0: no bound."""

    def __init__(self, traffic: Traffic, rate_bytes_s: int = 0, courtesy_s: float = COURTESY_S) -> None:
        """`courtesy_s`: others that go on and on are given way for so long, then they get a share of the link."""
        self._traffic = traffic
        self._rate = rate_bytes_s
        self._courtesy_s = courtesy_s
        self._lock = threading.Lock()
        self._paid_until = 0.0                # time.monotonic(): when what has come so far was due

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

    def due_s(self, count: int) -> float:
        """Account for `count` bytes that are about to come; how long the next ones are to wait, seconds. At once."""
        if not self._rate:
            return 0.0
        with self._lock:
            self._paid_until = max(self._paid_until, time.monotonic()) + count / self._rate
            return self._paid_until - time.monotonic()

    def _give_way(self, goes_first: Callable[[], bool]) -> None:
        since = self._traffic.busy_since
        while since is not None and not goes_first():
            left_s = since + self._courtesy_s - time.monotonic()
            if left_s <= 0 or self._traffic.free.wait(min(left_s, PACE_SLICE_S)):
                return
            since = self._traffic.busy_since

    def _slow_down(self, count: int, goes_first: Callable[[], bool]) -> None:
        with self._lock:
            self._paid_until = due = max(self._paid_until, time.monotonic() - PACE_SLICE_S) + count / self._rate
        while (left_s := due - time.monotonic()) > 0 and not goes_first():
            time.sleep(min(left_s, PACE_SLICE_S))
