"""
What is read through a mount: which bytes of which layer device were first asked for when, and by which container.

Always on, by the kernel's page: it costs something at a page's first touch only (docs/profile-record.md: how much).
What the kernel reads ahead looks like what was asked for; a mount that is recorded has no read-ahead. In memory only,
bounded; asked for by TOUCHED.

Layer: node. Who calls: node.mounted (`note`, for each read), node.worker (`page`), node.uploads. On the trio thread.
State: one Recorder a mount; it ends with the mount, or with the worker: what was read before a take-over is not known
any more, and `token` is another one.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOUCH_COUNT_MAX = 1 << 16        # a start of tensorflow has 12,000; 40 bytes each, for every image of the node
TOUCH_COUNT_RECORDING_MAX = 1 << 18      # of a mount made to be recorded: what profile.recording can hold
PAGE_COUNT_MAX = 15_000          # touches in one answer: it must fit a line of the control protocol
PAGE_SHIFT = 12                  # the kernel's page, and EROFS's block
_UNIT_COUNT_MAX = 1 << 24        # of one device; above 64 GiB what is noted as one grows. Memory only where it is read
_CALLER_COUNT_MAX = 4096         # as in profile.recording
_PID_COUNT_MAX = 1 << 14
_NAME_CHARS_MAX = 128            # a container's id has 64
_JOINED_BYTES_MAX = 1 << 20      # reads that go on where the last one ended, within _JOINED_US, are one touch
_JOINED_US = 2000
_COLUMNS = 5                     # of a touch: device, start, end, microseconds, caller
_SEEN = b"\1"
_ENGINE = re.compile(r"(?:cri-containerd|docker|crio|libpod|nerdctl)[-:]")     # systemd's scopes, kubelet's names


class Recorder:
    """
    Of one mount.

    Args:
        sizes: of its layer devices, in bytes.
        touch_count_max: what comes after so many touches is not noted.
        clock: seconds; for tests.
        name_of: what to call a process; for tests.

    Attributes:
        token: not the same for any two recorders.
        seen: of each device, one byte a unit of 1 << shifts[device] bytes: 1 once it was asked for.
        truncated: something was not noted.
        whole: it began with the mount, not with a worker that took it over.

    """

    def __init__(self, sizes: Sequence[int], touch_count_max: int = TOUCH_COUNT_MAX,
                 clock: Callable[[], float] = time.monotonic, name_of: Callable[[int], str] | None = None) -> None:
        self.token = os.urandom(8).hex()
        self._clock = clock
        self._name_of = name_of or container_of
        self._began = clock()
        self._sizes = list(sizes)
        self.shifts = [max(PAGE_SHIFT, (size // _UNIT_COUNT_MAX).bit_length()) for size in sizes]
        # private zero pages: those that nobody wrote to take no memory
        self.seen = [mmap.mmap(-1, -(-size >> shift) + 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                     for size, shift in zip(sizes, self.shifts, strict=True)]
        self._touches = array("Q")           # _COLUMNS each: one object, one call to append
        self._item_count_max = touch_count_max * _COLUMNS
        self._joinable = (-1, -1, -1, 0, 0)  # device, end, caller, latest time, highest end of the last touch
        self._names: dict[str, int] = {}
        self._pids: dict[int, int] = {}
        self.truncated = False
        self.whole = True

    def note(self, device: int, offset: int, size: int, pid: int) -> None:
        """A read of [offset, offset + size) of a device, by a process (0: not known). The range lies in the device."""
        shift, seen = self.shifts[device], self.seen[device]
        first, end = offset >> shift, ((offset + size - 1) >> shift) + 1
        fresh = seen.find(b"\0", first, end)
        if fresh < 0 or self.truncated:
            return
        now = int((self._clock() - self._began) * 1e6)
        caller = self._pids.get(pid)
        if caller is None:
            caller = self._caller(pid)
        while 0 <= fresh < end:
            stop = seen.find(_SEEN, fresh, end)
            if stop < 0:
                stop = end
            seen[fresh:stop] = _SEEN * (stop - fresh)
            self._append(device, fresh << shift, min(stop << shift, self._sizes[device]), now, caller)
            if stop == end:
                return
            fresh = seen.find(b"\0", stop, end)

    def _append(self, device: int, start: int, end: int, now: int, caller: int) -> None:
        before_device, before_end, before_caller, latest, highest = self._joinable
        if (before_end == start and before_device == device and before_caller == caller and now <= latest
                and end <= highest):
            self._touches[2 - _COLUMNS] = end
            self._joinable = (device, end, caller, latest, highest)
            return
        touches = self._touches
        if len(touches) >= self._item_count_max:
            self.truncated = True
            return
        touches.extend((device, start, end, now, caller))
        self._joinable = (device, end, caller, now + _JOINED_US, start + _JOINED_BYTES_MAX)

    def _caller(self, pid: int) -> int:
        """A process that was not seen lately."""
        name = self._name_of(pid) if pid else ""
        if len(self._names) >= _CALLER_COUNT_MAX and name not in self._names:
            name = next(iter(self._names))
        found = self._names.setdefault(name, len(self._names))
        if len(self._pids) >= _PID_COUNT_MAX:
            self._pids.clear()
        self._pids[pid] = found
        return found

    @property
    def count(self) -> int:
        """Of touches."""
        return len(self._touches) // _COLUMNS

    @property
    def age_us(self) -> int:
        """How long it has been recording: what a touch that is noted now gets as its time."""
        return int((self._clock() - self._began) * 1e6)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        """The touches number `start` to before `stop`: (device, start, end, microseconds, caller)."""
        part = self._touches[start * _COLUMNS : stop * _COLUMNS].tolist()
        return zip(*(part[column::_COLUMNS] for column in range(_COLUMNS)), strict=True)

    def page(self, start: int) -> dict[str, Any]:
        """
        The touches from number `start` on, as JSON: [device, start, end, microseconds, caller].

        `next`: where to go on, None at the end. `callers`: names by index.
        """
        stop = min(start + PAGE_COUNT_MAX, self.count)
        return {
            "touches": [list(row) for row in self.rows(start, stop)],
            "next": stop if stop < self.count else None,
            "count": self.count,
            "callers": list(self._names),
            "truncated": self.truncated,
            "token": self.token,
            "whole": self.whole,
            "age_us": self.age_us,
        }


def container_of(pid: int) -> str:
    """
    The id of the container that a process is in: what its control group is called. "" where it is in none.

    A hint for people: processes end, and their numbers come again.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].partition(":")[2].rpartition("/")[2] for line in lines]
    name = max(names, key=len, default="").removesuffix(".scope")
    engine = None
    for engine in _ENGINE.finditer(name):   # noqa: B007 - the last one: kubelet writes the pod's name before it
        pass
    name = name if engine is None else name[engine.end():]
    return "".join(char for char in name[:_NAME_CHARS_MAX] if char.isprintable())
