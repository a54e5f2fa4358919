"""
Looking for bits that have rotted: reads cached chunks from the disk and compares them with their sums.

It reads past the page cache (O_DIRECT) where the file system can: what is asked is what the disk holds, and nobody's
pages are pushed out for it. The thread that reads is in the idle I/O class, and keeps to a rate. What is damaged is
not present afterwards, durably: whoever reads it next fetches it again. Of a device that was seen through, file
`scrubbed` says when: scrubbing goes on with the others after a restart.

Layer: lazyfs.cache; blocking. Who calls: node.scrubbing in a thread of the worker that owns the directory; cli, where
nobody does. One piece of a device after the other, so that whoever calls can stop, say how far it is, or be replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import mmap
import os
import platform
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lazyfs.cache import inventory
from lazyfs.cache.files import RECORD_OF_SCRUB
from lazyfs.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lazyfs.cache.device import CachedDevice
    from lazyfs.cache.store import CacheDir

PIECE_S = 1.0                    # after so long a piece ends,
PIECE_BYTES_MAX = 256 * MIB      # or after so much
DAMAGED_COUNT_MAX = 1000         # chunks that one piece names; it ends then
_RECORD_BYTES_MAX = 256           # no depth that json could fail at
_FUTURE_S = 86_400.0             # a time that lies further ahead was written by a clock that went wrong
# ioprio_set(2): by machine; of this thread (0), class idle: the disk serves it when nobody else wants something.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_WHO_PROCESS, _CLASS_IDLE, _CLASS_NONE = 1, 3 << 13, 0


@dataclass(frozen=True, slots=True)
class Piece:
    """
    What came of one piece.

    Attributes:
        next: the chunk to go on with; `count`: through.
        count: chunks of the device.
        checked_bytes: so much was read and compared.
        damaged: chunks that are gone for it.

    """

    next: int
    count: int
    checked_bytes: int
    damaged: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"next": self.next, "count": self.count, "checked_bytes": self.checked_bytes,
                "damaged": list(self.damaged)}


class DirectReader:
    """Reads data files past the page cache; through it where that cannot be. One thread."""

    def __init__(self, chunk_size: int) -> None:
        self._buffer = mmap.mmap(-1, chunk_size)    # page-aligned, as O_DIRECT wants it
        self._view = memoryview(self._buffer)
        self._of = self._fd = -1

    def read(self, fd: int, size: int, offset: int) -> memoryview:
        """As os.pread of the file that `fd` is open on. Good until the next call. Raises OSError."""
        if fd != self._of:
            self._close_file()
            self._of, self._fd = fd, _open_direct(fd)
        view = self._view[:size]
        try:
            return view[: os.preadv(self._fd, [view], offset)]
        except OSError as error:
            if error.errno != errno.EINVAL:    # larger sectors than our blocks: never seen, and no damage
                raise
        return view[: os.preadv(fd, [view], offset)]

    def close(self) -> None:
        self._close_file()
        self._view.release()

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scrub_piece(cache: CacheDir, name: str, first: int, rate: int, stop: Callable[[], bool] = lambda: False) -> Piece:
    """
    Look at a device's chunks from `first` on, for about a second.

    Args:
        cache: owned by the caller.
        name: hex of the device's digest.
        first: chunk index; where the last piece ended.
        rate: bytes/s; 0: as fast as the disk gives.
        stop: asked after each chunk.

    Raises:
        CacheError, DiskFullError: the device's files cannot be opened.

    """
    cached = cache.existing_device(name)
    if cached is None:
        return Piece(0, 0, 0, ())
    try:
        with _idle_io():
            piece = _look(cached, first, rate, stop)
        if piece.damaged:
            cached.checkpoint()    # else a power cut would bring the damage back
        if piece.next >= piece.count:
            _note(cache.path / inventory.DEVICES / name)
        return piece
    finally:
        cached.release()


def last_scrub(path: Path, name: str) -> float | None:
    """When device `name` was seen through, seconds since 1970; None: never, or its record does not say."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        fd = os.open(path / inventory.DEVICES / name / RECORD_OF_SCRUB,
                     os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                at = json.loads(file.read(_RECORD_BYTES_MAX))["at"]
                return float(at) if isinstance(at, int | float) and math.isfinite(at) else None
    return None


def due(path: Path, interval_s: float, now: float) -> list[str]:
    """Devices last seen through, or if never last written to, longer ago than that; the longest ago first."""
    found: list[tuple[float, str]] = []
    for name in inventory.device_names(path):
        since = last_scrub(path, name)
        if since is None:
            since = _last_write(path / inventory.DEVICES / name)
        if since is not None and (now - since >= interval_s or since - now > _FUTURE_S):
            found.append((since, name))
    return [name for _, name in sorted(found)]


def _look(cached: CachedDevice, first: int, rate: int, stop: Callable[[], bool]) -> Piece:
    presence = cached.presence()
    began, checked, damaged = time.monotonic(), 0, list[int]()
    index = presence.find(1, max(0, first))
    with DirectReader(cached.chunk_size) as reader:
        while index >= 0:
            verdict = cached.verify(index, reader.read)
            if verdict is not None:
                checked += min(cached.chunk_size, cached.device_size - index * cached.chunk_size)
            if verdict is False:
                damaged.append(index)
            index = presence.find(1, index + 1)
            took_s = time.monotonic() - began
            ahead_s = checked / rate - took_s if rate else 0.0
            if ahead_s > 0:
                time.sleep(min(ahead_s, PIECE_S))
            if took_s >= PIECE_S or checked >= PIECE_BYTES_MAX or len(damaged) >= DAMAGED_COUNT_MAX or stop():
                break
    return Piece(cached.chunk_count if index < 0 else index, cached.chunk_count, checked, tuple(damaged))


def _open_direct(fd: int) -> int:
    """The file that `fd` is open on, opened once more: by its descriptor, for its name may be gone."""
    path = f"/proc/self/fd/{fd}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def _idle_io() -> Iterator[None]:
    """This thread's reads wait for everybody else's. Where that cannot be set it is left."""
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        yield
        return
    syscall = ctypes.CDLL(None).syscall
    syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE)
    try:
        yield
    finally:
        syscall(number, _WHO_PROCESS, 0, _CLASS_NONE)


def _note(directory: Path) -> None:
    """A hint: without it the device is looked at again sooner."""
    temporary = directory / f"{RECORD_OF_SCRUB}.tmp"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps({"at": time.time()}))
        temporary.replace(directory / RECORD_OF_SCRUB)


def _last_write(directory: Path) -> float | None:
    times: list[float] = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        times = [entry.stat(follow_symlinks=False).st_mtime for entry in entries if entry.name.startswith("data.")]
    return max(times, default=None)
