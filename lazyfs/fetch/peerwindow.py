"""
A window of a prefetch or a copy whose chunks come from peers: several at once, in any order.

Layer: fetch. Who calls: fetch.peering makes and ends it; fetch.prefetch looks at it as at any window. On the loop.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lazyfs.fetch.transfer import Priority, Transfer

if TYPE_CHECKING:
    import trio

    from lazyfs.fetch.flight import Flight

NEXT_SHARE = 0.5                 # of a window is to come when the next one begins: a tree is as deep as it is wide


class PeerWindow(Transfer):
    """
    No thread executes it; it is over when all of its flights are.

    :scopes: of the jobs that fetch it; cancelled with it.
    """

    def __init__(self, flights: list[Flight], priority: Priority) -> None:
        self.scopes: list[trio.CancelScope] = []
        self._given_up = False
        super().__init__(flights, priority)
        self.size = self.remaining_bytes = sum(flight.stored_size for flight in flights)
        self._answered_at = time.monotonic()
        self._to_come = set(flights)

    @property
    def cancelled(self) -> bool:
        return self._given_up

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self._given_up = value
        for scope in self.scopes if value else ():
            scope.cancel()

    def account(self, flight: Flight) -> bool:
        """One of its flights has landed, or failed. Returns whether that was the last one."""
        if flight not in self._to_come:
            return False
        self._to_come.discard(flight)
        self.remaining_bytes -= flight.stored_size
        if flight.error is None:
            self.received_bytes += flight.stored_size
            self.landed_count += 1
            self.delay_s = self.delay_s or time.monotonic() - self._answered_at
        return not self._to_come

    def is_nearly_done(self) -> bool:
        """Whether the next one is to begin."""
        return self.remaining_bytes <= self.size * NEXT_SHARE

    def _arrives_s(self, flight: Flight, rate: float) -> float:
        """In any order: half of what is left comes before it."""
        return (self.remaining_bytes / 2 + flight.stored_size) / rate
