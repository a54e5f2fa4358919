"""
One private place for a run, and the certainty that nothing of it stays.

Everything a run makes is found again by name alone: its directory ends in our process id, its network namespace and
its links begin with `lzb` and hold it, its processes have the directory's path in their command lines. So cleaning up
needs no memory of what was done, may run twice, and can also be done for a run that was killed (`sweep`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kit.proc import ToolError, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

BASE = Path("/var/tmp")  # a real disk: overlayfs wants an upper directory that is not on overlayfs or in memory
_DIR_PREFIX = "lazyfs-run-"
_NET_PREFIX = "lzb"
_END_WAIT_S = 5.0
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


class Interrupted(BaseException):
    """A signal asked us to end; raised at most once, so that cleaning up is never cut short by a second one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Workspace:
    """A run's directory and names. Made by `workspace()`."""

    def __init__(self, pid: int) -> None:
        self.top = BASE / f"{_DIR_PREFIX}{pid}"
        self.net_name = f"{_NET_PREFIX}{pid}"
        self.stack = ExitStack()

    def folder(self, name: str) -> Path:
        """A fresh empty directory; whatever had this name before is taken away."""
        path = self.top / name
        _unmount_below(path)
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def clear(self) -> None:
        """Idempotent: containers, processes, mounts, network and files of this run."""
        for state in self.top.glob("*/runc/*"):
            attempt(["runc", "--root", state.parent, "delete", "--force", state.name])
        _end_processes(self.top, self.net_name)
        _unmount_below(self.top)
        for space in [*Path("/run/netns").glob(self.net_name), *Path("/run/netns").glob(f"{self.net_name}-*")]:
            attempt(["ip", "netns", "delete", space.name])
        if Path("/sys/class/net", f"{self.net_name}h").exists():
            attempt(["ip", "link", "delete", f"{self.net_name}h"])
        _remove_cgroups(self.net_name)
        _remove_containerd_leftovers(self.net_name)
        if self.top.exists() and not _mounts_below(self.top):  # never remove through a mount that stayed
            shutil.rmtree(self.top, ignore_errors=True)


@contextmanager
def workspace() -> Iterator[Workspace]:
    """Our process's workspace; gone at the end, whatever the end is (also ^C, SIGTERM, SIGHUP)."""
    sweep()
    place = Workspace(os.getpid())
    cleaning = False
    interrupted = False

    def interrupt(signum: int, _: FrameType | None) -> None:
        nonlocal interrupted
        if not cleaning and not interrupted:
            interrupted = True
            raise Interrupted(signum)

    previous = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        try:
            place.top.mkdir(mode=0o700, parents=True)
            yield place
        finally:
            cleaning = True
            try:
                place.stack.close()
            finally:
                place.clear()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def exit_by_signal(error: Interrupted) -> None:
    """End as the signal would have ended us, so that a shell that started us sees it."""
    sys.stdout.flush()
    signal.signal(error.signum, signal.SIG_DFL)
    os.kill(os.getpid(), error.signum)


def measured(name: str, measure: Callable[[Workspace], object]) -> int:
    """Measure in a place of its own; returns the exit code. `name`: of the command, for its message."""
    try:
        with workspace() as place:
            measure(place)
    except ToolError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        exit_by_signal(error)
    return 0


def sweep() -> None:
    """Clean up after runs that were killed: those whose process no longer lives."""
    names = [path.name for path in BASE.glob(f"{_DIR_PREFIX}*")]
    with contextlib.suppress(FileNotFoundError):
        names += [path.name for path in Path("/run/netns").glob(f"{_NET_PREFIX}*")]
    names += [path.name for path in Path("/sys/class/net").glob(f"{_NET_PREFIX}*")]
    for name in names:
        found = re.fullmatch(rf"(?:{_DIR_PREFIX}|{_NET_PREFIX})(\d+)(?:h|-.*)?", name)
        if found and not Path("/proc", found[1]).exists():
            Workspace(int(found[1])).clear()


def _end_processes(top: Path, group: str) -> None:
    """End what this run started: it has our private directory in its words or environment, or is in our cgroups."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        found = [pid for pid in _pids() if _is_ours(pid, top, group)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        limit = time.monotonic() + _END_WAIT_S
        while time.monotonic() < limit and any(_is_ours(pid, top, group) for pid in found):
            time.sleep(0.05)


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_ours(pid: int, top: Path, group: str) -> bool:
    needle = os.fsencode(f"{top}/")
    folder = Path("/proc", str(pid))
    try:
        if needle in (folder / "cmdline").read_bytes() or needle in (folder / "environ").read_bytes():
            return pid != os.getpid()
        return re.search(rf"[:/]/?{group}c?(?:/|$)", (folder / "cgroup").read_text(), re.MULTILINE) is not None
    except OSError:  # it has ended meanwhile
        return False


def _remove_cgroups(group: str) -> None:
    """Runc leaves the parent groups that it made (`/NAMESPACE/ID` for containerd, `/ID` for runc itself)."""
    for top in Path("/sys/fs/cgroup").glob("*/"):
        for found in [*top.glob(group), *top.glob(f"{group}c"), *([top] if top.name == group else [])]:
            for folder, _, _ in os.walk(found, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()


def _remove_containerd_leftovers(namespace: str) -> None:
    """Containerd's shims keep state outside of the root and state directories that containerd was given."""
    run = Path("/run/containerd")
    shutil.rmtree(run / "runc" / namespace, ignore_errors=True)
    for folder in (run / "runc", run / "fifo", run / "s", run):
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nobody else uses it


def _mounts_below(top: Path) -> list[str]:
    """Mount points at or below `top`, the newest first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4])
        if point == str(top) or point.startswith(f"{top}/"):
            points.append(point)
    return points[::-1]


def _unmount_below(top: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for point in _mounts_below(top):
        # An ordinary unmount first (it waits for writes); a mount still in use is detached.
        if libc.umount2(os.fsencode(point), _UMOUNT_NOFOLLOW) != 0:
            libc.umount2(os.fsencode(point), _MNT_DETACH | _UMOUNT_NOFOLLOW)
