"""
Prefetch over links of several rates and delays: `python -m benchmarks.streams [--rates 1000,100] [--rtts 1,20,100]`.

For each link, a hot blob of --megabytes is fetched ahead out of a docker-registry behind benchmarks.kit.delay: alone;
with a reader of chunks of another blob beside it; and the reader alone. Printed, a line of JSON a link: seconds of the
prefetch (and what the link needs at least), requests, CPU, and milliseconds a read. Nothing is kept.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import trio

from benchmarks.kit.delay import start_delay
from benchmarks.kit.link import make_link
from benchmarks.kit.proc import ToolError
from benchmarks.kit.registry import start_registry
from benchmarks.kit.workspace import measured
from lazyfs.cache.store import CacheDir
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.codec import Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.table import ROW, ChunkTable, parse_table
from lazyfs.limits import MIB
from lazyfs.registry import RegistryOptions, open_source

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.kit.workspace import Workspace
    from lazyfs.registry.place import ImageSource

_READ_PAUSE_S = 0.25
_READ_COUNT = 10  # of the reader alone
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Sample:
    """A device of chunks of 1 MiB that compress to two fifths, and its blob."""

    table: ChunkTable
    stored: bytes

    @classmethod
    def make(cls, chunk_count: int, seed: int) -> Sample:
        draw = random.Random(seed)
        base = [draw.randbytes(MIB * 2 // 5) + bytes(MIB - MIB * 2 // 5) for _ in range(8)]
        rows = np.zeros(chunk_count, dtype=ROW)
        stored = bytearray()
        for index in range(chunk_count):
            chunk = draw.randbytes(16) + base[index % 8][16:]
            codec, piece = compress(chunk, Codec.ZSTD, 1)
            rows[index] = (len(stored), len(piece), 0, codec, 0, chunk_digest(chunk))
            stored += piece
        return cls(parse_table(rows.tobytes(), MIB, chunk_count * MIB, [len(stored)]), bytes(stored))

    def device(self, cache: CacheDir, source: ImageSource) -> FetchDevice:
        cached = cache.device(self.table.device_digest(), MIB, self.table.device_size)
        return FetchDevice(self.table, cached, [(source, Digest.of(self.stored), len(self.stored))])


@dataclass
class Outcome:
    """Of one run."""

    prefetch_s: float = 0.0
    cpu_s: float = 0.0
    requests: int = 0
    reads_s: list[float] = field(default_factory=list)


async def run_once(host: str, cache_dir: Path, samples: tuple[Sample, Sample], *, ahead: bool, reads: bool) -> Outcome:
    """One start with an empty cache; the connection is warm. Raises LazyfsError."""
    source = open_source(f"docker://{host}/streams:none", RegistryOptions(insecure=True))
    found = Outcome()
    with CacheDir.open(cache_dir) as cache:
        hot, cold = (sample.device(cache, source) for sample in samples)
        async with Fetcher(FetchLimits(readahead=False)) as fetcher:
            await fetcher.read(cold, 0, 4096, deadline=time.monotonic() + _DEADLINE_S)
            cpu, began = time.process_time(), time.monotonic()
            handle = fetcher.prefetch([(hot, index) for index in range(hot.table.chunk_count)]) if ahead else None

            async def read() -> None:
                for index in range(1, cold.table.chunk_count, 2):
                    if (handle.done if handle is not None else index > 2 * _READ_COUNT) or not reads:
                        return
                    start = time.monotonic()
                    await fetcher.read(cold, index * MIB, MIB, deadline=start + _DEADLINE_S)
                    found.reads_s.append(time.monotonic() - start)
                    await trio.sleep(_READ_PAUSE_S)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                if handle is not None:
                    await handle.wait()
                    found.prefetch_s = time.monotonic() - began
            found.cpu_s, found.requests = time.process_time() - cpu, fetcher.statistics.requests
        if handle is not None and handle.error is not None:
            raise handle.error
        hot.cached.release()
        cold.cached.release()
    source.close()
    return found


def upload(host: str, data: bytes) -> None:
    """Put a blob into the registry. Raises ToolError."""
    name, _, port = host.partition(":")
    connection = http.client.HTTPConnection(name, int(port), timeout=_DEADLINE_S)
    try:
        connection.request("POST", "/v2/streams/blobs/uploads/")
        answer = connection.getresponse()
        answer.read()
        connection.request("PUT", f"{answer.headers['Location']}&digest={Digest.of(data)}", body=data)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 201:
            raise ToolError(f"the registry answers {answer.status} to a blob")
    finally:
        connection.close()


def measure(place: Workspace, rates: list[int], rtts: list[float], runs: int, megabytes: int) -> None:
    """All links, one after another. Raises ToolError, LazyfsError."""
    samples = Sample.make(round(megabytes * 1e6 / (0.4 * MIB)), 1), Sample.make(60, 2)
    link = make_link(place)
    registry = start_registry(place, link=link)
    for sample in samples:
        upload(registry.host, sample.stored)
    to_port = int(registry.host.rpartition(":")[2])
    for port, rtt_ms in enumerate(rtts, 6000):
        host = start_delay(place, link, port, to_port, rtt_ms)
        for rate in rates:
            link.set_rate(rate * 1_000_000)
            found: dict[str, list[Outcome]] = {"alone": [], "with_reads": [], "reads": []}
            for _ in range(runs):
                for name, (ahead, reads) in (("alone", (True, False)), ("with_reads", (True, True)),
                                             ("reads", (False, True))):  # fmt: skip
                    cache = place.folder("cache")
                    found[name].append(trio.run(_run, host, cache, samples, ahead, reads))
            least_s = len(samples[0].stored) * 8 / rate / 1e6
            print(
                json.dumps({"mbit_s": rate, "rtt_ms": rtt_ms, "least_s": round(least_s, 2), **_row(found)}),
                flush=True,
            )


async def _run(host: str, cache: Path, samples: tuple[Sample, Sample], ahead: bool, reads: bool) -> Outcome:
    return await run_once(host, cache, samples, ahead=ahead, reads=reads)


def _row(found: dict[str, list[Outcome]]) -> dict[str, object]:
    def median_ms(name: str) -> float:
        return round(1000 * statistics.median(time for one in found[name] for time in one.reads_s), 1)

    return {
        "prefetch_s": [round(one.prefetch_s, 2) for one in found["alone"]],
        "prefetch_with_reads_s": [round(one.prefetch_s, 2) for one in found["with_reads"]],
        "requests": [one.requests - 1 for one in found["alone"]],
        "cpu_s": [round(one.cpu_s, 2) for one in found["alone"]],
        "read_alone_ms": median_ms("reads"),
        "read_beside_ms": median_ms("with_reads"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    parser.add_argument("--rates", default="1000,100", help="Mbit/s")
    parser.add_argument("--rtts", default="1,20,100", help="ms")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=55)
    options = parser.parse_args()
    rates, rtts = ([*map(int, options.rates.split(","))], [*map(float, options.rtts.split(","))])
    return measured("streams", lambda place: measure(place, rates, rtts, options.runs, options.megabytes))


if __name__ == "__main__":
    sys.exit(main())
