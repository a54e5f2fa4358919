"""
The load of `fetchcpu`: one process that fetches a made-up image's data as a worker does, and says what it cost.

`python -m benchmarks.fetchload SPEC`, where SPEC is JSON (see `Spec`). Everything from the plan to the cache file is
the worker's own code; there is no mount. Prints one line of JSON. With `folded` the stacks are sampled (which costs
time: such a run gives no figure).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from benchmarks.kit.stacks import Sampler
from lazyfs.cache.store import CacheDir
from lazyfs.fetch.device import FetchDevice
from lazyfs.fetch.engine import Fetcher
from lazyfs.image.digest import Digest
from lazyfs.image.table import parse_table
from lazyfs.node.serving import tune_malloc
from lazyfs.registry import RegistryOptions, open_source


@dataclass(frozen=True, slots=True)
class Spec:
    """`rows`: a file with the chunk table; `blob`: its digest, in the repository that `image` names."""

    image: str
    blob: str
    blob_size: int
    rows: str
    chunk_size: int
    device_size: int
    cache: str
    cpu: int
    folded: str = ""


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    os.sched_setaffinity(0, {spec.cpu})
    tune_malloc()
    print(json.dumps(trio.run(load, spec)))


async def load(spec: Spec) -> dict[str, float]:
    """Fetch all chunks in order; CPU and wall seconds, bytes, requests."""
    source = open_source(spec.image, RegistryOptions(insecure=True))
    rows = np.fromfile(spec.rows, dtype=np.uint8).tobytes()
    table = parse_table(rows, spec.chunk_size, spec.device_size, [spec.blob_size])
    with ExitStack() as stack:
        stack.callback(source.close)
        cache = stack.enter_context(CacheDir.open(Path(spec.cache)))
        cached = cache.device(table.device_digest(), table.chunk_size, table.device_size)
        stack.callback(cached.release)
        device = FetchDevice(table, cached, [(source, Digest(spec.blob), spec.blob_size)])
        async with Fetcher() as fetcher:
            if spec.folded:
                stack.enter_context(Sampler(Path(spec.folded)))
            before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            handle = fetcher.prefetch([(device, index) for index in range(table.chunk_count)])
            await handle.wait()
            wall_s, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
            statistics = fetcher.statistics
        if not cached.complete:
            raise SystemExit(f"not everything came: {handle.error}")
    return {
        "user_s": after.ru_utime - before.ru_utime, "system_s": after.ru_stime - before.ru_stime, "wall_s": wall_s,
        "switches": after.ru_nvcsw + after.ru_nivcsw - before.ru_nvcsw - before.ru_nivcsw,
        "faults": after.ru_minflt - before.ru_minflt,
        "stored_bytes": statistics.fetched_stored_bytes, "device_bytes": spec.device_size,
        "requests": statistics.requests,
    }


if __name__ == "__main__":
    main()
