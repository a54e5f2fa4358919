"""
What containerd asks of the snapshotter: how often, how long it took, how it ended; and what is being answered now.

Layer: snapshotter, below service. Who calls: service around every call, cli.snapshotter for dumps and the report. The
report is a small file in the node's run directory, written with each sign of life: the daemon's worker and `lazyfs
metrics` read it, so that one page says everything, and nothing new listens. Thread-safe. State: one Calls a process;
bounded, for there are ten calls and as many ends of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOW_S = 5.0                     # a call that takes as long is worth a line: containerd gives up after a minute or two
REPORT_NAME = "snapshotter.json"
_LINES_MAX = 50
_NAME_CHARS_MAX = 200


class Calls:
    """See the module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.time()
        self._ended: dict[tuple[str, str], list[float]] = {}    # (call, code): how many, seconds
        self._running: dict[int, tuple[str, str, float]] = {}   # call, name, since when (monotonic)
        self._next = 0

    @contextlib.contextmanager
    def answering(self, call: str, name: str) -> Iterator[list[str]]:
        """Count one. The block puts how it ended, if not well, into the list that it gets: the status code's name."""
        began = time.monotonic()
        end: list[str] = []
        with self._lock:
            number = self._next
            self._next += 1
            self._running[number] = (call, name, began)
        try:
            yield end
        finally:
            took_s = time.monotonic() - began
            with self._lock:
                del self._running[number]
                counted = self._ended.setdefault((call, end[0] if end else "OK"), [0, 0.0])
                counted[0] += 1
                counted[1] += took_s

    def report(self) -> dict[str, Any]:
        """`ended`: a list of call, code, count, seconds; `running`: how many; `oldest_s`: of these."""
        now = time.monotonic()
        with self._lock:
            ended = [{"call": call, "code": code, "count": int(count), "seconds": round(seconds, 6)}
                     for (call, code), (count, seconds) in sorted(self._ended.items())]
            oldest_s = max((now - since for _, _, since in self._running.values()), default=0.0)
            return {"pid": os.getpid(), "started": self._began, "time": time.time(), "ended": ended,
                    "running": len(self._running), "oldest_s": round(oldest_s, 3)}

    def write(self, directory: Path) -> None:
        """The report, into REPORT_NAME of the node's run directory. Raises OSError."""
        temporary = directory / f".{REPORT_NAME}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self.report(), file)
        temporary.replace(directory / REPORT_NAME)

    def lines(self) -> list[str]:
        """For a dump. Not in a signal's handler: it takes a lock."""
        now = time.monotonic()
        with self._lock:
            running = sorted(self._running.values(), key=lambda one: one[2])
        found = [f"call {call} {name[:_NAME_CHARS_MAX]}: for {now - since:.1f} s"
                 for call, name, since in running[:_LINES_MAX]]
        ended = [f"calls {one['call']} {one['code']}: {one['count']}, {one['seconds']:.3f} s together"
                 for one in self.report()["ended"]]
        return [f"{len(running)} calls are being answered", *found, *ended]


CALLS = Calls()
