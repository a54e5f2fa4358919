"""
What a node gives away: how many requests it takes, how many pieces it sends at once, how many bytes a second.

Layer: peers. Who calls: peers.server. Pure but for waiting; times are trio's. The bounds are of the host, not of a
resource: all its uploads share them. What is urgent passes what waits, and a quarter of the places is kept for it.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import PeerBusyError
from lazyfs.limits import MIB
from lazyfs.peers.model import Priority, beat_s
from lazyfs.peers.rates import Giving, Rate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

_DISK_THREADS = 4          # a slow disk is not asked for sixty places at once
_HELD_BYTES_MAX = 64 * MIB  # pieces that could not be stored, and wait to be sent
# Reads' pieces go one after another, nothing else meanwhile: of two that share a link both come as late as the second
# one would. What takes longer than this (1 MiB at 200 Mbit/s: 42 ms) is slow for reasons that are not this host's link.
ALONE_S = 0.05
_RETRY_S = 0.25            # when a place may be free again, nobody knows better
_RETRY_S_MAX = 10.0


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """
    Attributes:
        rate: bytes/s on the wire, all uploads together; 0: no bound.
        concurrent: pieces being sent at once; the last quarter of the places is for foreground reads.
        requests: open at once, most of which wait for what they asked for; likewise.
        per_peer: of these, of one member.
        connections: at once; beyond, the one that has been idle for longest makes room.

    """

    rate: int = 0
    concurrent: int = 64
    requests: int = 1024
    per_peer: int = 64
    connections: int = 1024


@dataclass(slots=True)
class UploadCounters:
    """Since the start; bytes as they were before compression, and as they went."""

    requests: int = 0
    refused_busy: int = 0
    pieces: int = 0
    plain_bytes: int = 0
    wire_bytes: int = 0


class Turn:
    """One who waits to send a piece, or sends it. `began`: trio's clock."""

    __slots__ = ("began", "event", "gone", "place")

    def __init__(self, place: tuple[int, int]) -> None:
        self.place = place
        self.event = trio.Event()
        self.gone = False
        self.began = 0.0

    def __lt__(self, other: Turn) -> bool:
        return self.place < other.place


class Uploads:
    """The state of it. `counters` is read by who describes the node. `giving`: what it has been found able to give."""

    def __init__(self, limits: UploadLimits) -> None:
        self.limits = limits
        self.counters = UploadCounters()
        self.giving = Giving()
        self._open: Counter[str] = Counter()
        self._promised = 0               # bytes that open requests will still want, were they all here
        self._sending = 0
        self._held = 0
        self.disk = trio.CapacityLimiter(_DISK_THREADS)      # that have the disk read what is to be sent
        self._turns: list[Turn] = []
        self._reads: dict[Turn, None] = {}      # whose pieces are being sent, and somebody sleeps on them
        self._numbers = itertools.count()
        self._rate = Rate(limits.rate)

    @property
    def open_requests(self) -> int:
        return self._open.total()

    @property
    def sending(self) -> int:
        return self._sending

    def change(self, limits: UploadLimits) -> None:
        """Other bounds from now on."""
        self._rate.bytes_s = limits.rate
        self.limits = limits
        self._wake_first()

    @contextlib.contextmanager
    def request(self, member: str, priority: Priority, size: int, seconds: float) -> Iterator[None]:
        """
        A place for a request of `size` bytes, whose asker waits `seconds`.

        Raises PeerBusyError: there is none, or it could not be done in that time.
        """
        limits = self.limits
        places = limits.requests if priority is Priority.FOREGROUND else limits.requests * 3 // 4
        reason, retry_s = "", _RETRY_S
        if self._open[member] >= limits.per_peer:
            reason = f"{limits.per_peer} requests of this peer are open"
        elif self.open_requests >= max(places, 1):
            reason = f"{self.open_requests} requests are open"
        elif limits.rate and self._promised and (self._promised + size) / limits.rate > seconds:
            reason = f"at {limits.rate} bytes/s, {self._promised} bytes are to be sent before"
            retry_s = self._promised / limits.rate / 2
        if reason:
            self._open += Counter()      # without those that have none
            self.counters.refused_busy += 1
            raise PeerBusyError(f"busy: {reason}", retry_after_s=min(retry_s, _RETRY_S_MAX))
        self.counters.requests += 1
        self._open[member] += 1
        self._promised += size
        try:
            yield
        finally:
            self._promised -= size
            self._open[member] -= 1
            if not self._open[member]:
                del self._open[member]

    def rate_of(self, link_rate: float) -> float:
        """Bytes/s that a connection gets, which takes `link_rate` (0.0: nobody knows) and shares our bound."""
        if not self.limits.rate:
            return link_rate
        share = self.limits.rate / max(self._sending, 1)
        return min(link_rate, share) if link_rate else share

    def has_room(self, size: int) -> bool:
        """For a piece that would be in memory, and need not be: half of the room is for those that must be."""
        return self._held + size <= _HELD_BYTES_MAX // 2

    def hold(self, size: int) -> bool:
        """Whether there is room for a piece that is in memory, not in a file; `drop` gives it back."""
        if self._held + size > _HELD_BYTES_MAX:
            return False
        self._held += size
        return True

    def drop(self, size: int) -> None:
        """A piece that was held is not any more."""
        self._held -= size

    async def begin(self, priority: Priority, size: int, meanwhile: Callable[[], Awaitable[None]]) -> Turn:
        """
        Wait for the turn to send a piece of `size` bytes; `end` is called after it, whatever happened.

        `meanwhile` is called every beat_s of waiting.
        """
        turn = Turn((priority, next(self._numbers)))
        heapq.heappush(self._turns, turn)
        try:
            while True:
                delay = self._delay(turn)
                if delay <= 0:
                    break
                beat = beat_s(priority)
                with trio.move_on_after(min(delay, beat)) as scope:
                    await turn.event.wait()
                    turn.event = trio.Event()
                if scope.cancelled_caught and delay > beat:
                    await meanwhile()
        except BaseException:
            turn.gone = True
            self._wake_first()
            raise
        heapq.heappop(self._turns)
        self._sending += 1
        self._rate.take_now(size)
        turn.began = trio.current_time()
        if priority is Priority.FOREGROUND:
            self._reads[turn] = None
        self._wake_first()
        return turn

    def end(self, turn: Turn, plain_bytes: int, wire_bytes: int) -> None:
        """A piece of `plain_bytes`, as `begin` was told, was sent as `wire_bytes`; 0: it was not."""
        self._sending -= 1
        self._reads.pop(turn, None)
        self._rate.take_now(wire_bytes - plain_bytes)
        self.counters.pieces += wire_bytes > 0
        self.counters.plain_bytes += plain_bytes if wire_bytes else 0
        self.counters.wire_bytes += wire_bytes
        self._wake_first()

    def _delay(self, turn: Turn) -> float:
        """Seconds until it may be this one's turn; infinite: somebody will wake it; 0: now."""
        while self._turns[0].gone:
            heapq.heappop(self._turns)
        limits = self.limits
        places = limits.concurrent if turn.place[0] == Priority.FOREGROUND else limits.concurrent * 3 // 4
        if self._turns[0] is not turn or self._sending >= max(places, 1):
            return math.inf
        alone_until = next(reversed(self._reads)).began + ALONE_S if self._reads else -math.inf
        return max(self._rate.wait_s(), alone_until - trio.current_time())

    def _wake_first(self) -> None:
        while self._turns and self._turns[0].gone:
            heapq.heappop(self._turns)
        if self._turns:
            self._turns[0].event.set()
