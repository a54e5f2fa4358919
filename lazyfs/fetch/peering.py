"""
Chunks from peers: flights of a device that has a swarm go there first, and what comes back goes to the registry.

A *job* is one call of Swarm.fetch for flights of one device: no thread waits for a peer, only the digest's check and
the write into the cache are done in one. What the origin must give is handed to the scheduler's lanes at once, as any
missing chunk is. Invariants: a flight is with a job, or in a queue, a transfer or a pause of the scheduler, never in
two of them but while its last bytes are being checked; a job ends by its deadline, which is a share of its flights'.

Layer: fetch. Who calls: fetch.scheduler (`takes`, `take`, `flush`, `start_window`, `ended`), fetch.engine. On the
loop; `keep` runs in a thread. State: the jobs under way, and the windows of which something is under way.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import TYPE_CHECKING, Protocol

import trio

from lazyfs import limits
from lazyfs.errors import DeadlineError, LazyfsError, PeerBusyError, SourceError
from lazyfs.fetch.constants import ABANDON_S
from lazyfs.fetch.peerwindow import PeerWindow
from lazyfs.fetch.transfer import Priority, keep
from lazyfs.peers import model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.flight import Flight
    from lazyfs.fetch.prefetch import PrefetchHandle
    from lazyfs.fetch.scheduler import Scheduler
    from lazyfs.fetch.transfer import Wake

# A read whose peers are all silent still has half of its time for the registry; who is asked by a peer keeps less
# back, for each hop on the way takes its share, and the asker has a registry too.
SHARE, PASSED_ON_SHARE = 0.5, 15 / 16
FIRST_VIEW_S = 2.0               # a tracker answers who joins after 1.5 s at most, so that all who join see each other
PASSED_ON_MAX = 1024             # chunks fetched for others at once: two windows of a full tree of 16 askers
BUSY_S = 0.5                     # then they may ask again
SETTLE_THREAD_COUNT = 4          # BLAKE3 and pwrite let go of the interpreter lock; a node has few cores to spare
SWEEP_S = 1.0                    # how soon it is noticed that nobody waits any more
_log = logging.getLogger(__name__)


class Swarming(Protocol):
    """peers.swarm.Swarm, as far as it is needed here."""

    async def fetch(self, resource: model.Resource, indexes: Sequence[int], *, priority: model.Priority,
                    deadline: float, hops: int, deliver: model.Deliver, request: str = "",
                    origin: model.Origin | None = None) -> list[int]: ...

    def urge(self, key: str, index: int) -> None: ...


class _Job:
    """
    One call of Swarm.fetch.

    :flights: those that are with it, by index.
    :landing: of these, those being checked and stored.
    :returned: of those, what is handed on if it turns out to be wrong.
    """

    def __init__(self, peering: Peering, flights: list[Flight], priority: Priority, hops: int,
                 window: PeerWindow | None) -> None:
        self._peering = peering
        self.all = flights
        self.flights = {flight.index: flight for flight in flights}
        self.landing: set[int] = set()
        self.returned: set[int] = set()
        self.priority = priority
        self.hops = hops
        self.window = window
        self.scope = trio.CancelScope()
        self.unwanted_since: float | None = None

    async def run(self) -> None:
        """Until all its flights have landed or were handed on. Never raises an Exception."""
        first = self.all[0]
        resource = first.device.resource
        left_s = max(flight.deadline for flight in self.all) - time.monotonic()
        swarm_s = max(0.0, left_s * (PASSED_ON_SHARE if self.hops else SHARE))
        deadline = trio.current_time() + swarm_s
        try:
            with self.scope:
                await self._peering.viewed(resource.key, swarm_s)
                self.hand_on(await self._peering.swarm.fetch(
                    resource, sorted(self.flights), priority=model.Priority(self.priority),
                    deadline=deadline, hops=self.hops, deliver=self.deliver,
                    request=next((flight.request for flight in self.all if flight.request), ""),
                    origin=self.hand_on))
        except LazyfsError as error:
            _log.info("%s: peers: %s", resource.key, error)
        except Exception:  # noqa: BLE001 - the registry has it too; a read must not end with our mistake
            _log.exception("%s: peers failed in an unforeseen way", resource.key)
        finally:
            self.hand_on(list(self.flights))
            for flight in self.all:
                flight.device.cached.release()

    async def deliver(self, piece: model.Piece, member: model.Member) -> bool:
        """See model.Deliver."""
        index = piece.index
        flight = self.flights.get(index)
        if flight is None or index in self.landing or not flight.device.cached.try_retain():
            return True    # it has come from elsewhere meanwhile
        now = time.monotonic()
        flight.answered_at = flight.answered_at or now
        flight.received_at, flight.server = now, member.id
        self.landing.add(index)
        try:
            await trio.to_thread.run_sync(keep, flight, piece.data, self._peering.wake, limiter=self._peering.threads)
        finally:
            flight.device.cached.release()
            self.landing.discard(index)
            if flight.done:
                if self.flights.pop(index, None) is not None:
                    self._peering.landed(flight, self.priority)
            elif index in self.returned:
                self.hand_on([index])
        if not flight.done:
            flight.server = ""
            self._peering.scheduler.statistics.bad_chunks += 1
        return flight.done

    def hand_on(self, indexes: list[int]) -> None:
        """See model.Origin: to the registry, or nowhere if nobody wants them."""
        self.returned |= self.landing.intersection(indexes)
        self._peering.hand_on([flight for index in indexes if index not in self.landing
                               and (flight := self.flights.pop(index, None)) is not None], self)

    def is_wanted(self) -> bool:
        """Whether a read waits, or it is not for one."""
        return any(flight.waiters or not flight.wanted for flight in self.flights.values())


class Peering:
    """
    Of one fetcher.

    :swarm: None: there is none (yet); then nothing is taken.
    :in_use: devices by key: mounted, or being fetched as a whole. Several images may have one layer.
    :peered: keys of the resources that others have a part in as well, or may have: see `awaited`.
    :awaited: of these, whose others are not known yet: set when they are, and until when that is waited for.
    :changed: called when `in_use` has another key, or one less.
    :jobs: under way.
    :threads: that check and store.
    """

    def __init__(self, scheduler: Scheduler, nursery: trio.Nursery, wake: Wake) -> None:
        self.scheduler = scheduler
        self.wake = wake
        self.swarm: Swarming
        self.in_use: dict[str, list[FetchDevice]] = {}
        self.peered: set[str] = set()
        self.awaited: dict[str, tuple[trio.Event, float]] = {}
        self.changed: Callable[[], None] = lambda: None
        self.jobs: set[_Job] = set()
        self.threads = trio.CapacityLimiter(SETTLE_THREAD_COUNT)
        self._nursery = nursery
        self._pending: dict[tuple[FetchDevice, Priority, int], list[Flight]] = {}
        self._windows: dict[PeerWindow, PrefetchHandle] = {}
        self._beginning = False
        self._passing_on = 0

    def begin(self, swarm: Swarming) -> None:
        """From now on there is a swarm."""
        self.swarm = swarm
        self._nursery.start_soon(self._sweep)

    def close(self) -> None:
        """The flights have been failed by the scheduler."""
        self.peered = set()
        self._pending.clear()
        for job in self.jobs:
            job.flights.clear()
            job.scope.cancel()

    def use(self, devices: Iterable[FetchDevice], image: object = None) -> None:
        """These, of that image (FetchDevice.image), are in use from now on, before anything of them is fetched."""
        news = False
        for device in devices:
            device.image = image
            known = self.in_use.setdefault(device.resource.key, [])
            news = news or not known
            known.append(device)
        if news:
            self.changed()

    def leave(self, devices: Iterable[FetchDevice]) -> None:
        """They are not any more; those that were not are passed over."""
        news = False
        for device in devices:
            key = device.resource.key
            known = self.in_use.get(key, [])
            if device in known:
                known.remove(device)
                if not known:
                    del self.in_use[key]
                    self.peered.discard(key)
                    self.awaited.pop(key, None)
                    news = True
        if news:
            self.changed()

    def await_view(self, key: str, seconds: float = FIRST_VIEW_S) -> None:
        """Who else has a part in it will be known in a moment: what is asked for until then waits so long for it."""
        self.peered.add(key)
        self.awaited.setdefault(key, (trio.Event(), trio.current_time() + seconds))

    def view_came(self, key: str, *, others: bool) -> None:
        """`others`: whether anybody else has a part in it. Also: nobody knows, and it is not waited for."""
        (self.peered.add if others else self.peered.discard)(key)
        event, _ = self.awaited.pop(key, (None, 0.0))
        if event is not None:
            event.set()

    async def viewed(self, key: str, seconds: float) -> None:
        """Until that, or for so long. Checkpoint: perhaps."""
        event, until = self.awaited.get(key, (None, 0.0))
        if event is not None:
            with trio.move_on_at(min(until, trio.current_time() + seconds)):
                await event.wait()

    def takes(self, device: FetchDevice) -> bool:
        """Whether its flights go to peers."""
        return bool(self.peered) and device.resource.key in self.peered

    def took(self, flight: Flight, priority: Priority, hops: int = 0) -> bool:
        """A new flight: whether it goes to peers. It begins with flush()."""
        if not self.takes(flight.device):
            return False
        self._pending.setdefault((flight.device, priority, hops), []).append(flight)
        return True

    def urge(self, flight: Flight) -> None:
        """A read waits for it by now."""
        if self.takes(flight.device):
            self.swarm.urge(flight.device.resource.key, flight.index)

    def flush(self) -> None:
        """Begin what was taken, when the loop has had its turn: what is asked for at the same time goes together."""
        if self._pending and not self._beginning:
            self._beginning = True
            self._nursery.start_soon(self._begin_pending)

    async def _begin_pending(self) -> None:
        """Checkpoint: none."""
        self._beginning = False
        pending, self._pending = self._pending, {}
        for (_, priority, hops), flights in pending.items():
            self._start(flights, priority, hops, None)

    def start_window(self, handle: PrefetchHandle, flights: list[Flight]) -> bool:
        """Begin a window of a prefetch or a copy. False: a cached device is closed already."""
        window = PeerWindow(flights, handle.priority)
        for flight in flights:
            flight.window = window
            flight.deadline += limits.READ_DEADLINE_S + window.size / handle.rate_min
        devices = dict.fromkeys(flight.device for flight in flights)
        handle.running.add(window)
        self._windows[window] = handle
        self.scheduler.running[handle.priority] += 1
        started = [self._start([flight for flight in flights if flight.device is device], handle.priority, 0, window)
                   for device in devices]
        due_s = handle.brake.due_s(window.size)
        if due_s:
            self.scheduler.pause(handle, due_s)
        return all(started)

    def _start(self, flights: list[Flight], priority: Priority, hops: int, window: PeerWindow | None) -> bool:
        kept = [flight for flight in flights if flight.device.cached.try_retain()]
        for flight in flights[len(kept):]:    # of one device: all, or none
            self.scheduler.fail(flight, SourceError(f"{flight.source.name}: unmounted meanwhile", transient=False))
        if not kept:
            return False
        began = time.monotonic()
        for flight in kept:
            flight.begun_at = began
        job = _Job(self, kept, priority, hops, window)
        if window is not None:
            window.scopes.append(job.scope)
        self.jobs.add(job)
        self.scheduler.courtesy.begin(priority)
        self._nursery.start_soon(self._run, job)
        return True

    async def _run(self, job: _Job) -> None:
        try:
            await job.run()
        finally:
            self.jobs.discard(job)
            self.scheduler.courtesy.end(job.priority)
            self.scheduler.dispatch()

    def is_at_origin(self, device: FetchDevice, index: int) -> bool:
        """Whether a chunk is on its way, and not from a peer: nobody else is waited for."""
        flight = self.scheduler.flights.get((device.cached, index))
        return flight is not None and not any(job.flights.get(index) is flight for job in self.jobs) and not any(
            flight in flights for flights in self._pending.values())

    # --- for a peer ---------------------------------------------------------------------------------------------------

    async def pass_on(self, device: FetchDevice, index: int, *, deadline: float, hops: int, priority: Priority,
                      request: str = "", room: Callable[[int], bool] | None = None) -> bytes | memoryview | None:
        """
        Have a chunk that a peer asks for: on its way already, or fetched now. For a read as soon as its digest is good.

        Args:
            device: retained by the caller.
            index: of the chunk.
            deadline: absolute, time.monotonic() seconds.
            hops: that our own requests for it say.
            priority: the asker's; the registry is asked for it in the foreground only for a read.
            request: the id of the read that it is for.
            room: whether so many bytes may be held for the asker; else it waits until the cache has them.

        Returns:
            None: it is in the cache; else its bytes, for it is being stored, or could not be.

        Raises:
            PeerBusyError: too much is fetched for others. LazyfsError: it is not to be had in time.

        """
        error = device.remembered_error(index)
        if error is not None:
            raise copy.copy(error)
        spilled = self.scheduler.spill.get(device.cached, index)
        if spilled is not None:
            return spilled
        if self._passing_on >= PASSED_ON_MAX:
            raise PeerBusyError(f"{PASSED_ON_MAX} chunks are fetched for others already", retry_after_s=BUSY_S)
        is_read = priority is Priority.FOREGROUND
        if is_read:
            flight = self.scheduler.join(device, index, deadline, hops)
        else:
            flight = self.scheduler.fetch_for(device, index, deadline, priority, hops)
        flight.request = flight.request or request
        self._passing_on += 1
        flight.waiters += is_read
        early: bytes | memoryview | None = None
        self.scheduler.dispatch()
        try:
            with trio.move_on_after(max(0.0, deadline - time.monotonic())):
                if is_read:
                    await flight.wait_checked()
                    early = flight.checked if room is not None and room(flight.size) else None
                if early is None:
                    await flight.wait()
        finally:
            self._passing_on -= 1
            flight.waiters -= is_read
        if early is None and not flight.done:
            raise DeadlineError(f"{flight.source.name}: chunk {index} did not arrive within the asker's deadline")
        if early is None and flight.error is not None:
            raise copy.copy(flight.error)
        self.scheduler.statistics.passed_on += 1
        return flight.data if early is None else early

    # --- what becomes of flights ------------------------------------------------------------------------------------

    def landed(self, flight: Flight, priority: Priority) -> None:
        """It came from a peer."""
        self.scheduler.statistics.count_peer(priority, flight.size)
        self.scheduler.land(flight)

    def hand_on(self, flights: list[Flight], job: _Job) -> None:
        """To the registry: those that are still to come, and wanted."""
        if self.scheduler.closed:
            return
        given_up = job.window is not None and job.window.cancelled
        wanted = []
        for flight in flights:
            if flight.done:
                continue
            if (given_up or job.scope.cancel_called) and not flight.waiters:
                self.scheduler.fail(flight, SourceError(f"{flight.source.name}: nobody waits for it any more"))
            else:
                wanted.append(flight)
        if wanted:
            self.scheduler.queue(wanted)
            self.scheduler.dispatch()

    def ended(self, flight: Flight) -> None:
        """A flight of a window landed or failed, wherever it came from."""
        window = flight.window
        handle = self._windows.get(window) if isinstance(window, PeerWindow) else None
        if handle is None or not isinstance(window, PeerWindow):
            return
        if flight.data is not None:
            handle.cancel()    # there is no room for what is fetched ahead
        if not window.account(flight):
            return
        del self._windows[window]
        self.scheduler.running[handle.priority] -= 1
        handle.window_ended(window)
        failed = [one for one in window.flights if one.error is not None]
        if not failed:
            handle.failure_count = 0
        elif not handle.cancelled and failed[0].error is not None:
            self.scheduler.set_back(handle, window, failed[0].error, failed)
        handle.check_end()
        self.scheduler.dispatch()

    async def _sweep(self) -> None:
        """End the jobs for reads of which none waits any more: killed, most likely."""
        while True:
            await trio.sleep(SWEEP_S)
            now = trio.current_time()
            for job in list(self.jobs):
                if job.is_wanted():
                    job.unwanted_since = None
                elif job.unwanted_since is None:
                    job.unwanted_since = now
                elif now - job.unwanted_since > ABANDON_S:
                    job.scope.cancel()
