"""
All that a profiling run has on the machine, in one directory, so that it can be taken away again, whoever does that.

    /var/tmp/lazyfs-profile-<pid>-<start ticks>-<boot>/    mode 0700, named after the process that owns it
        cache/        the data cache, unless the user names another
        <n>/          of the nth run: mnt/ (the lazy mount), upper/, work/, bundle/ (config.json, rootfs/), files/, pid
        runc/         runc's state of the containers

Layer: runner. Who calls: runner.session; `open_workspace` first sweeps what killed runs have left. Invariants: the name
says whether the owner lives, so there is no moment at which a directory has no owner on record; containers' cgroups
begin with the directory's name; nothing is deleted through a mount. It is on a disk because overlayfs wants its upper
directory there, and a program may write a lot.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.errors import HostError, LazyfsError
from lazyfs.fs import mountapi
from lazyfs.node.rundir import ProcessIdentity, WorkerDir, all_worker_dirs
from lazyfs.node.unmount import clean_and_remove, unmount_directly

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = Path("/var/tmp")          # noqa: S108 - made by us, mode 0700, and refused if somebody else owns it
CGROUPS = Path("/sys/fs/cgroup")
_NAME = re.compile(r"lazyfs-profile-(\d{1,10})-(\d{1,20})-([0-9a-f]{8})")
_RUNC_TIMEOUT_S = 20.0
# A worker's tend() sees within 2 s that nobody uses a mount any more; then it syncs its cache, maybe to a busy disk.
_WORKER_END_S = 30.0
_KILL_WAIT_S = 5.0
_POLL_S = 0.02


class Workspace:
    """One run's directory. Made by open_workspace(). `left`: what could not be taken away at its end, in words."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.left: list[str] = []

    @property
    def name(self) -> str:
        return self.top.name

    @property
    def cache(self) -> Path:
        return self.top / "cache"

    @property
    def runc_state(self) -> Path:
        return self.top / "runc"

    def folder(self, name: str) -> Path:
        """A new directory in it."""
        path = self.top / name
        path.mkdir(mode=0o700)
        return path

    def clear(self) -> list[str]:
        """
        Take everything away: containers, cgroups, mounts, workers, files. Idempotent; every step has a deadline.

        Returns:
            What could not be taken away, in words; the directory then stays, for the next sweep.

        """
        self._end_containers()
        left = _remove_cgroups(self.name)
        left += _unmount_below(self.top)
        left += _end_workers(self.top)
        left += _unmount_below(self.top)   # of a worker that was just dying
        if not left:
            shutil.rmtree(self.top, ignore_errors=True)
            left = [f"files in {self.top}"] if self.top.exists() else []
        return left

    def _end_containers(self) -> None:
        for pid in _runc_processes(self.top):   # of a run that was killed while runc was starting its container
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(FileNotFoundError):
            for state in list(self.runc_state.iterdir()):
                run_runc(self, "delete", "--force", state.name)


@contextlib.contextmanager
def open_workspace() -> Iterator[Workspace]:
    """
    A workspace of this process; gone at the end, whatever the end is. Sweeps what killed runs have left first.

    Raises:
        HostError: it cannot be made. (That it cannot be taken away spoils no recording: see `left`.)

    """
    sweep()
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    top = BASE / f"lazyfs-profile-{identity.pid}-{identity.start_ticks}-{identity.boot_id[:8]}"
    try:
        top.mkdir(mode=0o700)
    except OSError as error:
        text = f"cannot make {top}: {error.strerror}"
        raise HostError(text, hint="profiling needs root, and a disk at /var/tmp") from error
    place = Workspace(top)
    try:
        place.folder("runc")
        yield place
    finally:
        with _undisturbed():
            place.left = place.clear()


def sweep() -> list[str]:
    """Clear the workspaces of processes that live no more; returns what could not be taken away."""
    left: list[str] = []
    for path in sorted(BASE.glob("lazyfs-profile-*")):
        found = _NAME.fullmatch(path.name)
        if found is None or not _is_our_directory(path):
            continue
        owner = ProcessIdentity.of(int(found[1]))
        if owner is None or (str(owner.start_ticks), owner.boot_id[:8]) != (found[2], found[3]):
            left += Workspace(path).clear()
    return left


def run_runc(place: Workspace, *words: str) -> str:
    """Run a short runc command; returns what it complained about, or ""."""
    command = ["runc", "--root", str(place.runc_state), *words]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=_RUNC_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"runc {words[0]} does not end"
    except OSError as error:
        return f"runc cannot be run: {error.strerror}"
    return done.stderr.strip() if done.returncode else ""


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second ^C must not cut the clean-up short; it has deadlines of its own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_our_directory(path: Path) -> bool:
    """Anybody may make directories of this name there; only ours are mode 0700, and of our own user."""
    with contextlib.suppress(OSError):
        status = path.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return False


def _runc_processes(top: Path) -> list[int]:
    """Processes that are runc, working for this directory."""
    needle = os.fsencode(top / "runc")
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if needle in words and words[0].rpartition(b"/")[2] == b"runc":
                    found.append(int(path.name))
    return found


def _remove_cgroups(name: str) -> list[str]:
    """Kill what is still in the run's cgroups, and remove them: where runc died before it wrote its state."""
    groups = [group for top in (CGROUPS, *CGROUPS.glob("*/")) for group in top.glob(f"{name}*") if group.is_dir()]
    deadline = time.monotonic() + _KILL_WAIT_S
    while groups:
        for group in groups:
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError, ValueError):
                    for pid in Path(folder, "cgroup.procs").read_text(encoding="ascii").split():
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
        groups = [group for group in groups if group.exists()]
        if groups and time.monotonic() > deadline:
            return [f"cgroup {group}" for group in groups]
        time.sleep(_POLL_S if groups else 0)
    return []


def _unmount_below(top: Path) -> list[str]:
    """The newest first; what is in use is detached."""
    below = f"{top}/"
    for entry in reversed([entry for entry in mountapi.mounts() if entry.target.startswith(below)]):
        with contextlib.suppress(LazyfsError):
            unmount_directly(entry.target, lazy=True)
    return [f"mount {entry.target}" for entry in mountapi.mounts() if entry.target.startswith(below)]


def _end_workers(top: Path) -> list[str]:
    """Wait for the workers of mounts below `top`: they end by themselves. What dead ones have left is cleaned."""
    deadline = time.monotonic() + _WORKER_END_S
    while directories := _worker_dirs(top):
        for directory in directories:
            with contextlib.suppress(LazyfsError):
                clean_and_remove(directory)    # nothing is done while its worker lives
        if time.monotonic() > deadline:
            return [f"worker of {directory.root}" for directory in directories]
        time.sleep(_POLL_S)
    return []


def _worker_dirs(top: Path) -> list[WorkerDir]:
    """Of workers whose mounts are below `top`; and its own cache's, which a killed starter may have half made."""
    own = WorkerDir.of_cache(str(top / "cache"))
    others = [found for found in all_worker_dirs() if found != own
              and any(record.target.startswith(f"{top}/") for record in found.records())]
    return [own, *others] if own.root.exists() else others
