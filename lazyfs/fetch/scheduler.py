"""
Which transfer starts next, and what becomes of its flights. All on the loop, all synchronous but `_later`.

Order: foreground (whose image has had least of late: fetch.lanes), then prefetch windows, then read-ahead, then
background copies; each within its bound. Of a source that is down (fetch.sources) only probes are asked.
Invariants: a chunk that is wanted has exactly one flight in `flights`, from its making until it landed or failed; a
flight is in at most one of: a queue, a transfer, a pause. Who calls: fetch.engine. See docs/concurrency.md.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, TypeVar

import trio

from lazyfs import limits, requestid
from lazyfs.errors import CacheError, DeadlineError, LazyfsError, RateLimitedError, SourceError
from lazyfs.fetch import retry
from lazyfs.fetch.constants import SPILL_BYTES_MAX, UNSTORED_S, FetchLimits
from lazyfs.fetch.courtesy import Courtesy
from lazyfs.fetch.flight import Flight
from lazyfs.fetch.lanes import Lanes
from lazyfs.fetch.peering import Peering
from lazyfs.fetch.prefetch import PrefetchHandle
from lazyfs.fetch.spill import Spill
from lazyfs.fetch.statistics import FetchStatistics
from lazyfs.fetch.transfer import Priority, Transfer
from lazyfs.fetch.workers import Workers
from lazyfs.image.codec import Codec
from lazyfs.peers.model import HERE_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs.cache.store import CachedDevice
    from lazyfs.fetch.copying import CopyHandle
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.prefetch import Entry

H = TypeVar("H", bound=PrefetchHandle)
_log = logging.getLogger(__name__)


class Scheduler:
    """
    :flights: chunks on their way, by (cached device, index).
    :lanes: what waits, by image.
    :running: how many transfers of each priority are under way.
    """

    def __init__(self, bounds: FetchLimits, nursery: trio.Nursery) -> None:
        self.bounds = bounds
        self.statistics = FetchStatistics()
        self.spill = Spill(SPILL_BYTES_MAX)
        self.flights: dict[tuple[CachedDevice, int], Flight] = {}
        self.lanes = Lanes(bounds)
        self.prefetches: list[PrefetchHandle] = []
        self._windows: dict[Transfer, PrefetchHandle] = {}
        self.running = dict.fromkeys(Priority, 0)
        self.courtesy = Courtesy(bounds.prefetch_rate, lambda: self.statistics.hits + self.statistics.misses)
        self.copies = self.courtesy.copies
        self._copies_wake_at = math.inf    # trio's clock
        self._unstored_at = -math.inf      # the same; when a chunk had no room in the cache
        self._nursery = nursery
        self._workers = Workers(bounds.thread_count, self._finished, self.dispatch)
        self.peering = Peering(self, nursery, self._workers.wake)
        self.closed = False

    async def drained(self) -> None:
        """Until no thread works any more. Checkpoint: perhaps."""
        await self._workers.drained()

    def join(self, device: FetchDevice, index: int, deadline: float, hops: int = 0) -> Flight:
        """
        The flight of a missing chunk that a read wants: the one under way, or a new one. Call dispatch() after.

        `hops`: how many nodes have passed the read on to us.
        """
        flight = self.flights.get((device.cached, index))
        if flight is not None and flight.window is not None and flight.window.is_overtaken_by_asking(flight):
            flight = None
        if flight is None or (flight.done and flight.data is None):    # landed, and vanished again
            flight = self._new_flight(device, index, deadline)
            flight.wanted = True
            if flight.codec != Codec.ZERO and not self.peering.took(flight, Priority.FOREGROUND, hops):
                self.lanes.of(flight.source).foreground.push(flight)
            return flight
        flight.wanted = True
        self.statistics.waits += 1
        flight.deadline = max(flight.deadline, deadline)
        self.lanes.promote(flight)
        self.peering.urge(flight)
        return flight

    def read_ahead(self, device: FetchDevice, indexes: Iterable[int]) -> None:
        """Fetch chunks that a sequential reader will want. Call dispatch() after."""
        deadline = time.monotonic() + limits.READ_DEADLINE_S
        for index in indexes:
            self.fetch_for(device, index, deadline, Priority.BACKGROUND)

    def fetch_for(self, device: FetchDevice, index: int, deadline: float, priority: Priority, hops: int = 0) -> Flight:
        """The flight of a missing chunk that no read of this node waits for. Call dispatch() after."""
        flight = self.flights.get((device.cached, index))
        if flight is None or (flight.done and flight.data is None):
            flight = self._new_flight(device, index, deadline)
            if flight.codec != Codec.ZERO and not self.peering.took(flight, priority, hops):
                self.lanes.of(flight.source).background.push(flight)
        return flight

    def add_prefetch(self, handle: PrefetchHandle) -> None:
        self.prefetches.append(handle)
        self.dispatch()

    def add_copy(self, handle: CopyHandle) -> None:
        self.copies.handles.append(handle)
        self.dispatch()

    def dispatch(self) -> None:
        """Start what may start."""
        if self.closed:
            return
        self.peering.flush()
        while self._start_foreground() or self._start_window() or self._start_background() or self._start_copy():
            pass

    def close(self) -> None:
        """Fail all that waits and tell the threads to end."""
        self.closed = True
        self._workers.close()
        self.peering.close()
        for flight in list(self.flights.values()):
            if not flight.done:
                flight.fail(SourceError(f"{flight.source.name}: the worker is stopping"))
        self.flights.clear()
        self.lanes.clear()
        for handle in (*self.prefetches, *self.copies.handles):
            handle.cancel()

    # --- what starts ----------------------------------------------------------------------------------------------

    def _start_foreground(self) -> bool:
        now = trio.current_time()
        lane = self.lanes.next_foreground(self.running[Priority.FOREGROUND], now)
        if lane is None:
            return False
        single = self._unstored_at + UNSTORED_S > now    # what is not stored is held in memory
        flights = self._alive(lane.foreground.pop_run(1 if single else self.bounds.merge_bytes_max))
        if flights:
            transfer = Transfer(flights, Priority.FOREGROUND, self.courtesy.bulk_brake if lane.is_bulk(now) else None)
            lane.share.add(transfer.size, now)
            if self._start(transfer):
                lane.running_count += 1
                lane.state.running_count += 1
        self.lanes.sweep(now)
        return True

    def _alive(self, flights: list[Flight]) -> list[Flight]:
        """Without those nobody can wait for any more. Cuts the run at a gap; the rest is queued again."""
        now = time.monotonic()
        for position, flight in enumerate(flights):
            if flight.deadline <= now or not flight.waiters:
                self.fail(flight, DeadlineError(f"{flight.source.name}: chunk {flight.index}: no slot in time"))
                for later in flights[position + 1 :]:
                    self.lanes.of(later.source).foreground.push(later)
                return flights[:position]
        return flights

    def _start_window(self) -> bool:
        if self.running[Priority.PREFETCH] >= self.bounds.prefetch_streams:
            return False
        now = trio.current_time()
        ready = [handle for handle in self.prefetches if handle.paused_until <= now and handle.is_hungry]
        return self._start_next_window(ready, self.prefetches, now)

    def _start_copy(self) -> bool:
        if self.running[Priority.COPY] >= self.bounds.copy_streams or not self.copies.handles:
            return False
        now = trio.current_time()
        ready, _ = self.copies.ready(now)
        if self._start_next_window(ready, self.copies.handles, now):
            return True
        _, later = self.copies.ready(now)    # now: one may have paused itself
        if later < self._copies_wake_at or self._copies_wake_at <= now:
            self._copies_wake_at = later
            if later < math.inf:
                self._nursery.start_soon(self._later, later, [])
        return False

    def _start_next_window(self, ready: list[H], handles: list[H], now: float) -> bool:
        """Of the first of `ready` that has one; `handles`: all of their kind, in turn."""
        for handle in (one for one in ready if self._is_admitted(one, now)):
            window, stopped = handle.next_window(len(handles), self._wanted)
            if stopped:
                self._workers.wake(self.dispatch)    # scan on after the others had a turn
                return False
            if window:
                self._start_handles_window(handle, window)
                handles.remove(handle)    # the others' turn
                handles.append(handle)
                return True
            handle.check_end()
        handles[:] = [handle for handle in handles if not handle.done]
        return False

    def _is_admitted(self, handle: PrefetchHandle, now: float) -> bool:
        """Whether what its next window is fetched from may be asked: peers may always."""
        entry = handle.peek()
        if entry is None or not self.peering.takes(entry[0]):
            return entry is None or self.lanes.admits(entry[0].blobs[0][0], now)
        handle.begin_at_peers()
        return True

    def _start_handles_window(self, handle: PrefetchHandle, window: list[Entry]) -> None:
        flights = [self._new_flight(*entry, time.monotonic()) for entry in window]
        if self.peering.takes(flights[0].device):
            if not self.peering.start_window(handle, flights):
                handle.cancel()    # its image is unmounted
            return
        transfer = Transfer(flights, handle.priority, handle.brake)
        for flight in flights:
            flight.window = transfer
            flight.deadline += limits.READ_DEADLINE_S + transfer.size / handle.rate_min
        if self._start(transfer):
            handle.running.add(transfer)
            self._windows[transfer] = handle
        else:
            handle.cancel()    # its image is unmounted

    def _wanted(self, device: FetchDevice, index: int) -> tuple[object, int, int] | None:
        """See PrefetchHandle.next_window."""
        flight = self.flights.get((device.cached, index))
        given_up = flight is not None and flight.window is not None and flight.window.cancelled
        if device.cached.present(index, index) or (flight is not None and not given_up):
            return None
        start, size, blob_index, codec, *_ = device.table.rows[index].item()
        if codec == Codec.ZERO:
            device.cached.mark_zeros([index])
            return None
        source, blob, _ = device.blobs[blob_index]
        return (id(source), blob), start, size

    def _start_background(self) -> bool:
        if not self.courtesy.may_read_ahead(self.bounds.background_streams, in_turn=bool(self.peering.peered)):
            return False
        lane = self.lanes.next_background(trio.current_time())
        if lane is None:
            return False
        flights = lane.background.pop_run(self.bounds.merge_bytes_max)
        transfer = Transfer(flights, Priority.BACKGROUND, self.courtesy.ahead_brake)
        lane.share.add(transfer.size, trio.current_time())
        self._start(transfer)
        return True

    def _start(self, transfer: Transfer) -> bool:
        """Hand it to a thread, which gives the references back. False: a cached device is closed already."""
        for position, flight in enumerate(transfer.flights):
            if not flight.device.cached.try_retain():
                for retained in transfer.flights[:position]:
                    retained.device.cached.release()
                error = CacheError(f"cached device {flight.device.cached.digest.short}: already closed")
                for failed in transfer.flights:
                    self.fail(failed, error)
                return False
        self.running[transfer.priority] += 1
        self.courtesy.begin_transfer(transfer)
        transfer.seconds_max = self.lanes.sources.of(transfer.source).begin()
        self.statistics.requests += 1
        self._workers.start(transfer)
        return True

    # --- what ends ------------------------------------------------------------------------------------------------

    def _finished(self, transfer: Transfer) -> None:
        """The thread is through with it."""
        self.running[transfer.priority] -= 1
        self.courtesy.end_transfer(transfer)
        self.statistics.count(transfer)
        probe_at = self.lanes.judge(transfer, trio.current_time())
        if probe_at is not None and not self.closed:
            self._nursery.start_soon(self._later, probe_at, [])
        again: list[Flight] = []
        for flight in transfer.flights:
            if flight.done and flight.error is None:
                flight.device.origin_chunks += 1
                self.land(flight)
            elif not flight.done and (flight.waiters or not flight.overtaken):
                again.extend(self._not_landed(flight, transfer))
        handle = self._windows.pop(transfer, None)
        if handle is not None:
            handle.window_ended(transfer)
            again = self._give_back(handle, transfer, again)
            handle.check_end()
        lane = self.lanes.get(transfer.source)
        if lane is not None and transfer.priority is Priority.FOREGROUND:
            lane.running_count -= 1
            lane.state.running_count -= 1
        if not self.closed:
            self._try_again(again, transfer)
        self.lanes.sweep(trio.current_time())
        self.dispatch()

    def land(self, flight: Flight) -> None:
        self._remove(flight)
        if flight.data is not None:
            self.statistics.not_stored += 1
            self._unstored_at = trio.current_time()
            self.spill.put(flight.device.cached, flight.index, flight.data)
        flight.wake()
        self.peering.ended(flight)

    def _not_landed(self, flight: Flight, transfer: Transfer) -> list[Flight]:
        """The flight, if it is to be tried again; else it has failed."""
        if transfer.cut_short and flight.bad is None:
            return [flight]
        self.statistics.bad_chunks += flight.bad is not None
        again, error = retry.verdict(flight, transfer, down=self.lanes.sources.of(flight.source).down)
        if again and not self.closed and (flight.waiters or transfer.priority is not Priority.FOREGROUND):
            return [flight]
        self.fail(flight, error)
        return []

    def _give_back(self, handle: PrefetchHandle, transfer: Transfer, again: list[Flight]) -> list[Flight]:
        """Of a failed window, those that nobody waits for go back into the plan; returns the others."""
        if transfer.error is None and not transfer.cut_short:
            handle.failure_count = 0
            return again
        unwanted = [flight for flight in again if not flight.waiters]
        for flight in unwanted:
            self._remove(flight)
        if transfer.error is None:
            handle.cancel()    # there is no room for what is fetched ahead
            return [flight for flight in again if flight.waiters]
        self.set_back(handle, transfer, transfer.error, unwanted)
        return [flight for flight in again if flight.waiters]

    def set_back(self, handle: PrefetchHandle, window: Transfer, error: LazyfsError, unwanted: list[Flight]) -> None:
        """Of a window that failed these go into the plan again, after a pause."""
        if window.landed_count:
            handle.failure_count = 0
        down = self.lanes.sources.of(window.source).down
        handle.failed(error, [(flight.device, flight.index) for flight in unwanted], counts=not down)
        self.pause(handle, retry.pause_s(error, max(1, handle.failure_count)))

    def pause(self, handle: PrefetchHandle, pause_s: float) -> None:
        """Its next window starts that much later."""
        handle.paused_until = trio.current_time() + pause_s
        if not self.closed:
            self._nursery.start_soon(self._later, handle.paused_until, [])

    def _try_again(self, flights: list[Flight], transfer: Transfer) -> None:
        """Queue them: at once after bad bytes, after a pause when the source failed."""
        error = transfer.error
        if error is None:
            self.statistics.retries += bool(flights)
            self.queue(flights)
            return
        now = trio.current_time()
        state = self.lanes.sources.of(transfer.source)
        until = now + retry.pause_s(error, max([1, *(flight.attempt_count for flight in flights)]))
        if isinstance(error, RateLimitedError) and error.retry_after_s is not None:
            state.paused_until = until    # for all who want something of this source
        elif not flights:
            return
        self.statistics.retries += 1
        with requestid.during(transfer.request):
            _log.info("%s: trying %d chunks again: %s", transfer.source.name, len(flights), error)
        if state.down:
            self.queue(flights, again=True)    # they go when a probe has been answered
            return
        until = max(until, now + state.retry_wait_s(now))
        self._nursery.start_soon(self._later, until, flights)

    async def _later(self, until: float, flights: list[Flight]) -> None:
        """Checkpoint: yes; on cancel: the engine is closing and has failed the flights. `until`: trio's clock."""
        await trio.sleep_until(until)
        self.queue(flights, again=True)
        self.lanes.sweep(trio.current_time())
        self.dispatch()

    def queue(self, flights: list[Flight], *, again: bool = False) -> None:
        """`again`: the origin has failed; what reads wait for is asked of peers first, who may have it by now."""
        for flight in flights:
            if flight.wanted and not flight.waiters:    # its reader left during the pause
                self.fail(flight, DeadlineError(f"{flight.source.name}: chunk {flight.index}: nobody waits for it"))
            elif not (again and flight.waiters and self.peering.took(flight, Priority.FOREGROUND, HERE_ONLY)):
                lane = self.lanes.of(flight.source)
                (lane.foreground if flight.waiters else lane.background).push(flight)

    def fail(self, flight: Flight, error: LazyfsError) -> None:
        self._remove(flight)
        if flight.waiters:    # else nobody was told, and the first who asks gets a try
            flight.device.remember_error(flight.index, error)
        flight.fail(error)
        self.peering.ended(flight)

    # --- small helpers --------------------------------------------------------------------------------------------

    def _new_flight(self, device: FetchDevice, index: int, deadline: float) -> Flight:
        flight = Flight(device, index, deadline)
        if flight.codec == Codec.ZERO:
            device.cached.mark_zeros([index])
            flight.done = True
        else:
            old = self.flights.get((device.cached, index))
            if old is not None:
                old.overtaken = True
            self.flights[device.cached, index] = flight
        return flight

    def reason(self, flight: Flight) -> LazyfsError | None:
        """Why it is not there yet, if something went wrong."""
        return flight.last_error or self.lanes.sources.of(flight.source).last_error

    def _remove(self, flight: Flight) -> None:
        key = (flight.device.cached, flight.index)
        if self.flights.get(key) is flight:
            del self.flights[key]
