"""
The snapshotter's directory: who owns it, and one directory a snapshot in it.

    <root>/lock               flock of the one snapshotter that runs here
    <root>/metadata.db        snapshotter.records
    <root>/snapshots/<id>/    fs: the layer's files, an overlay's upper or lower directory; work: of active ones
    <root>/mapped/<id>/<n>    id-mapped copies of what is below it (snapshotter.idmap)
    <root>/images/            where lazy images are mounted (the hook's)
    <root>/spare/<n>/         as snapshots/<id>, for the next ones (snapshotter.spares)

Layer: snapshotter, above model. Who calls: core. State: the ids that are being made: their directory is there, their
record is not yet. A directory without a record that nobody is making is left from a kill, or waits for its removal by
a thread; reclaim() takes it away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from lazyfs.errors import BusyError, DiskFullError, HostError, LazyfsError, UsageError
from snapshotter import idmap
from snapshotter.spares import Spares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_LOG = logging.getLogger("lazyfs.snapshotter")
_MODE_FS = 0o755                 # of a root directory, as containerd's overlayfs makes it
_MODE_WORK = 0o711
_WAITING_MAX = 1024              # removals that wait for the thread; above it who removes does it, and waits
_CLOSE_S = 5.0                   # for removals that wait, at the end
_NOT_IN_OVERLAY = ':,\\"'        # overlayfs takes them for its own signs; containerd does not escape


class Directories:
    """One a process and root. All methods may be called from any thread."""

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self.images = root / "images"
        self._snapshots = root / "snapshots"
        self._mapped = root / "mapped"
        self._lock = lock
        self._mutex = threading.Lock()
        self._making: set[int] = set()
        self._last_id = 0
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self._room = threading.Semaphore(_WAITING_MAX)
        self._spares = Spares(root / "spare", lambda path: self._make_at(path, work=True, owner=None))

    @classmethod
    def open(cls, root: Path) -> Directories:
        """
        Take possession of the root; make what is missing.

        Raises:
            UsageError: the path cannot be used in mount options.
            BusyError: another snapshotter runs there.
            HostError: it cannot be made.

        """
        root = root.absolute()
        if any(sign in str(root) for sign in _NOT_IN_OVERLAY) or not str(root).isprintable():
            raise UsageError(f"the snapshotter's root {str(root)!r} holds a sign that mount options cannot",
                             hint="choose a path without colon, comma, quote and backslash")
        try:
            for directory in (root, root / "snapshots", root / "images", root / "mapped"):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            text = f"cannot use {root}: {error.strerror}"
            raise HostError(text, hint="it must be a local disk, writable by root") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(f"another snapshotter uses {root}", hint="stop it, or choose another --root") from None
        try:
            return cls(root, lock)
        except OSError as error:
            os.close(lock)
            raise HostError(f"cannot use {root}: {error.strerror}", hint="look at that disk") from error

    def close(self) -> None:
        """Removals that wait are done, as many as there is time for; the next start does the others."""
        with contextlib.suppress(TimeoutError):
            self._remover.submit(lambda: None).result(_CLOSE_S)
        self._remover.shutdown(wait=True, cancel_futures=True)
        self._spares.close()
        os.close(self._lock)

    def own(self, snapshot_id: int) -> Path:
        return self._snapshots / str(snapshot_id)

    def fs(self, snapshot_id: int) -> Path:
        return self._snapshots / str(snapshot_id) / "fs"

    def mapped(self, snapshot_id: int) -> Path:
        return self._mapped / str(snapshot_id)

    def start_above(self, last_id: int) -> None:
        """Give ids above this one, and above all that have a directory, from now on."""
        with self._mutex:
            self._last_id = max([self._last_id, last_id, *self._present()])

    @contextlib.contextmanager
    def making(self, *, work: bool, owner: tuple[int, int] | None) -> Iterator[int]:
        """
        Make the directories of a new snapshot; the block records it. If the block fails, they are taken away.

        Args:
            work: with an overlay's work directory.
            owner: uid and gid of fs/; None: ours.

        Yields:
            The new snapshot's id.

        Raises:
            DiskFullError: no room.
            HostError: they cannot be made.

        """
        with self._mutex:
            self._last_id += 1
            snapshot_id = self._last_id
            self._making.add(snapshot_id)
        try:
            try:
                self._make(snapshot_id, work=work, owner=owner)
                yield snapshot_id
            except BaseException:
                self.discard(snapshot_id)
                raise
        finally:
            with self._mutex:
                self._making.discard(snapshot_id)
            if work:
                self._spares.replenish()   # while nobody waits

    def restore(self, snapshot_id: int, *, work: bool, owner: tuple[int, int] | None) -> None:
        """
        Have the directories of a snapshot that is on record; nothing is done if they are there. As making().

        A record is on disk when it is answered, its directories some seconds later. A power cut in between takes
        them, and nothing else: what is written into a directory cannot be older than the directory.
        """
        if not os.path.isdir(f"{self._snapshots}/{snapshot_id}/{'work' if work else 'fs'}"):   # noqa: PTH112 - see _make
            _LOG.warning("snapshot %d has lost its directories, by a power cut: it begins empty again", snapshot_id)
            self._make(snapshot_id, work=work, owner=owner, again=True)

    def discard(self, snapshot_id: int) -> None:
        """Remove a snapshot's directory; what cannot be removed now is tried again by reclaim()."""
        self._release(snapshot_id)
        self._remove(snapshot_id)

    def discard_soon(self, snapshot_id: int) -> None:
        """The same, but a thread removes the files: nobody waits for the disk, or for a large tree."""
        self._release(snapshot_id)
        if not self._room.acquire(blocking=False):
            self._remove(snapshot_id)
            return
        self._remover.submit(self._remove, snapshot_id).add_done_callback(lambda _: self._room.release())

    def _release(self, snapshot_id: int) -> None:
        try:
            idmap.release(self.mapped(snapshot_id))
        except (OSError, LazyfsError) as error:
            _LOG.warning("cannot remove %s: %s", self.mapped(snapshot_id), error)

    def _remove(self, snapshot_id: int) -> None:
        own = f"{self._snapshots}/{snapshot_id}"
        with contextlib.suppress(OSError):   # empty, or other children: three calls instead of forty
            for directory in (f"{own}/work", f"{own}/fs", own):
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(directory)   # noqa: PTH106 - as in _make
            return
        shutil.rmtree(own, onerror=_log_failure)

    def reclaim(self, known: Callable[[], set[int]]) -> int:
        """Remove directories without a record; returns how many. `known`: says the ids on record, when it is asked."""
        present = self._present()   # this order: what is recorded from now on is still in `making` when that is read
        with self._mutex:
            making = set(self._making)
        left = present - making - known()
        for snapshot_id in sorted(left):
            self.discard(snapshot_id)
        return len(left)

    def _present(self) -> set[int]:
        return {int(name) for place in (self._snapshots, self._mapped) for name in os.listdir(place)  # noqa: PTH208
                if name.isascii() and name.isdigit()}

    def _make(self, snapshot_id: int, *, work: bool, owner: tuple[int, int] | None, again: bool = False) -> None:
        """`again`: a part of it may be there, and stays as it is."""
        own = f"{self._snapshots}/{snapshot_id}"   # no Path: twenty microseconds for each step of each call
        try:
            if work and not again and self._spares.move_to(own):
                _give(f"{own}/fs", owner)
            else:
                self._make_at(own, work=work, owner=owner, again=again)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise DiskFullError(f"{own}: disk full", hint="make room there") from error
            raise HostError(f"cannot make {error.filename}: {error.strerror}") from error

    @staticmethod
    def _make_at(own: str, *, work: bool, owner: tuple[int, int] | None, again: bool = False) -> None:
        """Raises OSError."""
        _mkdir(own, 0o700, again=again)
        if _mkdir(f"{own}/fs", _MODE_FS, again=again):
            _give(f"{own}/fs", owner)
        if work:
            _mkdir(f"{own}/work", _MODE_WORK, again=again)


def owner_of(directory: Path) -> tuple[int, int]:
    """Its uid and gid. Raises HostError."""
    try:
        status = os.lstat(directory)
    except OSError as error:
        raise HostError(f"cannot look at {directory}: {error.strerror}",
                        hint="a layer's files are gone: remove the image and pull it again") from error
    return status.st_uid, status.st_gid


def _log_failure(_function: object, path: str, cause: tuple[type, BaseException, object]) -> None:
    if not isinstance(cause[1], FileNotFoundError):   # reclaim() in another thread is at the same directory
        _LOG.warning("cannot remove %s: %s", path, cause[1])


def _give(path: str, owner: tuple[int, int] | None) -> None:
    if owner and owner != (os.geteuid(), os.getegid()):
        os.lchown(path, *owner)


def _mkdir(path: str, mode: int, *, again: bool) -> bool:
    """Whether it was made. Raises OSError: it is there already, and may not be (`again`)."""
    try:
        os.mkdir(path, mode)   # noqa: PTH102
    except FileExistsError:
        if again:
            return False
        raise
    if os.stat(path).st_mode & 0o7777 != mode:   # noqa: PTH116
        os.chmod(path, mode)   # noqa: PTH101 - the umask of whoever started us
    return True
