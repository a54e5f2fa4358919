"""
What the keeper sees of its worker from outside: that it lives, that requests are answered, when patience ends.

Three signs. A beat that does not come: the worker is dead in its loop, stopped, or hangs in the kernel. Requests that
wait in the kernel although the worker says that it has answered all but so many, and that answers none any more: they
got lost on the way. And no worker that serves, for whatever reason, for so long that readers are better off with an
error: then the connection is aborted, which ends every wait in it.

Layer: node; light to import. Who calls: node.keeper, once a turn. State: of the connection (fusectl, read through a
mount of our own that is in no namespace), of the worker that serves (`begin`), and when all was well last. Times are
time.monotonic(): no clock that anybody sets, and none that runs while the machine sleeps.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.node.keeperchild import Child

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432   # asm-generic/unistd.h: the same on every architecture
_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 6                      # linux/mount.h
_MNT_FORCE = 1
SUSPICION_SHARE = 0.5            # of hang_s without a sign: the next worker begins to load, to be there when it counts
HOPE_S = 60.0                    # after an abort: then who watches us (systemd) may try it with another keeper
STUCK_PAUSE_MAX_S = 600.0        # requests that a new worker does not get either: another one now and then
SLEPT_S = 2.0                    # our own turn came so late: the worker had no turn either
_NUMBER_BYTES_MAX = 64


class Connection:
    """The kernel's view of the FUSE connection mounted at `mount_point`; the number stays known after an unmount."""

    def __init__(self, mount_point: str) -> None:
        self._mount_point = mount_point
        self._number = ""
        self._fusectl = -2       # not opened yet; -1: this kernel, or our rights, do not allow it

    def find(self) -> None:
        """It was mounted: which one is it?"""
        self._number = _minor_of(self._mount_point) or self._number

    def waiting(self) -> int | None:
        """How many requests the kernel waits for, taken by a worker or not; None: it cannot be told."""
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._open("waiting", os.O_RDONLY)
            try:
                return int(os.read(descriptor, _NUMBER_BYTES_MAX))
            finally:
                os.close(descriptor)
        return None

    def abort(self) -> None:
        """End every wait in it, for good. Never waits itself."""
        with contextlib.suppress(OSError):
            descriptor = self._open("abort", os.O_WRONLY)
            try:
                os.write(descriptor, b"1")
            finally:
                os.close(descriptor)
            return
        ctypes.CDLL(None).umount2(os.fsencode(self._mount_point), _MNT_FORCE)   # the same, while it is attached

    def _open(self, name: str, flags: int) -> int:
        """Raises OSError."""
        if self._fusectl == -2:
            self._fusectl = _fusectl()
        if not self._number:
            self.find()
        if self._fusectl < 0 or not self._number:
            raise FileNotFoundError(name)
        return os.open(f"{self._number}/{name}", flags | os.O_CLOEXEC, dir_fd=self._fusectl)


class Watch:
    """See the module. `hang_s`, `abort_s`: as configured."""

    def __init__(self, connection: Connection, hang_s: float, abort_s: float, now: float) -> None:
        self.connection = connection
        self.hang_s = hang_s
        self.abort_s = abort_s
        self._looked_at = self._well_at = now
        self._served_at = float("-inf")
        self._stuck_pause_s = hang_s
        self.begin(now)

    def begin(self, now: float) -> None:
        """Another worker has its turn."""
        self._answered = self._answered_before = 0
        self._held = -1
        self._moved_at = now

    def hear(self, line: bytes) -> None:
        """A beat: `beat ANSWERED HELD`, requests so far and those that wait for data (-1: cannot be compared)."""
        words = line.split()
        if len(words) == 3 and words[0] == b"beat":   # else of another version of us: a sign of life
            with contextlib.suppress(ValueError):
                self._answered, self._held = int(words[1]), int(words[2])

    def look(self, child: Child | None, now: float) -> None:
        """Once a turn, when everything was heard."""
        slept_s = now - self._looked_at
        self._looked_at = now
        if slept_s > SLEPT_S:    # stopped, or the whole machine was: nobody could show a sign of life
            self._well_at += slept_s
            self._served_at += slept_s
            self._moved_at += slept_s
            if child is not None:
                child.last_sign = min(now, child.last_sign + slept_s)
        if child is None or not child.ready or child.killed:
            return               # one that hangs in the kernel may take its time to end
        waiting = self.connection.waiting() if self._held >= 0 else None
        all_known = waiting is not None and waiting <= self._held
        if all_known:
            self._stuck_pause_s = self.hang_s
        if waiting is None or all_known or self._answered != self._answered_before:
            self._answered_before = self._answered
            self._moved_at = now
        if now - child.last_sign <= self.hang_s:
            self._well_at = self._served_at = now

    def trouble(self, child: Child, now: float) -> str:
        """Why this worker is to be replaced now; "": it is not."""
        if child.channel is None or child.killed:
            return ""            # of a keeper before us, its beats go nowhere, or ending: being replaced anyway
        if now - child.last_sign > self.hang_s:
            return f"gave no sign of life for {self.hang_s:g} s"
        if child.ready and now - self._moved_at > self._stuck_pause_s:
            text = f"has answered nothing for {self._stuck_pause_s:g} s, although requests wait"
            self._stuck_pause_s = min(STUCK_PAUSE_MAX_S, self._stuck_pause_s * 2)
            self._moved_at = now
            return text
        return ""

    def is_suspicious(self, child: Child, now: float) -> bool:
        """Whether it might have to be replaced soon."""
        return child.channel is not None and now - child.last_sign > self.hang_s * SUSPICION_SHARE

    def next_s(self, child: Child | None, now: float, most_s: float) -> float:
        """How long the next look may wait, at most `most_s`: no longer than until a beat is missing."""
        if child is None or child.channel is None:
            return most_s
        silent_s = now - child.last_sign
        left = [one - silent_s for one in (self.hang_s * SUSPICION_SHARE, self.hang_s) if one > silent_s]
        return min([most_s, *(one + 0.01 for one in left)])

    def has_hope(self, now: float) -> bool:
        """Whether a worker serves, or has served and may again; not so long after an abort that did not help."""
        return now - self._served_at <= self.abort_s + HOPE_S

    def is_given_up(self, now: float) -> bool:
        """Whether nobody has served for so long that whoever waits is to get an error; asked again after another."""
        if now - self._well_at <= self.abort_s:
            return False
        self._well_at = now
        return self.connection.waiting() != 0


def _fusectl() -> int:
    """A descriptor of the root of a fusectl file system; -1: not to be had."""
    libc = ctypes.CDLL(None)
    context = libc.syscall(_SYS_FSOPEN, b"fusectl", _CLOEXEC)
    if context < 0:
        return -1
    try:
        if libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0):
            return -1
        return int(libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC, 0))
    finally:
        os.close(context)


def _minor_of(mount_point: str) -> str:
    """The minor device number of the last mount there, as /proc/self/mountinfo says; "": there is none."""
    escaped = mount_point
    for one in "\\ \t\n":
        escaped = escaped.replace(one, f"\\{ord(one):03o}")
    found = ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8",  # noqa: PTH123 - light
                                            errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            if len(fields) > 4 and fields[4] == escaped:
                found = fields[2].partition(":")[2]
    return found
