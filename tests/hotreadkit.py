"""
Made-up layer devices with a hot device over them, each blob in its own source: `async with hot_bench(...) as b`.

The hot blob's source is `b.hot_source`, the layers' is `b.source`; both misbehave on demand (tests.fetchkit).
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from lazyfs.cache.store import CacheDir
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.fetch.hotview import HotDevice, HotView
from lazyfs.image.codec import Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.hot import EXTENT
from lazyfs.image.table import ROW, parse_table
from tests.fetchkit import CHUNK, MemorySource, Sample, make_sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from lazyfs.fetch.device import FetchDevice

BLOCK = 4096
CHUNK_BLOCKS = CHUNK // BLOCK
PLAIN = FetchLimits(readahead=False)
LAYERS = [make_sample(6, seed=1, zeros=(4,)), make_sample(5, seed=2)]


def hot_sample(layers: Sequence[Sample], extents: Sequence[tuple[int, int, int]]) -> Sample:
    """The hot device of these (first, device, count): a sample as the converter would make it."""
    data = b"".join(layers[device].data[first * BLOCK : (first + count) * BLOCK] for first, device, count in extents)
    rows, stored = [], b""
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        used, piece = compress(chunk, Codec.LZ4, 1)
        rows.append((len(stored), len(piece), 0, used, 0, chunk_digest(chunk)))
        stored += bytes(piece)
    table = parse_table(np.array(rows, dtype=ROW).tobytes(), CHUNK, len(data), [len(stored)])
    return Sample(data, stored, Digest.of(stored), table)


class HotBench:
    """`devices`: of the layers, each with its view of `hot`."""

    def __init__(self, fetcher: Fetcher, cache: CacheDir, extents: Sequence[tuple[int, int, int]],
                 layers: Sequence[Sample] = LAYERS) -> None:
        self.fetcher, self.cache, self.layers = fetcher, cache, layers
        self.sample = hot_sample(layers, extents)
        self.source = MemorySource({one.blob: one.stored for one in layers})
        self.hot_source = MemorySource({self.sample.blob: self.sample.stored}, "memory:hot")
        self.devices = [one.device(cache, self.source) for one in layers]
        self.hot = HotDevice(self.sample.device(cache, self.hot_source), np.array(extents, dtype=EXTENT))
        for number, device in enumerate(self.devices):
            device.hot = HotView(self.hot, number)

    async def read(self, device: int, offset: int, size: int, seconds: float = 20.0) -> None:
        found = await self.fetcher.read(self.devices[device], offset, size, deadline=time.monotonic() + seconds)
        assert bytes(found) == self.layers[device].data[offset : offset + size]

    async def blocks(self, device: int, first: int, count: int = 1, seconds: float = 20.0) -> None:
        await self.read(device, first * BLOCK, count * BLOCK, seconds)

    def every_device(self) -> list[FetchDevice]:
        return [*self.devices, self.hot.device]


@asynccontextmanager
async def hot_bench(tmp_path, extents, layers=LAYERS, bounds: FetchLimits = PLAIN) -> AsyncIterator[HotBench]:
    with CacheDir.open(tmp_path / "cache") as cache:
        async with Fetcher(bounds) as fetcher:
            made = HotBench(fetcher, cache, extents, layers)
            try:
                yield made
            finally:
                made.source.gate.set()
                made.hot_source.gate.set()
        assert not fetcher._scheduler.flights
        for device in made.every_device():
            device.cached.release()
            assert not device.cached.try_retain()    # nobody holds it still
