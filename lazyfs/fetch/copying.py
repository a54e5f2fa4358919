"""
A copy in the background: all of an image's chunks that are not there yet, behind everything else that is fetched.

A copy is a prefetch with other terms: small windows, a rate of its own, and a start of each window that waits until
the link is quiet. Nothing of it is in a read's way but the window under way, and that one stands back as well.
Gaps are not filled: where a present chunk lies between two missing ones these are two requests, for a chunk is as
large as what a request costs, and nobody waits for a copy.

Layer: fetch. Who calls: fetch.engine makes handles, fetch.scheduler starts their windows, lazyfs.node reads and stops
them. Pure decisions, on the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import CacheError
from lazyfs.fetch.brake import Brake, Traffic
from lazyfs.fetch.constants import COPY_WINDOW_BYTES, COPY_WINDOW_BYTES_MIN, PEER_WINDOW_BYTES, FetchLimits
from lazyfs.fetch.prefetch import PrefetchHandle
from lazyfs.fetch.transfer import Priority

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.prefetch import Entry
    from lazyfs.fetch.transfer import Transfer

ROOM_RETRY_S = 1.0               # after there was no room
READS_BUSY_S = 50                # reads a second, of at least a page, that make way is made for
READS_LOOK_S = 0.2               # between two looks at them


@dataclass(frozen=True, slots=True)
class CopyTerms:
    """
    How gently.

    :rate_bytes_s: stored bytes a second; 0: no bound.
    :quiet_s: so long nothing else was fetched, and little read, before a window starts.
    :patience_s: others that go on and on are waited for so long, then one window starts all the same.
    :has_room: whether so many more bytes (uncompressed) may be stored; without room it looks again now and then. None:
        as much as the cache takes; when it takes no more, the copy ends.
    """

    rate_bytes_s: int = 0
    quiet_s: float = 0.5
    patience_s: float = 5.0
    has_room: Callable[[int], bool] | None = None


class CopyHandle(PrefetchHandle):
    """
    A running copy, as its caller sees it.

    :held: its caller wants no further window for the time being (any reason); set by hold().
    :making_way: its next window waits for the traffic of others.
    :lacks_room: its next window waits for room in the cache.
    :received_bytes: stored bytes, those of damaged chunks and broken windows included.
    :landed_bytes: stored bytes of the chunks that it has put into the cache.
    :on_window: called on the loop after each window.
    """

    priority = Priority.COPY

    def __init__(self, plan: Sequence[Entry], terms: CopyTerms, traffic: Traffic) -> None:
        """`traffic`: of the others."""
        size = COPY_WINDOW_BYTES
        if terms.rate_bytes_s:    # so that a window takes about a second: then it can be stopped, or held, soon
            size = min(size, max(COPY_WINDOW_BYTES_MIN, terms.rate_bytes_s))
        bounds = FetchLimits(window_bytes_first=size, window_bytes_max=size, prefetch_rate=terms.rate_bytes_s)
        super().__init__(plan, bounds, Brake(traffic, terms.rate_bytes_s, terms.patience_s))
        self.terms = terms
        self.held = False
        self.making_way = False
        self.lacks_room = False
        self.received_bytes = 0
        self.landed_bytes = 0
        self.on_window: Callable[[], None] = lambda: None
        self._ready_since: float | None = None    # trio's clock: since when its next window waits for others only

    def begin_at_peers(self) -> None:
        """Its windows come from peers: so many chunks are to be under way that all members of a tree have work."""
        size = min(PEER_WINDOW_BYTES, max(self._window_bytes, self.terms.rate_bytes_s or PEER_WINDOW_BYTES))
        self._bounds = replace(self._bounds, window_bytes_first=size, window_bytes_max=size)
        self._window_bytes = size

    def hold(self, *, held: bool = True) -> None:
        """Start no further window, or (held=False) go on: then Fetcher.nudge() tells the scheduler."""
        self.held = held

    def starts_at(self, now: float, quiet_since: float | None) -> float:
        """
        When its next window may start: `now` or before means at once, inf means when something changes.

        Args:
            now: trio's clock.
            quiet_since: on the same clock, since when nobody else fetches anything; None: somebody does.

        """
        self.making_way = False
        at = max(now, self.paused_until)
        if self.held or not self.is_hungry or at > now:
            self._ready_since = None
            return math.inf if at <= now else at
        if self._ready_since is None:
            self._ready_since = now
        quiet = math.inf if quiet_since is None else quiet_since + self.terms.quiet_s
        at = min(quiet, self._ready_since + self.terms.patience_s)
        self.making_way = at > now
        return at

    def next_window(
        self, handle_count: int, wanted: Callable[[FetchDevice, int], tuple[object, int, int] | None]
    ) -> tuple[list[Entry], bool]:
        """See PrefetchHandle; nothing as long as there is no room for it, and for what is on its way."""
        window, stopped = super().next_window(handle_count, wanted)
        if window and self.terms.has_room is not None:
            coming = [flight.size for one in self.running for flight in one.flights if not flight.done]
            size = sum(coming) + sum(device.table.chunk_bytes(index) for device, index in window)
            self.lacks_room = not self.terms.has_room(size)
            if self.lacks_room:
                self.put_back(window)
                self.paused_until = trio.current_time() + ROOM_RETRY_S
                return [], False
        return window, stopped

    def window_ended(self, transfer: Transfer) -> None:
        """Account for it; a cache without room ends the copy."""
        super().window_ended(transfer)
        self._ready_since = None
        self.received_bytes += transfer.received_bytes
        self.landed_bytes += sum(flight.stored_size for flight in transfer.flights
                                 if flight.done and flight.error is None and flight.data is None)
        if any(flight.data is not None for flight in transfer.flights):
            self.error = CacheError("the cache has no room for what is copied",
                                    hint="raise cache.quota_bytes, or make room: lazyfs cache gc")
            self.cancel()
        self.on_window()


class Copies:
    """
    Those of one fetcher, and what they make way for.

    :traffic: everybody else's transfers.
    """

    def __init__(self, read_count: Callable[[], int] = lambda: 0) -> None:
        """`read_count`: of all reads so far, of what is in the cache too."""
        self.handles: list[CopyHandle] = []
        self.traffic = Traffic()
        self._read_count = read_count
        self._looked_at, self._looked_count = -math.inf, 0
        self._quiet_since = -math.inf

    def begin(self, priority: Priority) -> None:
        """A transfer starts."""
        if priority is not Priority.COPY:
            self.traffic.begin()

    def end(self, priority: Priority, now: float) -> None:
        """A transfer is over; `now` on trio's clock."""
        if priority is not Priority.COPY:
            self.traffic.end()
            self._quiet_since = now

    def ready(self, now: float) -> tuple[list[CopyHandle], float]:
        """Whose next window may start, and when the next of the others may (inf: not by time alone)."""
        self._look_at_reads(now)
        quiet_since = self._quiet_since if self.traffic.busy_since is None else None
        times = [(handle.starts_at(now, quiet_since), handle) for handle in self.handles]
        return ([handle for at, handle in times if at <= now],
                min((at for at, _ in times if at > now), default=math.inf))

    def _look_at_reads(self, now: float) -> None:
        """A program that starts reads much that is here already; then processor and disk are not ours either."""
        elapsed_s = now - self._looked_at
        if elapsed_s < READS_LOOK_S:
            return
        count = self._read_count()
        if self._looked_at > -math.inf and count - self._looked_count >= READS_BUSY_S * elapsed_s:
            self._quiet_since = now
        self._looked_at, self._looked_count = now, count
