"""
What a test may leave behind: nothing. Snapshots of mounts, processes, loop devices and descriptors.

Processes are known by a variable in their environment, so that daemons count too, whoever their parent is now. What a
module- or session-scoped fixture holds exists before the test and after it, and so does not count.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from lazyfs.fs import mountapi

MARK_NAME = "LAZYFS_TEST_MARK"
GRACE_S = 20.0                   # a worker ends shortly after its last mount


def mark_environment() -> str:
    """Children of this process can be told from now on."""
    mark = os.environ.setdefault(MARK_NAME, uuid.uuid4().hex)
    return f"{MARK_NAME}={mark}"


@dataclass(frozen=True)
class Snapshot:
    mounts: frozenset[str]
    processes: frozenset[str]
    loops: frozenset[str]
    descriptors: frozenset[str]

    def added(self, later: Snapshot) -> list[str]:
        """What is there `later` and was not before, one line each."""
        return [
            f"{kind}: {item}"
            for kind in ("mounts", "processes", "loops", "descriptors")
            for item in sorted(getattr(later, kind) - getattr(self, kind))
        ]


@dataclass(frozen=True)
class Scope:
    """Whose things count: marked processes, and mounts and loop devices below `tops` (others test here, too)."""

    mark: str
    tops: tuple[str, ...]

    def take(self) -> Snapshot:
        mounts = (
            f"{entry.mount_id} {entry.fs_type} on {entry.target}" for entry in mountapi.mounts()
            if entry.target.startswith(self.tops)
        )
        loops = (loop for loop in _loops() if loop.partition(" ")[2].startswith(self.tops))
        processes = _processes(self.mark.encode())
        return Snapshot(frozenset(mounts), frozenset(processes), frozenset(loops), frozenset(_descriptors()))


def wait_for_leaks(before: Snapshot, scope: Scope) -> list[str]:
    """What is still there after a moment of grace; [] as soon as nothing is."""
    deadline = time.monotonic() + GRACE_S
    while leaks := before.added(scope.take()):
        if time.monotonic() > deadline:
            return leaks
        gc.collect()
        time.sleep(0.05)
    return []


def clear(leaks: list[str]) -> None:
    """Take away what a failed test has left, so that the next one starts clean: only things on the list."""
    for leak in leaks:
        kind, _, item = leak.partition(": ")
        with contextlib.suppress(Exception):
            if kind == "processes":
                os.kill(int(item.split()[0]), signal.SIGKILL)
    for leak in reversed(leaks):
        kind, _, item = leak.partition(": ")
        with contextlib.suppress(Exception):
            if kind == "mounts":
                mountapi.unmount(item.partition(" on ")[2], mountapi.MNT_DETACH)


def _all_processes() -> set[tuple[str, int]]:
    """Of each its pid, and the inode of its directory in /proc: another process of the same pid has another one."""
    with os.scandir("/proc") as entries:
        return {(entry.name, entry.inode()) for entry in entries if entry.name.isdigit()}


# This process, and what was there before it marked its children: none of them ever becomes a child. Reading the
# environments of all of a machine's processes twice a test would cost more than most tests do.
_STRANGERS = _all_processes()


def _processes(mark: bytes) -> list[str]:
    found = []
    for name, _ in _all_processes() - _STRANGERS:
        path = Path("/proc") / name
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes():
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{name} {command[:120]}")
    return found


def _loops() -> list[str]:
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append(f"{path.parts[3]} {path.read_text().strip()}")
    return found


def _descriptors() -> list[str]:
    """Files, pipes and sockets; not what the interpreter and its libraries open once (epoll, eventfd, devices)."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(path.readlink())
            if not target.startswith(("anon_inode:", "/dev/", "/proc/")):
                found.append(f"{path.name} {target}")
    return found
