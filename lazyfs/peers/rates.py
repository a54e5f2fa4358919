"""
Bytes a second: what a host sends and receives, all its peers and resources together.

Layer: peers. Who calls: swarm (download), server (upload), both on the trio loop. Who may not wait (a read that
somebody sleeps on) takes at once, and those that can wait pay for it.
"""

from __future__ import annotations

import trio

BURST_S = 0.1       # of the rate may pass at once; a piece passes whole when nothing is owed


class Rate:
    """At most `bytes_s` bytes a second, on trio's clock; 0: no limit."""

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s = bytes_s
        self._paid_until = 0.0    # what has been taken is over at that time

    def take_now(self, size: int) -> None:
        """Take without waiting; later ones wait for it."""
        if self.bytes_s:
            self._paid_until = max(trio.current_time(), self._paid_until) + size / self.bytes_s

    def wait_s(self) -> float:
        """How long who takes now would wait; 0: not at all."""
        return max(0.0, self._paid_until - BURST_S - trio.current_time()) if self.bytes_s else 0.0

    async def take(self, size: int) -> None:
        """Take, in the order of the calls. Checkpoint: only if it waits; on cancel: nothing was taken."""
        pause = self.wait_s()
        self.take_now(size)
        if pause:
            try:
                await trio.sleep(pause)
            except trio.Cancelled:
                self._paid_until -= size / self.bytes_s
                raise
