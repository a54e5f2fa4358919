"""
What is read through a mount: which bytes of which layer device were first asked for when, and by which container.

Always on: by chunk, which costs something only at a chunk's first touch. A mount that is made to be recorded
(MountOrder.record) is noted by page, as its read-ahead is one page too. In memory only, bounded; asked for by TOUCHED.

Layer: node. Who calls: node.mounted (`note`, for each read), node.worker (`page`). On the trio thread. State: one
Recorder a mount; it ends with the mount, or with the worker: what was read before a take-over is not known any more.
"""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TOUCH_COUNT_MAX = 1 << 18        # as many as a recording may hold (profile.recording); 28 bytes each
PAGE_COUNT_MAX = 15_000          # touches in one answer: it must fit a line of the control protocol
PAGE_SHIFT = 12                  # the kernel's page, and EROFS's block
_CALLER_COUNT_MAX = 4096         # as in profile.recording
_PID_COUNT_MAX = 1 << 14
_NAME_CHARS_MAX = 128            # a container's id has 64
_JOINED_BYTES_MAX = 1 << 20      # reads that go on where the last one ended, within _JOINED_US, are one touch
_JOINED_US = 2000


class Recorder:
    """
    Of one mount.

    Args:
        sizes: of its layer devices, in bytes.
        units: of each device, what is noted as one, in bytes (a power of two): its chunk size; None: a page.
        clock: seconds; for tests.
        name_of: what to call a process; for tests.

    """

    def __init__(self, sizes: Sequence[int], units: Sequence[int] | None, clock: Callable[[], float] = time.monotonic,
                 name_of: Callable[[int], str] | None = None) -> None:
        self._clock = clock
        self._name_of = name_of or container_of
        self._began = clock()
        self.by_page = units is None
        shifts = [PAGE_SHIFT] * len(sizes) if units is None else [unit.bit_length() - 1 for unit in units]
        self._shifts = shifts
        self._sizes = list(sizes)
        self._seen = [bytearray(-(-size >> shift) + 1) for size, shift in zip(sizes, shifts, strict=True)]
        self._devices = array("H")
        self._starts, self._ends, self._times = array("Q"), array("Q"), array("Q")
        self._callers = array("H")
        self._names: dict[str, int] = {}
        self._pids: dict[int, int] = {}
        self.truncated = False

    def note(self, device: int, offset: int, size: int, pid: int) -> None:
        """A read of [offset, offset + size) of a device, by a process (0: not known). The range lies in the device."""
        shift, seen = self._shifts[device], self._seen[device]
        first, end = offset >> shift, ((offset + size - 1) >> shift) + 1
        fresh = seen.find(0, first, end)
        if fresh < 0:
            return
        now = int((self._clock() - self._began) * 1e6)
        caller = self._caller(pid)
        while 0 <= fresh < end:
            stop = seen.find(1, fresh, end)
            stop = end if stop < 0 else stop
            seen[fresh:stop] = b"\1" * (stop - fresh)
            self._append(device, fresh << shift, min(stop << shift, self._sizes[device]), now, caller)
            fresh = seen.find(0, stop, end)

    def _append(self, device: int, start: int, end: int, now: int, caller: int) -> None:
        count = len(self._starts)
        if (count and self._ends[-1] == start and self._devices[-1] == device and self._callers[-1] == caller
                and end - self._starts[-1] <= _JOINED_BYTES_MAX and now - self._times[-1] <= _JOINED_US):
            self._ends[-1] = end
            return
        if count >= TOUCH_COUNT_MAX:
            self.truncated = True
            return
        for column, value in ((self._devices, device), (self._starts, start), (self._ends, end), (self._times, now),
                              (self._callers, caller)):
            column.append(value)

    def _caller(self, pid: int) -> int:
        found = self._pids.get(pid)
        if found is None:
            name = self._name_of(pid) if pid else ""
            if len(self._names) >= _CALLER_COUNT_MAX and name not in self._names:
                name = next(iter(self._names))
            found = self._names.setdefault(name, len(self._names))
            if len(self._pids) >= _PID_COUNT_MAX:
                self._pids.clear()
            self._pids[pid] = found
        return found

    def page(self, start: int) -> dict[str, Any]:
        """
        The touches from number `start` on, as JSON: [device, start, end, microseconds, caller].

        `next`: where to go on, None at the end. `callers`: names by index.
        """
        stop = min(start + PAGE_COUNT_MAX, len(self._starts))
        columns = (self._devices, self._starts, self._ends, self._times, self._callers)
        return {
            "touches": [list(row) for row in zip(*(column[start:stop] for column in columns), strict=True)],
            "next": stop if stop < len(self._starts) else None,
            "callers": list(self._names),
            "truncated": self.truncated,
        }


def container_of(pid: int) -> str:
    """
    What a process's control group is called: a container's id, under containerd and runc. "" where it is in none.

    A hint for people: processes end, and their numbers come again.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].partition(":")[2].rpartition("/")[2] for line in lines]
    name = max(names, key=len, default="").removesuffix(".scope")
    return "".join(char for char in name[:_NAME_CHARS_MAX] if char.isprintable())
