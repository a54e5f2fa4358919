"""
The directory of blobs and files in pieces: who may use it, what is in it, and how much room that takes.

Layer: mirror; blocking. Who calls: mirror.pieces, from threads. State: the lock, and how much the files take, by their
names. The quota counts a file that has begun with all of its size, so that what has begun can end. What goes is what
was used longest ago (the time of `whole/` files and records is set at each use) and is not open: renaming or unlinking
an open one would do no harm, but free nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from typing import TYPE_CHECKING, Final, NoReturn

from lazyfs.cache.ownership import DirectoryLock, prepare_directory, raise_cache_error
from lazyfs.errors import DiskFullError
from lazyfs.limits import MIB
from lazyfs.mirror.piecefile import (
    PieceFile,
    file_name,
    make_whole,
    open_part,
    open_whole,
    resource_named,
    write_record,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from lazyfs.peers.model import Resource

_FREE_FLOOR_BYTES: Final = 64 * MIB      # of the file system: logs and records of others


class PieceDirectory:
    """`quota_bytes` 0: as much as the disk has. Thread-safe."""

    def __init__(self, path: Path, quota_bytes: int) -> None:
        """Raises CacheError: it cannot be used; CacheOwnedError: by whom it is."""
        self.path = prepare_directory(path)
        self._quota_bytes = quota_bytes
        self._whole, self._part = self.path / "whole", self.path / "part"
        self._mutex = threading.Lock()
        self._lock = DirectoryLock(self.path)
        try:
            for folder in (self._whole, self._part):
                folder.mkdir(mode=0o700, exist_ok=True)
            for leftover in self._part.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
        except OSError as error:
            self._lock.close()
            raise_cache_error(self.path, "make its folders", error)

    def close(self) -> None:
        self._lock.close()

    def find(self, resource: Resource, *, make: bool, busy: Collection[str] = ()) -> PieceFile | None:
        """
        The file of a resource, open. None: there is nothing of it, and `make` is not set.

        `make`: begin it where there is none. `busy`: names (piecefile.file_name) that must stay.

        Raises:
            DiskFullError: there is no room, whatever goes. CacheError: the disk does not let us.

        """
        name = file_name(resource)
        try:
            whole = open_whole(self._whole / name, resource)
            if whole is not None:
                _touch(self._whole / name)
                return whole
            data, record = self._of_part(name)
            if not make and not data.exists():
                return None
            with self._mutex:
                if not data.exists():
                    self._make_room(resource.size, {*busy, name})
                return open_part(data, record, resource)
        except OSError as error:
            raise_cache_error(self.path, "open a blob", error)

    def save(self, found: PieceFile) -> None:
        """Which pieces of a part are there, for the next start; best effort: without it they are fetched again."""
        if not found.is_whole:
            with contextlib.suppress(OSError):
                write_record(found, self._of_part(file_name(found.resource))[1])

    def complete(self, found: PieceFile) -> None:
        """Raises CacheError."""
        name = file_name(found.resource)
        try:
            make_whole(found, *self._of_part(name), self._whole / name)
        except OSError as error:
            raise_cache_error(self.path, "keep a blob", error)

    def failed(self, error: OSError) -> NoReturn:
        """A write into a file of it failed. Raises CacheError."""
        raise_cache_error(self.path, "write a blob", error)

    def drop(self, resource: Resource) -> None:
        """It is bad, or not wanted here any more. Best effort; who has it open keeps it."""
        name = file_name(resource)
        with contextlib.suppress(OSError):
            for path in (self._whole / name, *self._of_part(name)):
                path.unlink(missing_ok=True)

    def has(self, resource: Resource) -> bool:
        """Whether there is anything of it."""
        name = file_name(resource)
        return (self._whole / name).exists() or self._of_part(name)[0].exists()

    def held(self) -> list[tuple[Resource, bool]]:
        """What is here, and whether all of it. Raises OSError."""
        found = [(resource_named(path.stem, size), path.parent == self._whole) for _, size, path in self._entries()]
        return [(resource, whole) for resource, whole in found if resource is not None]

    def used_bytes(self) -> int:
        """Raises OSError."""
        return sum(size for _, size, _ in self._entries())

    def _of_part(self, name: str) -> tuple[Path, Path]:
        return self._part / f"{name}.data", self._part / f"{name}.record"

    def _entries(self) -> list[tuple[float, int, Path]]:
        """When used, how large (a part: what it will be), and where. Raises OSError."""
        found = []
        for path in (*self._whole.iterdir(), *self._part.glob("*.data")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _make_room(self, size: int, busy: Collection[str]) -> None:
        entries = sorted(self._entries())
        used = sum(one[1] for one in entries)
        free = shutil.disk_usage(self.path).free
        for _, entry_size, path in entries:
            if self._fits(size, used, free):
                break
            if path.stem in busy:
                continue
            freed = path.stat().st_blocks * 512
            path.unlink()
            if path.suffix == ".data":
                path.with_suffix(".record").unlink(missing_ok=True)
            used, free = used - entry_size, free + freed
        if not self._fits(size, used, free):
            raise DiskFullError(f"{self.path}: no room for {size} bytes beside what is in use",
                                hint="raise mirror.quota_bytes, or free some space there")

    def _fits(self, size: int, used: int, free: int) -> bool:
        return (not self._quota_bytes or used + size <= self._quota_bytes) and free - size >= _FREE_FLOOR_BYTES


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path)
