"""
Exact reads of layer devices: out of the cache when it is there, else fetched, once, whoever asks.

One Fetcher a worker. Everything here runs on the trio loop; the blocking work is in fetch.transfer, in threads. Who
calls: lazyfs.fs (read), lazyfs.node (prefetch, statistics). Concurrency, state by state: docs/concurrency.md.
"""

from __future__ import annotations

import contextlib
import copy
import time
from typing import TYPE_CHECKING, Any, Self

import trio

from lazyfs.errors import BugError, CacheError, DeadlineError, LazyfsError
from lazyfs.fetch.budget import Budget, NoRoomError
from lazyfs.fetch.constants import (
    CLOSE_GRACE_S,
    ERROR_MEMORY_S,
    HELD_BYTES_MAX,
    READ_ROUND_COUNT_MAX,
    READAHEAD_PEERED_TIMES,
    VERIFY_DEADLINE_SHARE,
    FetchLimits,
)
from lazyfs.fetch.copying import CopyHandle, CopyTerms
from lazyfs.fetch.hotview import HOT_DEADLINE_SHARE
from lazyfs.fetch.prefetch import PrefetchHandle
from lazyfs.fetch.readtrace import CURRENT
from lazyfs.fetch.scheduler import Scheduler
from lazyfs.registry.mirrors import HEALTH

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from lazyfs.fetch.budget import Reservation
    from lazyfs.fetch.device import FetchDevice
    from lazyfs.fetch.flight import Flight
    from lazyfs.fetch.hotview import HotDevice, Part
    from lazyfs.fetch.peering import Peering
    from lazyfs.fetch.statistics import FetchStatistics

    Memory = dict[int, bytes | memoryview]

__all__ = ["CopyHandle", "CopyTerms", "FetchLimits", "Fetcher", "PrefetchHandle"]


class Fetcher:
    """`async with Fetcher() as fetcher`: nothing of it outlives the block, but threads that hang in a source."""

    def __init__(self, bounds: FetchLimits | None = None) -> None:
        self._bounds = bounds or FetchLimits()
        self._budget = Budget(HELD_BYTES_MAX)
        self._manager: AbstractAsyncContextManager[trio.Nursery] = trio.open_nursery()

    async def __aenter__(self) -> Self:
        self._nursery = await self._manager.__aenter__()
        self._scheduler = Scheduler(self._bounds, self._nursery)
        self._statistics = self._scheduler.statistics
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._scheduler.close()
        with trio.move_on_after(CLOSE_GRACE_S, shield=True):
            await self._scheduler.drained()
        self._nursery.cancel_scope.cancel()
        return await self._manager.__aexit__(kind, error, trace)

    @property
    def statistics(self) -> FetchStatistics:
        return self._statistics

    @property
    def peering(self) -> Peering:
        """What goes to peers, and to whom."""
        return self._scheduler.peering

    def flights(self) -> Collection[Flight]:
        """Chunks on their way, for whoever shows what is going on."""
        return self._scheduler.flights.values()

    def running(self) -> dict[str, int]:
        """How many transfers of each priority are under way, by its name in lower case."""
        return {priority.name.lower(): count for priority, count in self._scheduler.running.items()}

    def describe_sources(self) -> list[dict[str, Any]]:
        """Each source's state, for people and metrics: SourceState.describe()."""
        return self._scheduler.lanes.sources.describe(trio.current_time())

    @staticmethod
    def describe_servers() -> list[dict[str, Any]]:
        """The same of each server, registries and their mirrors: Health.describe(). Of all fetchers of the process."""
        return HEALTH.describe()

    async def read(self, device: FetchDevice, offset: int, size: int, *, deadline: float) -> bytes | memoryview:
        """
        Exactly `size` bytes of the device from `offset`.

        Checkpoint: only when something must be fetched. On cancel: what is on its way goes on.

        Args:
            device: whose table, cache and blobs are used.
            offset: bytes.
            size: bytes; offset + size <= device.size.
            deadline: absolute, time.monotonic() seconds.

        Raises:
            DeadlineError: not there in time. SourceError, IntegrityError, FormatError: the source did not deliver, or
            not these bytes. CacheError: this machine does not keep them. BugError: the range is not in the device.

        """
        end = offset + size
        if offset < 0 or size < 0 or end > device.size:
            raise BugError(f"read of {size} bytes at {offset} of a device of {device.size}")
        if not size:
            return b""
        first, last = offset >> device.shift, (end - 1) >> device.shift
        if device.hot is not None and not device.cached.present(first, last):
            hot_data = await self._read_hot(device, offset, size, deadline)
            if hot_data is not None:
                return hot_data
        if device.touched.find(0, first, last + 1) >= 0:
            samples = device.cached.sample(self._first_touch(device, first, last))
            if samples:
                await self._verify(device, samples, deadline)
        data = device.cached.read_if_present(offset, size)
        if data is not None:
            self._statistics.hits += 1
            return data
        return await self._read_missing(device, offset, size, deadline)

    def prefetch(self, plan: Sequence[tuple[FetchDevice, int]]) -> PrefetchHandle:
        """
        Fetch chunks in this order, below foreground reads: few large requests where they are neighbours in a blob.

        Args:
            plan: (device, chunk index); those present are skipped.

        """
        handle = PrefetchHandle(plan, self._bounds, self._scheduler.courtesy.prefetch_brake)
        self._scheduler.add_prefetch(handle)
        return handle

    async def watch(self, device: FetchDevice, index: int, timeout_s: float) -> None:
        """
        Until a chunk's flight is over, or the time is; without being one who wants it. Checkpoint: yes.

        For those who look afterwards whether it is there. Without a flight: the time.
        """
        flight = self._scheduler.flights.get((device.cached, index))
        with trio.move_on_after(timeout_s):
            if flight is None or flight.done:    # done: it is here in a moment, or could not be stored
                await trio.sleep(timeout_s)
            else:
                await flight.wait()

    def copy(self, plan: Sequence[tuple[FetchDevice, int]], terms: CopyTerms) -> CopyHandle:
        """
        Fetch chunks in the background, below everything else, as gently as `terms` say.

        Args:
            plan: (device, chunk index), best in the order of their blobs; those present are skipped.
            terms: of this copy; several at once have a rate each.

        """
        handle = CopyHandle(plan, terms, self._scheduler.copies.traffic)
        self._scheduler.add_copy(handle)
        return handle

    def nudge(self) -> None:
        """A copy was held, or is not any more: look what may start."""
        self._scheduler.dispatch()

    # --- the hot device -------------------------------------------------------------------------------------------

    async def _read_hot(self, device: FetchDevice, offset: int, size: int, deadline: float) -> bytes | None:
        """
        The range out of the hot device, and what is present of the layer's; None: the layer's chunks are the way.

        Never raises LazyfsError: whatever is wrong with the hot blob, the layers have its blocks too.
        """
        assert device.hot is not None
        hot = device.hot.hot
        parts = device.hot.parts(device, offset, size)
        if parts is None or not self._hot_is_sooner(device, hot, parts, offset, size):
            return None
        chunks = _chunks(hot.device, parts)
        missing = [index for index in chunks if not hot.device.cached.present(index, index)]
        if not hot.device.cached.try_retain():
            return None    # unmounted meanwhile
        if not device.cached.try_retain():
            hot.device.cached.release()
            return None
        try:
            now = time.monotonic()
            with self._reserve(hot.device, missing) as room:
                memory = await self._arrive(hot.device, missing, now + (deadline - now) * HOT_DEADLINE_SHARE, room)
            pieces = [_assemble(one, start, length, memory if one is hot.device else {})
                      for one, start, length in parts]
        except BugError:
            raise
        except (NoRoomError, LazyfsError) as error:
            if isinstance(error, LazyfsError):
                hot.failed(error)
            return None
        finally:
            device.cached.release()
            hot.device.cached.release()
        data = b"".join(piece for piece in pieces if piece is not None)
        if len(data) != size:
            return None    # a chunk has vanished from the cache again: an I/O error on its disk
        for index in chunks:
            self._count_touch(hot.device, index, index)
        self._statistics.hits += not missing
        self._statistics.misses += bool(missing)
        self._statistics.hot_reads += 1
        return data

    def _hot_is_sooner(self, device: FetchDevice, hot: HotDevice, parts: list[Part], offset: int, size: int) -> bool:
        """Whether to wait for the hot device's chunks, or for the layer's."""
        flights, cached = self._scheduler.flights, hot.device.cached
        if all(cached.present(index, index) or (cached, index) in flights for index in _chunks(hot.device, parts)):
            return True
        missing = device.cached.missing(offset >> device.shift, (offset + size - 1) >> device.shift)
        return not hot.failing and not all((device.cached, index) in flights for index in missing)

    # --- reads that wait ------------------------------------------------------------------------------------------

    async def _read_missing(
        self, device: FetchDevice, offset: int, size: int, deadline: float
    ) -> bytes | memoryview:
        self._statistics.misses += 1
        if not device.cached.try_retain():
            raise CacheError(f"cached device {device.cached.digest.short}: already closed")
        try:
            # More than one round only when chunks vanish again: an I/O error on the cache's disk.
            for _ in range(READ_ROUND_COUNT_MAX):
                data = await self._read_once(device, offset, size, deadline)
                if data is not None:
                    return data
        except LazyfsError:
            self._statistics.errors += 1
            raise
        finally:
            device.cached.release()
        self._statistics.errors += 1
        raise CacheError(f"cached device {device.cached.digest.short}: chunks at {offset} + {size} do not stay")

    async def _read_once(
        self, device: FetchDevice, offset: int, size: int, deadline: float
    ) -> bytes | memoryview | None:
        first, last = offset >> device.shift, (offset + size - 1) >> device.shift
        missing = device.cached.missing(first, last)
        with self._reserve(device, missing) as room:
            memory: Memory | None = None
            with contextlib.suppress(NoRoomError):    # over when we wait: its traceback holds the chunks
                memory = await self._arrive(device, missing, deadline, room)
            if memory is None:
                await room.wait(deadline)
                memory = await self._arrive(device, missing, deadline, room)
            data = device.cached.read_if_present(offset, size)
            return _assemble(device, offset, size, memory) if data is None else data

    def _reserve(self, device: FetchDevice, missing: list[int]) -> Reservation:
        """Room for chunks that may have to be held, if they are several: one is given away as soon as it is here."""
        return self._budget.reserve(len(missing) * device.table.chunk_size if len(missing) > 1 else 0)

    async def _arrive(
        self, device: FetchDevice, missing: list[int], deadline: float, room: Reservation
    ) -> Memory:
        """
        Until these chunks are there; returns those that could not be stored.

        Raises:
            NoRoomError: there are such, and `room` is not to be had now.

        """
        memory: Memory = {}
        flights: list[Flight] = []
        for index in missing:
            spilled = self._scheduler.spill.get(device.cached, index)
            if spilled is not None:
                room.take()
                memory[index] = spilled
                continue
            error = device.remembered_error(index)
            if error is not None:
                raise copy.copy(error)
            flights.append(self._scheduler.join(device, index, deadline))
        for flight in flights:
            flight.waiters += 1
        trace = CURRENT.get()
        if trace is not None:
            trace.joined(flights)
        self._scheduler.dispatch()
        try:
            for flight in flights:    # grows: see _instead
                await self._wait(flight, deadline)
                if flight.error is not None:
                    flights.extend(self._instead(device, flight, deadline))
                elif flight.data is not None:
                    room.take()
                    memory[flight.index] = flight.data
        finally:
            for flight in flights:
                flight.waiters -= 1
        return memory

    async def _wait(self, flight: Flight, deadline: float) -> None:
        began = time.monotonic()
        with trio.move_on_after(max(0.0, deadline - began)):
            await flight.wait()
        if flight.done:
            return
        where = f"{flight.source.name}: blob {flight.blob.short}"
        error = self._scheduler.reason(flight)
        reason = f"; the last attempt failed: {error}" if error else ""
        late = DeadlineError(
            f"{where}: chunk {flight.index} did not arrive within its deadline{reason}",
            hint="is the registry reachable, and the link not overloaded?",
        )
        if time.monotonic() - began > ERROR_MEMORY_S:    # not for callers in a hurry
            flight.device.remember_error(flight.index, late)
        raise late

    def _instead(self, device: FetchDevice, failed: Flight, deadline: float) -> list[Flight]:
        """If it was another image's source that failed, ours may be better: a flight of our own. Else raises."""
        assert failed.error is not None
        if failed.device is device:
            raise copy.copy(failed.error)
        if device.cached.present(failed.index, failed.index):
            return []
        flight = self._scheduler.join(device, failed.index, deadline)
        flight.waiters += 1
        self._scheduler.dispatch()
        return [flight]

    @staticmethod
    async def _verify(device: FetchDevice, indexes: list[int], deadline: float) -> None:
        """What is damaged is missing afterwards. A disk that takes too long is left alone: the read tries its luck."""
        def verify() -> None:
            if not device.cached.try_retain():
                return    # unmounted meanwhile
            try:
                for index in indexes:
                    device.cached.verify(index)
            finally:
                device.cached.release()

        with trio.move_on_after((deadline - time.monotonic()) * VERIFY_DEADLINE_SHARE):
            await trio.to_thread.run_sync(verify, abandon_on_cancel=True)

    def _first_touch(self, device: FetchDevice, first: int, last: int) -> list[int]:
        """Count, and read ahead. The read's own missing chunks go first. Returns what is touched for the first time."""
        fresh = self._count_touch(device, first, last)
        if not self._bounds.readahead or self._scheduler.prefetches:
            return fresh
        missing = set(device.cached.missing(first, last))
        times = READAHEAD_PEERED_TIMES if device.resource.key in self.peering.peered else 1
        for index in fresh:
            ahead = device.readahead.advance(index, missing=index in missing, times=times)
            last_ahead = min(ahead.stop, device.table.chunk_count) - 1
            if ahead.start <= last_ahead:
                self._scheduler.read_ahead(device, device.cached.missing(ahead.start, last_ahead))
                if not missing:
                    self._scheduler.dispatch()
        return fresh

    def _count_touch(self, device: FetchDevice, first: int, last: int) -> list[int]:
        """Returns the chunks that are touched for the first time."""
        before = device.touched_stored_bytes
        fresh = device.touch(first, last)
        self._statistics.touched_stored_bytes += device.touched_stored_bytes - before
        return fresh


def _chunks(hot: FetchDevice, parts: list[Part]) -> list[int]:
    """Which chunks of the hot device the parts of a read need; each once, ascending."""
    found = {index for device, start, length in parts if device is hot
             for index in range(start >> hot.shift, ((start + length - 1) >> hot.shift) + 1)}
    return sorted(found)


def _assemble(device: FetchDevice, offset: int, size: int, memory: Memory) -> bytes | None:
    """The range out of chunks in memory and in the cache; None if one is in neither (any more)."""
    parts: list[bytes | memoryview] = []
    position, end = offset, offset + size
    while position < end:
        index = position >> device.shift
        base = index << device.shift
        upto = min(end, base + device.table.chunk_size)
        if index in memory:
            parts.append(memoryview(memory[index])[position - base : upto - base])
        else:
            data = device.cached.read_if_present(position, upto - position)
            if data is None:
                return None
            parts.append(data)
        position = upto
    return b"".join(parts)
