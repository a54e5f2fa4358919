"""
A fetcher over a cache and one made-up device, for tests: `async with bench(tmp_path) as b`.

When the block ends, nothing may be left: no flight, no lane, no reference to the device.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from tests.fetchkit import CHUNK, MemorySource, make_sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SAMPLE = make_sample(12, zeros=(5,))
PLAIN = FetchLimits(readahead=False, window_bytes_first=2 << 20, window_bytes_max=2 << 20)


class Bench:
    """A fetcher, a cache, one device and its source."""

    def __init__(self, fetcher: Fetcher, cache: CacheDir, source: MemorySource, sample=SAMPLE) -> None:
        self.fetcher, self.cache, self.source, self.sample = fetcher, cache, source, sample
        self.device = sample.device(cache, source)

    async def read(self, offset: int, size: int, seconds: float = 20.0) -> bytes:
        data = await self.fetcher.read(self.device, offset, size, deadline=time.monotonic() + seconds)
        assert bytes(data) == self.sample.data[offset : offset + size]
        return bytes(data)

    async def chunk(self, index: int, seconds: float = 20.0) -> None:
        await self.read(index * CHUNK, min(CHUNK, len(self.sample.data) - index * CHUNK), seconds)

    async def settled(self) -> None:
        """Until no transfer runs: a read returns before the bookkeeping of its last chunk."""
        with trio.fail_after(20):
            while self.fetcher._scheduler._workers.running:    # noqa: ASYNC110
                await trio.sleep(0.001)

    async def asked(self, count: int) -> None:
        """Until so many requests have come."""
        with trio.fail_after(20):
            while len(self.source.requests) < count:    # noqa: ASYNC110
                await trio.sleep(0.001)


@asynccontextmanager
async def bench(tmp_path, bounds: FetchLimits = PLAIN, sample=SAMPLE) -> AsyncIterator[Bench]:
    source = MemorySource({sample.blob: sample.stored})
    with CacheDir.open(tmp_path / "cache") as cache:
        async with Fetcher(bounds) as fetcher:
            made = Bench(fetcher, cache, source, sample)
            try:
                yield made
            finally:
                source.gate.set()
        scheduler = fetcher._scheduler
        assert not scheduler.flights
        assert not scheduler.lanes
        assert not any(scheduler.running.values())
        made.device.cached.release()
        assert not made.device.cached.try_retain()    # nobody holds it still
