"""
What a node gives to its peers: chunks in its cache, and chunks of mounted images that it fetches because they ask.

Layer: node. Who calls: peers.server, by model.Store. On the loop; the disk is looked at in threads. State: devices that
are only cached and were asked for lately (open for IDLE_S); those in use are known to fetch.peering. A chunk that was
in the cache before is verified once before it is given away: who gives bytes that rotted on its disk would be taken
for a liar by everybody.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import trio

from lazyfs.errors import LazyfsError, PeerBusyError, PeerError, PeerLacksError
from lazyfs.fetch.transfer import Priority
from lazyfs.peers.model import COMING, HERE_ONLY, FileRange, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.cache.store import CachedDevice, CacheDir
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.peering import Peering
    from lazyfs.peers.model import PieceRequest, Resource

IDLE_S = 30.0                    # then a device that is only cached is closed: open, it could not be evicted
LOOK_S = 5.0
IDLE_MAX = 64                    # four descriptors each
THREAD_COUNT = 2                 # that look at the disk for others
READ_DEADLINE_MAX_S = 60.0       # of an asker: ours are not kept busy for longer


@dataclass(slots=True)
class _Idle:
    """A device that is only cached. `used_at`: trio's clock; `asked`: for it now, so it stays open."""

    cached: CachedDevice
    used_at: float
    asked: int = 0


@dataclass(slots=True)
class StoreCounts:
    """Since the start, in chunks."""

    from_cache: int = 0
    fetched: int = 0
    lacking: int = 0


@dataclass(eq=False)
class PeerStore:
    """A model.Store. `run` must run beside it. `room`: whether so many bytes may wait in memory to be sent."""

    cache: CacheDir
    peering: Peering
    counts: StoreCounts = field(default_factory=StoreCounts)
    room: Callable[[int], bool] = lambda _size: False
    _idle: dict[str, _Idle] = field(default_factory=dict)
    _opening: trio.Lock = field(default_factory=trio.Lock)
    _threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(THREAD_COUNT))
    _verified: WeakKeyDictionary[CachedDevice, bytearray] = field(default_factory=WeakKeyDictionary)

    async def run(self) -> None:
        """Close what nobody asked for lately; everything at the end."""
        try:
            while True:
                await trio.sleep(LOOK_S)
                now = trio.current_time()
                for key in [key for key, one in self._idle.items() if not one.asked and now - one.used_at >= IDLE_S]:
                    self._idle.pop(key).cached.release()
        finally:
            for one in self._idle.values():
                one.cached.release()
            self._idle.clear()

    async def piece(self, request: PieceRequest, index: int) -> memoryview | bytes | FileRange:
        """See model.Store."""
        resource = request.resource
        if resource.kind is not Kind.DEVICE:
            raise PeerLacksError(f"{resource.key}: this node gives layer devices")
        device = self._find(resource)
        if device is not None:
            try:
                return await self._of_device(device, request, index)
            finally:
                device.cached.release()
        idle = await self._open(resource)
        try:
            here = await self._here(idle.cached, resource, index)
        finally:
            idle.asked -= 1
            idle.used_at = trio.current_time()
        if here is None:
            self.counts.lacking += 1
            raise PeerLacksError(f"{resource.key}: piece {index} is not here, and the image is not in use")
        return here

    def coming(self, key: str, index: int) -> bool:
        """Whether a chunk of a device in use (Resource.key) is here, or on its way."""
        return any(device.cached.present(index, index) or (device.cached, index) in self.peering.scheduler.flights
                   for device in self.peering.in_use.get(key, ())[:1])

    def _find(self, resource: Resource) -> FetchDevice | None:
        """A device in use, retained."""
        for device in self.peering.in_use.get(resource.key, ()):
            _check(device.cached, resource)
            if device.cached.try_retain():
                return device
        return None

    async def _of_device(
        self, device: FetchDevice, request: PieceRequest, index: int
    ) -> memoryview | bytes | FileRange:
        deadline = time.monotonic() + min(request.seconds, READ_DEADLINE_MAX_S)
        for _ in range(2):    # a chunk may vanish again: an I/O error on our disk
            here = await self._here(device.cached, request.resource, index)
            if here is not None:
                return here
            lacks = (not self.coming(request.resource.key, index) if request.hops == COMING else
                     request.hops >= HERE_ONLY and not self.peering.is_at_origin(device, index))
            if lacks:
                self.counts.lacking += 1
                raise PeerLacksError(f"{request.resource.key}: piece {index} is not here")
            try:
                data = await self.peering.pass_on(
                    device, index, deadline=deadline, hops=request.hops + 1, priority=Priority(request.priority),
                    request=request.request, room=self.room)
            except (PeerBusyError, PeerLacksError):
                raise
            except LazyfsError as error:
                raise PeerLacksError(f"{request.resource.key}: piece {index}: {error}") from error
            self.counts.fetched += 1
            if data is not None:
                return data
        raise PeerError(f"{request.resource.key}: piece {index} does not stay in this node's cache")

    async def _here(self, cached: CachedDevice, resource: Resource, index: int) -> FileRange | None:
        """A chunk in the cache, with a reference that the range's release gives back; None: it is not there."""
        if cached.descriptor(index) is None or not await self._is_sound(cached, index):
            return None
        descriptor = cached.descriptor(index)
        if descriptor is None or not cached.try_retain():
            return None
        self.counts.from_cache += 1
        return FileRange(descriptor, index * resource.piece_size, resource.piece_bytes(index), cached.release)

    async def _is_sound(self, cached: CachedDevice, index: int) -> bool:
        if not cached.inherited(index):
            return True
        verified = self._verified.setdefault(cached, bytearray(cached.chunk_count))
        if not verified[index]:
            if await trio.to_thread.run_sync(cached.verify, index, limiter=self._threads) is False:
                return False
            verified[index] = 1
        return True

    async def _open(self, resource: Resource) -> _Idle:
        """A device that is in the cache. Raises PeerLacksError: it is not, or cannot be opened."""
        async with self._opening:    # one at a time: they are small files
            idle = self._idle.get(resource.key)
            if idle is None:
                cached = await trio.to_thread.run_sync(self._existing, resource, limiter=self._threads)
                if cached is None:
                    self.counts.lacking += 1
                    raise PeerLacksError(f"{resource.key}: not in this node's cache")
                idle = self._idle[resource.key] = _Idle(cached, trio.current_time())
                self._make_room()
            _check(idle.cached, resource)
            idle.asked += 1
            return idle

    def _make_room(self) -> None:
        unused = [key for key, one in self._idle.items() if not one.asked]
        for key in sorted(unused, key=lambda key: self._idle[key].used_at)[:max(0, len(self._idle) - IDLE_MAX)]:
            self._idle.pop(key).cached.release()

    def _existing(self, resource: Resource) -> CachedDevice | None:
        """In a thread."""
        try:
            return self.cache.existing_device(resource.digest.hex)
        except LazyfsError as error:
            raise PeerLacksError(f"{resource.key}: {error}") from error


def _check(cached: CachedDevice, resource: Resource) -> None:
    """Raises PeerLacksError: the asker has another idea of the sizes."""
    if (cached.chunk_size, cached.device_size) != (resource.piece_size, resource.size):
        raise PeerLacksError(f"{resource.key}: other sizes than this node's")
