"""
One range request of neighbouring chunks, from the source into the cache; blocking, in a thread.

Never wrong bytes: a chunk is decoded into exactly its size, then its digest is checked, then it is stored or handed
on. A bad chunk does not end the run: the sizes of its neighbours are known from the table. Who calls: fetch.workers.
"""

from __future__ import annotations

import enum
import logging
import math
import time
from typing import TYPE_CHECKING

from lazyfs import requestid
from lazyfs.errors import BugError, DeadlineError, FormatError, IntegrityError, LazyfsError, SourceError
from lazyfs.fetch.constants import (
    ABANDON_S,
    ATTEMPT_SHARE,
    ATTEMPT_WHOLE_S,
    OVERLAP_PARTS,
    OVERTAKE_FACTOR,
    OVERTAKE_MARGIN_S,
    PREFETCH_OVERLAP_BYTES,
    PREFETCH_OVERLAP_FACTOR,
    RATE_BYTES_MIN,
    UNSTORED_BYTES_MAX,
)
from lazyfs.image.codec import Codec, decompress
from lazyfs.image.digest import chunk_digest
from lazyfs.registry.streams import distrust, server_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.fetch.brake import Brake
    from lazyfs.fetch.flight import Flight
    from lazyfs.registry.place import ByteStream

    Wake = Callable[[Callable[[], None]], None]    # has a function called on the loop, from any thread

_log = logging.getLogger(__name__)


class Priority(enum.IntEnum):
    FOREGROUND = 0    # a read waits
    PREFETCH = 1      # a window of the hot blob
    BACKGROUND = 2    # read-ahead
    COPY = 3          # a window of a background copy


class Transfer:
    """
    :flights: neighbours in one blob of one source, in its order.
    :received_bytes, remaining_bytes: stored bytes; written by the thread.
    :cut_short: it ended before its last flights, for the cache did not store: they are to be fetched again.
    :cancelled: set by the loop; the thread gives up at the next piece, and by itself when nobody wants it any more.
    :brake: what makes it wait for others; None: it goes first.
    :seconds_max: of a probe of a source that is down; None: no other bound than its flights' deadlines.
    :delay_s: from the request to the answer's header; 0.0: it has not come.
    :server: who answered; empty: nobody yet.
    :request: the read that it is for, or one of them; empty: none.
    """

    def __init__(self, flights: list[Flight], priority: Priority, brake: Brake | None = None) -> None:
        self.flights = flights
        self.brake = brake
        self.priority = priority
        first = flights[0]
        self.source, self.blob, self.start = first.source, first.blob, first.stored_start
        self.size = flights[-1].stored_end - self.start
        self.received_bytes = 0
        self.remaining_bytes = self.size
        self.landed_count = 0
        self.seconds_max: float | None = None
        self.cancelled = False
        self._unwanted_since = math.inf    # time.monotonic()
        self.error: LazyfsError | None = None
        self.delay_s = 0.0
        self.server = ""
        self.request = next((flight.request for flight in flights if flight.request), "")
        self._answered_at = 0.0      # time.monotonic()
        self._held_s = 0.0           # by the brake, since then
        self.cut_short = False
        self._unstored_bytes = 0     # of chunks that it has in memory
        self._unpaid_bytes = 0       # received, and the brake not told

    def is_nearly_done(self) -> bool:
        """Whether the next window is to be asked for: what is left takes no longer than an answer."""
        left = self.remaining_bytes
        return (left <= min(PREFETCH_OVERLAP_BYTES, self.size // OVERLAP_PARTS)
                or left <= PREFETCH_OVERLAP_FACTOR * self.delay_s * (self._rate() or 0.0))

    def is_wanted(self) -> bool:
        """Whether a read waits for something of it that has not come."""
        return any(flight.waiters for flight in self.flights if not flight.done)

    def is_overtaken_by_asking(self, flight: Flight) -> bool:
        """Whether a request for one of its chunks alone, begun now, is done well before this reaches it, if ever."""
        if self.cancelled:
            return True
        rate = self._rate()
        if not rate:
            return False
        alone_s = self.delay_s + flight.stored_size / rate
        return self._arrives_s(flight, rate) > OVERTAKE_FACTOR * alone_s + OVERTAKE_MARGIN_S

    def _arrives_s(self, flight: Flight, rate: float) -> float:
        """When a chunk has come, seconds from now at that rate."""
        return (flight.stored_end - self.start - self.received_bytes) / rate

    def _rate(self) -> float | None:
        """Bytes/s so far, while it was not made to wait; None: too early to tell."""
        took_s = time.monotonic() - self._answered_at - self._held_s
        if self.received_bytes < RATE_BYTES_MIN or took_s <= 0:
            return None
        return self.received_bytes / took_s

    def _is_given_up(self) -> bool:
        """Cancelled; or for reads, and none has waited for the rest of it for a while: killed, most likely."""
        if self.priority is not Priority.FOREGROUND or self.is_wanted():
            self._unwanted_since = math.inf
        else:
            self._unwanted_since = min(self._unwanted_since, time.monotonic())
        return self.cancelled or time.monotonic() - self._unwanted_since > ABANDON_S

    def _goes_first(self) -> bool:
        """Windows make way unless a read waits for them; a read of a bulk reader makes way all the same."""
        return self.cancelled or (self.priority is not Priority.FOREGROUND and self.is_wanted())

    def attempt_deadline(self) -> float:
        """Absolute, time.monotonic(): see constants.ATTEMPT_SHARE."""
        now = time.monotonic()
        left = max(flight.deadline for flight in self.flights) - now
        return now + min(left * ATTEMPT_SHARE if left > ATTEMPT_WHOLE_S else left, self.seconds_max or left)

    def execute(self, wake: Wake, nearly_done: Callable[[], None]) -> None:
        """
        Fetch all flights; never raises. Those that did not land are not `done` afterwards; `error` says why.

        Args:
            wake: has a function called on the loop; used only for chunks that somebody waits for.
            nearly_done: called on the loop when PREFETCH_OVERLAP_BYTES are left.

        """
        requestid.begin(self.request)
        try:
            self._receive(wake, nearly_done)
        except LazyfsError as error:
            self.error = error
        except Exception as error:    # noqa: BLE001 - it must end this transfer, not the thread
            _log.exception("transfer from %s failed in an unforeseen way", self.source.name)
            self.error = BugError(f"{self.source.name}: blob {self.blob.short}: {type(error).__name__}")
        finally:
            self._release()

    def give_up(self, error: LazyfsError) -> None:
        """Instead of execute(): it could not be begun."""
        self.error = error
        self._release()

    def _release(self) -> None:
        for flight in self.flights:
            flight.device.cached.release()

    def _receive(self, wake: Wake, nearly_done: Callable[[], None]) -> None:
        deadline = self.attempt_deadline()
        if deadline <= time.monotonic():
            raise DeadlineError(f"{self.source.name}: blob {self.blob.short}: no time left to fetch it")
        told = False
        detour: SourceError | None = None
        began = time.monotonic()
        with self.source.read_range(self.blob, self.start, self.size, deadline) as stream:
            self._answered_at = time.monotonic()
            self.delay_s = self._answered_at - began
            self.server = server_of(stream)
            buffer = memoryview(bytearray(max(flight.stored_size for flight in self.flights)))
            for flight in self.flights:
                stored = buffer[: flight.stored_size]
                flight.begun_at, flight.answered_at, flight.server = began, self._answered_at, self.server
                self._fill(stored, stream)
                flight.received_at = time.monotonic()
                if not told and self.priority is not Priority.FOREGROUND and self.is_nearly_done():
                    told = True
                    wake(nearly_done)
                if flight.overtaken and flight.device.cached.present(flight.index, flight.index):
                    flight.done = True
                elif settle(flight, stored, wake):
                    self.landed_count += 1
                if flight.done:
                    if flight.event is not None or flight.early is not None:
                        wake(flight.wake)
                    if self._holds_too_much(flight):
                        break
                elif flight.bad is not None and distrust(stream, flight.bad):
                    # a mirror's fault, and it is not asked again: the source itself is not in doubt
                    detour = SourceError(f"{flight.bad}: a mirror gave it; another is asked")
                    detour.elsewhere = True
                    flight.bad = None
        if detour is not None:
            raise detour

    def _holds_too_much(self, flight: Flight) -> bool:
        """After a chunk: whether the rest is to come later, because what has come was not stored."""
        self._unstored_bytes += len(flight.data or b"")
        self.cut_short = self._unstored_bytes >= UNSTORED_BYTES_MAX and flight is not self.flights[-1]
        return self.cut_short

    def _fill(self, view: memoryview, stream: ByteStream) -> None:
        done = 0
        while done < len(view):
            if self.brake is not None:
                self._held_s += self.brake.hold(self._unpaid_bytes, self._goes_first)
            if self._is_given_up():
                self.cancelled = True
                raise SourceError(f"{self.source.name}: transfer cancelled")
            count = stream.readinto(view[done:])
            if not 0 < count <= len(view) - done:
                found = "too many bytes" if count else f"the end after {self.received_bytes} bytes"
                raise SourceError(
                    f"{self.source.name}: blob {self.blob.short}: expected {self.size} bytes from {self.start}, "
                    f"found {found}"
                )
            done += count
            self.received_bytes += count
            self._unpaid_bytes = count
            self.remaining_bytes -= count


def settle(flight: Flight, stored: memoryview, wake: Wake) -> bool:
    """
    Decode, check and store one chunk. False: the bytes are not the chunk's, and `flight.bad` says why.

    `stored` is the caller's again afterwards.
    """
    try:
        data = decompress(stored, Codec(flight.codec), flight.size)
    except FormatError as error:
        flight.bad = error
        return False
    if not keep(flight, data, wake, lasting=flight.codec != Codec.NONE):    # not decoded: it lies in `stored` still
        where = f"blob {flight.blob.short} at {flight.stored_start}"
        flight.bad = IntegrityError(
            f"{flight.source.name}: {where}: chunk {flight.index} has another digest than promised",
            hint="the registry or something on the way damages data; lazyfs check finds all such chunks",
        )
        return False
    return True


def keep(flight: Flight, data: bytes | bytearray | memoryview, wake: Wake, *, lasting: bool = True) -> bool:
    """
    Check a chunk's bytes and store them: the flight is done. False: they are not the chunk's.

    Who waits for good bytes only (Flight.early) has them before they are stored: `wake` has a function called on the
    loop. `lasting`: the bytes stay as they are; else they are the caller's again afterwards. Blocking.
    """
    if len(data) != flight.size or chunk_digest(data) != flight.digest:
        return False
    flight.decoded_at = time.monotonic()
    view = memoryview(data) if isinstance(data, bytearray) else data
    if flight.early is not None:
        flight.checked = view = view if lasting else bytes(view)
        lasting = True
        wake(flight.tell)
    if not flight.device.cached.write(flight.index, view):
        flight.data = view if lasting else bytes(view)
    flight.settled_at = time.monotonic()
    flight.done = True
    return True
