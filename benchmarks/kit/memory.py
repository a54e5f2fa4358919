"""Peak resident memory of a process and all it started (Linux proc(5): VmHWM, VmRSS)."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

_PERIOD_S = 0.02


def _field_kib(pid: int, name: str) -> int:
    try:
        for line in Path("/proc", str(pid), "status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, without itself."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            children.setdefault(_field_kib(int(folder.name), "PPid:"), []).append(int(folder.name))
    found, open_ends = [], [pid]
    while open_ends:
        below = children.get(open_ends.pop(), [])
        found += below
        open_ends += below
    return found


def tree_peak_mb(pid: int) -> float:
    """The sum of the highest resident sizes of a process and its descendants so far: never less than the true peak."""
    return sum(_field_kib(member, "VmHWM:") for member in [pid, *descendants(pid)]) * 1024 / 1e6


class PeakSampler:
    """
    While it is entered: the highest sum of resident sizes of everything below this process.

    Samples every 20 ms, and never reports less than the highest VmHWM of a single process that it saw. Servers that
    this process had before are left out.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._known = set(descendants(os.getpid()))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            members = [pid for pid in descendants(os.getpid()) if pid not in self._known]
            now = sum(_field_kib(pid, "VmRSS:") for pid in members)
            single = max((_field_kib(pid, "VmHWM:") for pid in members), default=0)
            self.peak_mb = max(self.peak_mb, max(now, single) * 1024 / 1e6)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
