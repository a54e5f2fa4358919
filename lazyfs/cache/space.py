"""
How much of a disk a cache directory may use: a quota in bytes, and a floor of free space that others keep.

Layer: lazyfs.cache. Who calls: cache.device asks before each chunk is stored; cache.store has the one `Space` of a
directory; node.housekeeping sets the limits, is told when room is short, and corrects the count after each look.
`used_bytes` is an estimate in between: right after a look, then plus what was stored (a chunk written twice counts
twice). It errs towards storing too little, and never for longer than one look. Thread-safe.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZE = re.compile(r"(\d{1,18})\s*([kKMGTP]?)(i?)[bB]?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,3})?)\s*%")
# A floor above this is a typing error: the cache could hardly ever store anything.
_FLOOR_SHARE_MAX = 0.95


def parse_size(text: str) -> int:
    """Bytes: `0`, `500M` (decimal, as sizes are shown), `20GiB` (binary). Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"size {text!r:.40}: expected bytes, or a number with k, M, G, T (or Ki, Mi, Gi, Ti)")
    base = 1024 if match[3] else 1000
    return int(match[1]) * int(base ** _POWERS[match[2]])


@dataclass(frozen=True, slots=True)
class Limits:
    """`quota_bytes` 0: none. The floor is the larger of `floor_bytes` and `floor_share` (0..1) of the file system."""

    quota_bytes: int = 0
    floor_bytes: int = 0
    floor_share: float = 0.0

    @classmethod
    def of(cls, quota: int | str, floor: int | str) -> Limits:
        """`quota`: bytes, or a size; `floor`: the same, or a share such as `5%`. Raises UsageError."""
        quota_bytes = quota if isinstance(quota, int) else parse_size(quota)
        if isinstance(floor, int):
            return cls(quota_bytes, floor)
        match = _PERCENT.fullmatch(floor.strip())
        if match is None:
            return cls(quota_bytes, parse_size(floor))
        share = float(match[1]) / 100
        if share > _FLOOR_SHARE_MAX:
            raise UsageError(f"floor {floor!r:.40}: expected at most {_FLOOR_SHARE_MAX:.0%} of the file system")
        return cls(quota_bytes, 0, share)

    def floor_of(self, disk_bytes: int) -> int:
        """In bytes, on a file system of that size."""
        return max(self.floor_bytes, int(disk_bytes * self.floor_share))


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

    def counted(self, used_bytes: int) -> None:
        """What the directory was just seen to use."""
        with self._lock:
            self._used_bytes = used_bytes

    def admit(self, fd: int, size: int) -> bool:
        """Whether `size` more bytes may be written to the file system of `fd`; if so they count as used."""
        limits = self.limits
        with self._lock:
            fits = not limits.quota_bytes or self._used_bytes + size <= limits.quota_bytes
            if fits and (limits.floor_bytes or limits.floor_share):
                disk = Disk.of(fd)    # 1 us; a chunk's write takes 100
                fits = disk.free_bytes - size >= limits.floor_of(disk.size_bytes)
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
