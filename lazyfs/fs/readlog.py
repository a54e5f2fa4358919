"""
What became of the reads that had to wait: those that wait now, how long they took, which were slow, which failed.

Reads that are answered at once are only counted (fetch.statistics): nothing here is on their way. Layer: fs. Who calls:
fs.server begins and ends; node.observing asks. On the trio thread. State: all of it in memory and bounded; a worker
that takes over begins anew.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from lazyfs import requestid
from lazyfs.fetch.readtrace import CURRENT, ReadTrace
from lazyfs.fs import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# From a chunk of the same rack to the default deadline; above the last one: what an operator's longer deadline allows.
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SLOW_S = 1.0
KEPT_COUNT = 256                 # slow reads: 1 to 2 KiB each
# An outage ends thousands of reads in one moment, with the same to tell; telling costs 50 us each.
TOLD_COUNT_MAX, TOLD_PERIOD_S = 64, 1.0
_KIND_COUNT_MAX = 64             # kinds of errors are classes of ours: fewer
Where = dict[str, Any]


class ReadLog:
    """
    See the module.

    Attributes:
        slow_s: a read that takes as long is kept.
        locate: of what a read's device is part (ReadTrace.device): for people; the node sets it.
        waiting: reads that wait now.
        counts: of the reads that are over, by bound of BOUNDS_S, the last one: above all. Not cumulative.
        seconds: which these took together.
        slow_count: of slow reads so far, also of those that are not kept.
        errors: requests that ended with an error, by its kind.

    """

    def __init__(self) -> None:
        self.slow_s = SLOW_S
        self.locate: Callable[[object, int], Where] = lambda _device, _pid: {}
        self.waiting: set[ReadTrace] = set()
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.seconds = 0.0
        self.slow_count = 0
        self.errors: Counter[str] = Counter()
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT_COUNT)
        self._told_since = 0.0
        self._told_count = 0

    @contextlib.contextmanager
    def reading(self, unique: int, inode: int, offset: int, size: int, pid: int) -> Iterator[ReadTrace]:
        """What this task does in the block is that read. `error` set in the trace: it failed."""
        trace = ReadTrace(requestid.of_fuse(unique), inode, offset, size, pid)
        token = CURRENT.set(trace)
        self.waiting.add(trace)
        try:
            with requestid.during(trace.request):
                yield trace
        finally:
            CURRENT.reset(token)
            self.waiting.discard(trace)
            self._end(trace)

    def count_error(self, error: Exception) -> None:
        """A request that did not wait has ended with it."""
        self._count(guard.kind_of(error))

    def _count(self, kind: str) -> None:
        if kind and (kind in self.errors or len(self.errors) < _KIND_COUNT_MAX):
            self.errors[kind] += 1

    def _end(self, trace: ReadTrace) -> None:
        trace.ended = time.monotonic()
        took_s = trace.ended - trace.began
        place = 0
        while place < len(BOUNDS_S) and took_s > BOUNDS_S[place]:
            place += 1
        self.counts[place] += 1
        self.seconds += took_s
        self._count(trace.error)
        if took_s >= self.slow_s:
            self.slow_count += 1
            if self._may_tell(trace.ended):
                self._kept.append({"number": self.slow_count, "time": time.time(), **self.describe(trace)})

    def _may_tell(self, now: float) -> bool:
        if now - self._told_since >= TOLD_PERIOD_S:
            self._told_since, self._told_count = now, 0
        self._told_count += 1
        return self._told_count <= TOLD_COUNT_MAX

    def describe(self, trace: ReadTrace) -> dict[str, Any]:
        """A read for people: JSON. `over`: it has ended; `seconds`: so far, if it has not."""
        return {
            "request": trace.request, "pid": trace.pid, "inode": trace.inode, "offset": trace.offset,
            "size": trace.size, "over": bool(trace.ended), "error": trace.error,
            "seconds": round((trace.ended or time.monotonic()) - trace.began, 6), "device_offset": trace.place,
            **self.locate(trace.device, trace.pid), "chunks": trace.chunks(),
        }

    def slow_reads(self, after: int, count_max: int) -> list[dict[str, Any]]:
        """The oldest `count_max` of those that are kept and have a number above `after`."""
        return [one for one in self._kept if one["number"] > after][:count_max]

    def waiting_longer(self, seconds: float) -> list[ReadTrace]:
        """Reads that have waited so long and wait still, the longest first."""
        begun_by = time.monotonic() - seconds
        return sorted((one for one in self.waiting if one.began <= begun_by), key=lambda one: one.began)
