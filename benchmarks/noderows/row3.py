"""Row 3: the pause that a reader sees when the worker is SIGKILLed, and when it is upgraded."""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.proc import ToolError
from benchmarks.session import NUMPY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "pause seen by a reader when the worker is killed / upgraded, p99 of the events"
_EVENTS_PER_RUN = 10
_READ_BYTES = 64 * 1024
_SETTLE_S = 0.3


def measure(session: Session) -> list[Figure]:
    daemon = NodeDaemon(session.place)
    target = session.place.folder("node-mount")
    daemon.mount(session.lazy(NUMPY, session.near), target)
    reader = _Reader(target)
    try:
        killed = [reader.pause_of(daemon.kill_worker) for _ in range(session.runs * _EVENTS_PER_RUN)]
        upgraded = [reader.pause_of(daemon.upgrade) for _ in range(session.runs * _EVENTS_PER_RUN)]
    finally:
        reader.close()
        daemon.close()
    return [_p99("3a", "SIGKILL", 1.5, killed), _p99("3b", "lazyfs daemon upgrade", 0.5, upgraded)]


def _p99(key: str, title: str, target: float, pauses: list[float]) -> Figure:
    """Of fewer than 100 events the longest."""
    ordered = sorted(pauses)
    value = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    figure = plain(key, f"{title}, {len(pauses)} events", target, "s", pauses)
    return Figure(key, figure.title, value, target, "s", len(pauses), figure.spread, figure.samples)


class _Reader:
    """Reads random places of the largest files, always past the page cache; any error ends the row."""

    def __init__(self, top: Path) -> None:
        files = [path for path in top.rglob("*") if path.is_file() and not path.is_symlink()]
        files.sort(key=lambda path: -path.stat().st_size)
        self._files = [os.open(path, os.O_RDONLY) for path in files[:20]]
        self._sizes = [os.fstat(descriptor).st_size for descriptor in self._files]
        self._longest_s = 0.0
        self._began: float | None = None
        self._error: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        rng = random.Random(1)
        while not self._stop.is_set():
            index = rng.randrange(len(self._files))
            offset = rng.randrange(max(1, self._sizes[index] - _READ_BYTES))
            os.posix_fadvise(self._files[index], 0, 0, os.POSIX_FADV_DONTNEED)
            self._began = time.perf_counter()
            try:
                os.pread(self._files[index], _READ_BYTES, offset)
            except OSError as error:
                self._error = error
                return
            self._longest_s = max(self._longest_s, time.perf_counter() - self._began)

    def pause_of(self, event: Callable[[], None]) -> float:
        """The longest read that was under way between now and a moment after the event."""
        time.sleep(_SETTLE_S)
        self._longest_s = 0.0
        event()
        time.sleep(_SETTLE_S)
        if self._error is not None:
            raise ToolError(f"a reader saw an error: {self._error}")
        return self._longest_s

    def close(self) -> None:
        self._stop.set()
        self._thread.join(60)
        for descriptor in self._files:
            os.close(descriptor)
