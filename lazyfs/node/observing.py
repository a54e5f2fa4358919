"""
What a worker tells of itself: its state now, the last minutes, slow reads, the page of metrics, a dump.

One snapshot (plain JSON) is the source of all: `lazyfs status` draws it, node.metrics writes it down. Nothing here is
on a read's way: counters are kept where things happen, and are looked at when somebody asks, or every SAMPLE_S for the
history. Layer: node. Who calls: node.worker has one Observer, node.control passes on STATUS, TRACE and DUMP,
node.health serves the page. On the trio loop; what may wait for a disk or the keeper goes to a thread, and is left out
if it does not answer in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from lazyfs.cache.space import Disk
from lazyfs.errors import LazyfsError
from lazyfs.fs.readlog import BOUNDS_S
from lazyfs.node.dumping import Dumps
from lazyfs.node.keeperasking import ask_keeper
from lazyfs.node.recorder import container_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.fs.served import Served
    from lazyfs.node.copying import Copying
    from lazyfs.node.housekeeping import Housekeeper
    from lazyfs.node.mounted import MountedImage
    from lazyfs.node.peering import NodePeers
    from lazyfs.node.rundir import WorkerDir
    from lazyfs.node.scrubbing import Scrubbing

HUNG_S = 10.0                    # a read that waits longer is called hung: people at a terminal have given up
SAMPLE_S = 10.0
SAMPLE_COUNT = 31                # five minutes
MINUTE_S, ERRORS_S = 60.0, 300.0
LOOK_S = 2.0                     # for the disk and the keeper to answer
SLOW_COUNT_MAX = 200             # slow reads of one answer: 2 KiB each, a line of the protocol holds a MiB
_WAITING_COUNT_MAX = 50
PAGE_S = 1.0                     # a page of metrics is made once in so long, however many ask
_COMM = "/proc/%d/comm"
REPORT_NAME = "snapshotter.json"    # of snapshotter.calls, which is a layer above us
_REPORT_BYTES_MAX, _REPORT_ROWS_MAX = 64 * 1024, 200    # ten calls, seventeen codes


class Observed(Protocol):
    """The worker."""

    def list_mounts(self) -> list[dict[str, Any]]: ...

    @property
    def scrubbing(self) -> Scrubbing: ...

    def health(self) -> dict[str, Any]: ...

    def all_mounts(self) -> Iterable[MountedImage]: ...

    @property
    def copying(self) -> Copying: ...

    @property
    def housekeeper(self) -> Housekeeper: ...

    @property
    def peers(self) -> NodePeers | None: ...


class Observer:
    """Of one worker."""

    def __init__(self, directory: WorkerDir, cache: CacheDir, fetcher: Fetcher, served: Served,
                 worker: Observed) -> None:
        self._directory = directory
        self._cache = cache
        self._fetcher = fetcher
        self._worker = worker
        self._reads = served.read_log
        self._reads.locate = self._locate
        self._began = time.time()
        self._samples: deque[tuple[float, dict[str, int]]] = deque([(time.monotonic(), {})], SAMPLE_COUNT)
        self._page = b""
        self._page_at = float("-inf")
        self._page_lock = trio.Lock()
        self._report: Path | None = None
        self.dumps = Dumps(self._reads, fetcher)

    def begin(self, slow_s: float, snapshotter_root: str = "") -> None:
        """
        In the main thread of the worker's process: dumps on SIGUSR1.

        Args:
            slow_s: from when on a read is slow, seconds.
            snapshotter_root: where the snapshotter of this node keeps what it has; "": there is none.

        """
        self._reads.slow_s = slow_s
        self._report = Path(snapshotter_root) / REPORT_NAME if snapshotter_root else None
        self.dumps.install()

    async def run(self) -> None:
        """Keep the history, for ever."""
        while True:
            await trio.sleep(SAMPLE_S)
            self._samples.append((time.monotonic(), self._counts()))

    # --- the snapshot -------------------------------------------------------------------------------------------------

    async def snapshot(self) -> dict[str, Any]:
        """
        Everything, as JSON: docs/observability.md names the parts.

        Checkpoint: yes. What the disk or the keeper does not tell within LOOK_S is left out.
        """
        looked: dict[str, Any] = {}
        with trio.move_on_after(LOOK_S):
            looked = await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
        health = self._worker.health()
        return {
            **self.statistics(),
            "version": health["version"], "ready": health["ready"], "cache_dir": health["cache_dir"],
            "mounted": health["mounts"], "detached": health["detached"], "broken": health["broken"],
            "started": self._began, "time": time.time(), "log": str(self._directory.log),
            "reads": self._describe_reads(), "copying": self._worker.copying.describe(),
            "flights": len(self._fetcher.flights()), "running": self._fetcher.running(),
            "evicted": dict(self._worker.housekeeper.evicted),
            "minute": self._lately(MINUTE_S), "errors_lately": self._errors_lately(),
            "space": self._space(looked.get("disk")), **looked, **self._peers(),
        }

    def statistics(self) -> dict[str, Any]:
        """Counters since the worker's start, the mounts, and the state of sources. For STATS: at once."""
        counters = self._fetcher.statistics
        return {
            "pid": os.getpid(),
            "fetch": {name: getattr(counters, name) for name in counters.__slots__},
            "cache": {**self._cache.health.describe(), **self._worker.scrubbing.describe()},
            "copies": self._worker.copying.full.counters(),
            "mounts": self._worker.list_mounts(),
            "sources": self._fetcher.describe_sources(),
            "servers": self._fetcher.describe_servers(),
        }

    def _look(self) -> dict[str, Any]:
        """In a thread."""
        found: dict[str, Any] = {"process": _process()}
        with contextlib.suppress(OSError):
            disk = Disk.of(self._cache.path)
            found["disk"] = {"size_bytes": disk.size_bytes, "free_bytes": disk.free_bytes}
        with contextlib.suppress(OSError, ValueError):                # there is none
            if self._report is not None:
                with self._report.open("rb") as file:
                    report = json.loads(file.read(_REPORT_BYTES_MAX))
                found |= {"snapshotter": report} if _is_report(report) else {}
        with contextlib.suppress(LazyfsError, OSError, ValueError):   # there is none: an embedded worker
            found["keeper"] = ask_keeper(self._directory, "status", LOOK_S)
        return found

    def _space(self, disk: Mapping[str, int] | None) -> dict[str, Any]:
        limits = self._cache.space.limits
        return {"used_bytes": self._cache.space.used_bytes, "quota_bytes": limits.quota_bytes,
                "floor_bytes": limits.floor.of(disk["size_bytes"]) if disk is not None else None}

    def _peers(self) -> dict[str, Any]:
        """Nothing where there are none."""
        peers = self._worker.peers
        return {} if peers is None else {"peers": peers.describe()}

    def _describe_reads(self) -> dict[str, Any]:
        waiting = self._reads.waiting_longer(0.0)
        return {
            "waiting": len(waiting), "hung": len(self._reads.waiting_longer(HUNG_S)), "hung_s": HUNG_S,
            "oldest_s": time.monotonic() - waiting[0].began if waiting else 0.0,
            "slow": self._reads.slow_count, "slow_s": self._reads.slow_s, "bounds_s": BOUNDS_S,
            "counts": list(self._reads.counts), "seconds": self._reads.seconds, "errors": dict(self._reads.errors),
        }

    # --- the last minutes ---------------------------------------------------------------------------------------------

    def _counts(self) -> dict[str, int]:
        counters = self._fetcher.statistics
        return {
            "hits": counters.hits, "misses": counters.misses, "fetched_stored_bytes": counters.fetched_stored_bytes,
            "retries": counters.retries, "bad_chunks": counters.bad_chunks, "slow": self._reads.slow_count,
            "peer_bytes": counters.peer_bytes,
            **{f"source {name}": count for name, count in counters.bytes_by_source.items()},
            **{f"error {kind}": count for kind, count in self._reads.errors.items()},
        }

    def _lately(self, seconds: float) -> dict[str, Any]:
        """What was counted in about the last `seconds` (the key of that name says how many)."""
        now = time.monotonic()
        at, before = next((one for one in self._samples if one[0] >= now - seconds - SAMPLE_S), self._samples[-1])
        return {"seconds": max(now - at, 0.001),
                **{name: count - before.get(name, 0) for name, count in self._counts().items()}}

    def _errors_lately(self) -> dict[str, Any]:
        lately = self._lately(ERRORS_S)
        return {"seconds": lately["seconds"], **{name.removeprefix("error "): count for name, count in lately.items()
                                                 if name.startswith("error ") and count}}

    # --- slow reads ---------------------------------------------------------------------------------------------------

    def trace(self, after: int, over_s: float) -> dict[str, Any]:
        """
        Slow reads with a number above `after`, the oldest first, and those that wait longer than `over_s` now.

        `count`: of all so far; a reader that is told more asks again.
        """
        return {
            "slow_s": self._reads.slow_s, "count": self._reads.slow_count,
            "reads": self._reads.slow_reads(after, SLOW_COUNT_MAX),
            "waiting": [self._reads.describe(one)
                        for one in self._reads.waiting_longer(over_s)[:_WAITING_COUNT_MAX]],
        }

    def _locate(self, device: object, pid: int) -> dict[str, Any]:
        """For ReadLog: of which image a device is, and who reads."""
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            if pid:
                found["process"] = Path(_COMM % pid).read_text(encoding="utf-8", errors="replace").strip()
                found["container"] = container_of(pid)
        for mounted in self._worker.all_mounts():
            for one in mounted.devices:
                if one is device:
                    digest, _ = mounted.opened.devices[one.number]
                    return {**found, "image": mounted.order.image, "target": mounted.order.target,
                            "bootstrap": str(mounted.opened.layer.digest), "device": str(digest)}
        return found

    # --- metrics, dumps -----------------------------------------------------------------------------------------------

    async def page(self) -> bytes:
        """The metrics in Prometheus' text format. Checkpoint: yes."""
        async with self._page_lock:
            if time.monotonic() - self._page_at >= PAGE_S:
                snapshot = await self.snapshot()
                self._page = await trio.to_thread.run_sync(_write_page, snapshot)
                self._page_at = time.monotonic()
            return self._page

    def dump(self) -> dict[str, Any]:
        """For DUMP: `lines`."""
        return {"lines": list(self.dumps.lines())}


def _write_page(snapshot: dict[str, Any]) -> bytes:
    from lazyfs.node import metrics  # noqa: PLC0415 - 25 ms and 2 MB, for those who ask

    return metrics.page(snapshot)


def _is_report(report: object) -> bool:
    """Whether it is one of snapshotter.calls, perhaps of another version."""
    return (isinstance(report, dict) and all(isinstance(report.get(name), int | float) for name in ("time", "running"))
            and isinstance(report.get("ended"), list) and len(report["ended"]) <= _REPORT_ROWS_MAX
            and all(isinstance(one, dict) and isinstance(one.get("call"), str) and isinstance(one.get("code"), str)
                    and all(isinstance(one.get(name), int | float) for name in ("count", "seconds"))
                    for one in report["ended"]))


def _process() -> dict[str, Any]:
    """Of this one: seconds of CPU, bytes of memory, descriptors."""
    found: dict[str, Any] = {"cpu_s": time.process_time()}
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found["resident_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        found["descriptors"] = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    return found
