"""
Who may use a cache directory: one process at a time, private to its user, never on a mount of ours.

The lock is flock(2) on the file `lock`: the kernel drops it when its holder dies, however it dies, and sees through
mount and pid namespaces (NFS: also through hosts). Who holds it is written into the file for the message only, as
`pid program host pid-namespace`. Who calls: lazyfs.cache.store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
from pathlib import Path
from typing import NoReturn

from lazyfs.errors import CacheError, CacheOwnedError, DiskFullError

_LOCK_NAME = "lock"
_PRIVATE_MODE = 0o700
_HOLDER_BYTES_MAX = 256
_WORD_CHARS_MAX = 64
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# lazyfs on lazyfs waits for itself for ever; any other FUSE mount may be served by someone who waits for us.
_REFUSED_TYPES = ("fuse", "erofs")


def raise_cache_error(path: Path, action: str, error: OSError) -> NoReturn:
    """Turn an OSError of the cache's own files into the CacheError family."""
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        hint = "free some space, or name another directory with --cache-dir"
        raise DiskFullError(f"cache {path}: cannot {action}: {reason}", hint=hint) from error
    hint = "check the directory, or name another one with --cache-dir"
    raise CacheError(f"cache {path}: cannot {action}: {reason}", hint=hint) from error


def prepare_directory(path: Path) -> Path:
    """
    Make `path` a private directory of this user and return it without symbolic links.

    Raises:
        CacheError: not a directory, owned by someone else, open to others and in use, or on a FUSE or EROFS mount.

    """
    try:
        path = path.resolve()
        _refuse_mounts(path)
        path.mkdir(mode=_PRIVATE_MODE, parents=True, exist_ok=True)
        status = path.stat()
    except FileExistsError:
        raise CacheError(f"cache {path}: not a directory", hint="name a directory with --cache-dir") from None
    except OSError as error:
        raise_cache_error(path, "create the directory", error)
    except RuntimeError as error:    # pathlib's word for a loop of symbolic links
        raise CacheError(f"cache {path}: loop of symbolic links") from error
    _check_owner(path, status)
    return path


def _refuse_mounts(path: Path) -> None:
    """Raises CacheError: it would lie on a mount of a kind that may be ours. OSError: nobody can look there."""
    there = next(place for place in (path, *path.parents) if place.exists())
    kind = file_system_type(there)
    if kind.startswith(_REFUSED_TYPES):
        hint = "name a directory on a local disk with --cache-dir"
        raise CacheError(f"cache {path}: lies on a {kind} mount", hint=hint)


def _check_owner(path: Path, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid != user:
        hint = "name a directory of your own with --cache-dir"
        raise CacheError(f"cache {path}: owned by uid {status.st_uid}, expected {user}", hint=hint)
    if not stat.S_IMODE(status.st_mode) & 0o077:
        return
    try:
        # Only what is plainly ours is closed to others: --cache-dir /tmp must not make /tmp private.
        names = {entry.name for entry in os.scandir(path)}
        if names and _LOCK_NAME not in names:
            hint = f"name an empty directory, or run: chmod 700 {path}"
            raise CacheError(f"cache {path}: open to other users and not empty", hint=hint)
        path.chmod(_PRIVATE_MODE)
    except OSError as error:
        raise_cache_error(path, "make the directory private", error)


def file_system_type(path: Path) -> str:
    """The type of the file system `path` is on, as in /proc/self/mountinfo (proc(5)); "" if not told there."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            left, _, right = line.partition(" - ")
            if left.split(" ")[2] == wanted:
                return right.split(" ")[0]
    return ""


def _ourselves() -> tuple[str, str, str, str]:
    """Words that name this process: pid, program, host, pid namespace."""
    namespace = "-"
    with contextlib.suppress(OSError):
        namespace = str(os.stat("/proc/self/ns/pid").st_ino)    # noqa: PTH116
    program, host = (text.replace(" ", "_")[:_WORD_CHARS_MAX].encode("ascii", "replace").decode() or "-"
                     for text in (Path(sys.argv[0]).name, socket.gethostname()))
    return str(os.getpid()), program, host, namespace


def _open_lock(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, flags | os.O_RDONLY)    # what is there can be served all the same; nobody else may write


class DirectoryLock:
    """Exclusive ownership of a prepared directory, until close() or the end of the process."""

    def __init__(self, directory: Path) -> None:
        """Raises CacheOwnedError (it says who the holder is) or CacheError."""
        self._path = path = directory / _LOCK_NAME
        try:
            self._fd = _open_lock(path)
        except OSError as error:
            raise_cache_error(directory, "open its lock", error)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            os.close(self._fd)
            if error.errno != errno.EWOULDBLOCK:
                raise_cache_error(directory, "lock it", error)
            hint = "stop that process, or name another directory with --cache-dir"
            raise CacheOwnedError(f"cache {directory}: in use by {holder}", hint=hint) from None
        with contextlib.suppress(OSError):    # a full disk: the lock holds all the same
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, " ".join(_ourselves()).encode() + b"\n", 0)

    def is_in_place(self) -> bool:
        """Whether the directory is still there with this lock in it: else it was taken away, or replaced."""
        try:
            there, ours = self._path.lstat(), os.fstat(self._fd)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:    # a disk that does not answer has not been taken away
            return True
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _holder(self) -> str:
        text = ""
        with contextlib.suppress(OSError):
            text = os.pread(self._fd, _HOLDER_BYTES_MAX, 0).decode("ascii", errors="replace")
        pid, program, host, namespace, *_ = [*text.split(), "", "", "", ""]
        if not pid.isdigit() or not text.rstrip("\n").isprintable():
            return "another process (it does not say which)"
        _, _, our_host, our_namespace = _ourselves()
        found = f"process {pid} ({program})" if program else f"process {pid}"
        if host and host != our_host:
            return f"{found} on host {host}"
        return f"{found} of another pid namespace" if namespace not in {"", our_namespace} else found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
