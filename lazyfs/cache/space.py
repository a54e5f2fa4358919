"""
How much of a disk a cache directory may use: a quota in bytes, and a floor of free space that others keep.

Layer: lazyfs.cache. Who calls: cache.device asks before each chunk is stored; cache.store has the one `Space` of a
directory; node.housekeeping sets the limits, is told when room is short, and corrects the count after each look.
`used_bytes` is an estimate in between: right after a look, then plus what was stored (a chunk written twice counts
twice). It errs towards storing too little, and never for longer than one look. Thread-safe.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.config.kinds import Amount

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Limits:
    """`quota_bytes` 0: none. `floor`: bytes, or a share of the file system."""

    quota_bytes: int = 0
    floor: Amount = Amount(bytes=0)  # noqa: RUF009 - frozen

    @property
    def has_floor(self) -> bool:
        return bool(self.floor.bytes or self.floor.percent)


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system: its size, and what an ordinary user may still write, in bytes."""

    size_bytes: int
    free_bytes: int

    @classmethod
    def of(cls, place: int | str | os.PathLike[str]) -> Disk:
        """Of the file system that a path or descriptor is on. Raises OSError."""
        found = os.statvfs(place)
        return cls(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


class Space:
    """See the module. `on_short` is called in whatever thread found no room, often; it must be quick."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.on_short: Callable[[], None] | None = None
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def correct(self, difference: int) -> None:
        """By how much `used_bytes` was seen to be wrong."""
        with self._lock:
            self._used_bytes += difference

    def admit(self, fd: int, size: int) -> bool:
        """Whether `size` more bytes may be written to the file system of `fd`; if so they count as used."""
        limits = self.limits
        with self._lock:
            fits = not limits.quota_bytes or self._used_bytes + size <= limits.quota_bytes
            if fits and limits.has_floor:
                try:
                    disk = Disk.of(fd)    # 1 us; a chunk's write takes 100
                    fits = disk.free_bytes - size >= limits.floor.of(disk.size_bytes)
                except OSError:           # a disk that does not say so does not take the chunk either
                    fits = False
            if fits:
                self._used_bytes += size
        if not fits:
            self.short()
        return fits

    def give_back(self, size: int) -> None:
        """What was admitted could not be written."""
        with self._lock:
            self._used_bytes -= size

    def short(self) -> None:
        """Room is wanted."""
        if self.on_short is not None:
            self.on_short()
