"""
Private directories for what is not finished yet, and files that appear whole or not at all.

Layer: registry. Used by the destinations. A staging directory is mode 0700 and holds a lock while its owner lives, so
that the next conversion can tell, and remove, what a killed one left behind. Publishing a file: written beside its
place, fsync, rename, fsync of the directory; a reader sees the old or the new one, also after a power cut.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.errors import BusyError, DiskFullError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = ".lazyfs-staging-"
_LOCK = ".lock"
_LOCKLESS_AGE_S = 3600.0  # a directory whose maker died before it had locked it
_LOCK_WAIT_S = 60.0
_LOCK_POLL_S = 0.05


def explain_os(error: OSError, what: str) -> TargetError | DiskFullError:
    """The error of the tree for a failed file operation on a destination."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFullError(f"{what}: {error.strerror}", hint="make room, then run it again: finished parts are kept")
    return TargetError(f"{what}: {error.strerror}", hint="check the path and its mode")


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """OSErrors inside become TargetError or DiskFullError."""
    try:
        yield
    except OSError as error:
        raise explain_os(error, what) from error


class Staging:
    """A locked private directory below `parent`; removed by close()."""

    def __init__(self, parent: Path) -> None:
        with os_errors(str(parent)):
            parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(parent)
            self.path, self._lock = _make_locked(parent)
        self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


def _make_locked(parent: Path) -> tuple[Path, int]:
    """A new directory and its lock. Somebody who takes it for abandoned, before we have locked it, may remove it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # mode 0700
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def default_parent() -> Path:
    """Where staging for a registry goes: $TMPDIR, else /var/tmp, since blobs are large and /tmp may be memory."""
    if named := os.environ.get("TMPDIR"):
        return Path(named)
    return Path("/var/tmp") if os.access("/var/tmp", os.W_OK | os.X_OK) else Path(tempfile.gettempdir())  # noqa: S108


def remove_abandoned(parent: Path) -> None:
    """Remove staging directories of ours below `parent` whose owner is gone. Never fails."""
    with contextlib.suppress(OSError):
        for path in parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if time.time() - status.st_mtime > _LOCKLESS_AGE_S:
            shutil.rmtree(path, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass  # its owner lives
    finally:
        os.close(lock)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably and atomically."""
    descriptor, name = tempfile.mkstemp(prefix=".lazyfs-new-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """
    Hold an exclusive lock on the file `path` (made if absent).

    Raises:
        BusyError: somebody else has held it for a minute.

    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BusyError(f"{path}: another process is writing there",
                                    hint="try again when it is done") from None
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
