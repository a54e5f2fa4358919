"""
One read that had to wait: what it asked for, and for which chunks it waited. Times are of time.monotonic(), seconds.

Layer: fetch. Who calls: fs.readlog makes one a waiting read and keeps those that were slow; fetch.engine notes the
flights that the read joins. The read in whose task something runs is in CURRENT. On the trio loop; the stages' times
are written into the flight by its thread (fetch.transfer), and are read when the flight is over.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lazyfs.fetch.flight import Flight

CURRENT: ContextVar[ReadTrace | None] = ContextVar("lazyfs_read", default=None)
_WAIT_COUNT_MAX = 16             # chunks of one read: the kernel asks for 1 MiB at most, a chunk is 4 KiB at least


class Wait(NamedTuple):
    """A chunk that a read waits for; `under_way`: somebody else had asked for it."""

    flight: Flight
    asked_at: float
    under_way: bool


class ReadTrace:
    """
    `inode`, `offset`, `size`: as the kernel asked. `pid`: who asked, 0: not known. `error`: its kind, when it ended.

    `device`: what is read, as fs.served knows it; `place`: from where on, bytes. None and 0: it was not looked up yet.
    """

    __slots__ = ("began", "device", "ended", "error", "inode", "offset", "pid", "place", "request", "size", "waits")

    def __init__(self, request: str, inode: int, offset: int, size: int, pid: int) -> None:
        self.request = request
        self.inode = inode
        self.offset = offset
        self.size = size
        self.pid = pid
        self.began = time.monotonic()
        self.ended = 0.0
        self.error = ""
        self.device: object = None
        self.place = 0
        self.waits: list[Wait] = []

    def joined(self, flights: list[Flight]) -> None:
        """It waits for these now."""
        now = time.monotonic()
        for flight in flights:
            flight.request = flight.request or self.request
        self.waits += [Wait(flight, now, flight.made_at < now - _FRESH_S)
                       for flight in flights[:_WAIT_COUNT_MAX - len(self.waits)]]

    def chunks(self) -> list[dict[str, Any]]:
        """For people: what became of each chunk, with the seconds that each stage took as far as it came."""
        return [_describe(wait) for wait in self.waits]


_FRESH_S = 0.001                 # a flight that is older was not made for this read


def _describe(wait: Wait) -> dict[str, Any]:
    """
    Of one chunk. Stages: `queue` until a thread began (tries before the last one included), `first_byte` until the
    source answered, `transfer` until all bytes were there (those before it in the same answer included), `decode`
    with the digest's check, `store`.
    """
    flight = wait.flight
    times = (flight.made_at, flight.begun_at, flight.answered_at, flight.received_at, flight.decoded_at,
             flight.settled_at)
    stages: dict[str, float] = {}
    for name, start, end in zip(("queue", "first_byte", "transfer", "decode", "store"), times, times[1:], strict=False):
        if not end:
            break
        stages[name] = round(max(0.0, end - start), 6)
    error = flight.error or flight.last_error
    return {
        "chunk": flight.index, "blob": str(flight.blob), "source": flight.source.name, "server": flight.server,
        "stored_bytes": flight.stored_size, "under_way": wait.under_way, "request": flight.request,
        "failed_tries": flight.attempt_count + flight.bad_count, "landed": flight.done and flight.error is None,
        "error": "" if error is None else str(error), "stages": stages,
    }
