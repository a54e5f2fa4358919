"""
Many readers at once in a process of their own, for tests/fault/test_overload.py: it prints JSON.

    python -m tests.overloadreads HOST CACHE_DIR READERS READ_BYTES [--files N] [--deadline S]

Each reader reads READ_BYTES of a chunk and a half that nobody else reads. The image is made anew from its seeds, so
nothing of it has to be in memory: 1 MiB chunks, of the same bytes over and over, which lz4 stores in a sixteenth.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path

import numpy as np
import trio

from lazyfs.cache.store import CacheDir
from lazyfs.errors import LazyfsError
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.engine import Fetcher, FetchLimits
from lazyfs.image.codec import Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.table import ROW, ChunkTable, parse_table
from lazyfs.node.serving import tune_malloc
from lazyfs.registry import RegistryOptions, open_source

CHUNK = 1 << 20
CHUNK_COUNT = 512
_UNIT = 60 * 1024            # less than lz4's window


def chunk(index: int) -> bytes:
    """A chunk's bytes."""
    return (random.Random(index).randbytes(_UNIT) * (CHUNK // _UNIT + 1))[:CHUNK]


def make_image() -> tuple[bytes, ChunkTable]:
    """The blob, 32 MB, and its table."""
    rows = np.zeros(CHUNK_COUNT, dtype=ROW)
    stored = []
    at = 0
    for index in range(CHUNK_COUNT):
        data = chunk(index)
        codec, piece = compress(data, Codec.LZ4, 1)
        rows[index] = (at, len(piece), 0, codec, 0, chunk_digest(data))
        stored.append(bytes(piece))
        at += len(piece)
    return b"".join(stored), parse_table(rows.tobytes(), CHUNK, CHUNK_COUNT * CHUNK, [at])


def status(name: str) -> int:
    """A number of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def open_count() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def run(options: argparse.Namespace) -> dict[str, object]:
    stored, table = make_image()
    source = open_source(f"{options.host}/repo:tag", RegistryOptions(insecure=True, io_timeout_s=20))
    errors: list[str] = []
    wrong = 0
    with CacheDir.open(Path(options.cache)) as cache:
        device = FetchDevice(table, cache.device(table.device_digest(), CHUNK, table.device_size),
                             [(source, Digest.of(stored), len(stored))])
        async with Fetcher(FetchLimits(readahead=False)) as fetcher:
            await fetcher.read(device, 0, 1, deadline=time.monotonic() + options.deadline)    # everything is imported
            before_kb = status("VmRSS")
            if options.files:
                used = open_count()
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + options.files, used + options.files))

            async def read(number: int) -> None:
                nonlocal wrong
                index = number % (CHUNK_COUNT - 2) + 1
                offset = index * CHUNK + CHUNK // 2
                try:
                    data = await fetcher.read(device, offset, options.size,
                                              deadline=time.monotonic() + options.deadline)
                except LazyfsError as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    return
                expected = (chunk(index) + chunk(index + 1))[CHUNK // 2 :][: options.size]
                wrong += bytes(data) != expected

            async with trio.open_nursery() as nursery:
                for number in range(options.readers):
                    nursery.start_soon(read, number)
            told = fetcher.describe_sources()
            counters = fetcher.statistics
        device.cached.release()
    source.close()
    peak_kb = status("VmHWM")    # ru_maxrss would begin with the size of the process that started this one
    return {"errors": errors, "wrong": wrong, "before_kb": before_kb, "peak_kb": peak_kb, "sources": told,
            "not_stored": counters.not_stored, "requests": counters.requests}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("cache")
    parser.add_argument("readers", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=120.0)
    tune_malloc()    # as a worker does
    print(json.dumps(trio.run(run, parser.parse_args())))


if __name__ == "__main__":
    main()
