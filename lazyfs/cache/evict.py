"""
Removing from a cache directory, so that a crash at any step leaves a device whole or not at all.

What goes is first renamed into `evicted/`: from that call on the cache does not have it, and until then it has all of
it. The renames are made durable (fsync of the directories) before anything is deleted; deleting takes the records of
what is present first, then the data, and never writes to or shortens a file: the kernel may still read one that an
EROFS mount of a dead worker has open. What a crash leaves in `evicted/` is deleted at the next eviction.

Layer: lazyfs.cache; blocking. Who calls: node.housekeeping. The caller owns the directory (CacheDir), and knows which
images are in use; which devices are, CacheDir.discard() sees to itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs.cache import inventory
from lazyfs.cache.files import sync_directory
from lazyfs.cache.ownership import raise_cache_error

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lazyfs.cache.plan import Plan
    from lazyfs.cache.store import CacheDir

_log = logging.getLogger(__name__)
# Without these nothing of a device is present.
_RECORDS = ("live", "checkpoint")


@dataclass(frozen=True, slots=True)
class Evicted:
    """What went: hex names."""

    devices: tuple[str, ...]
    images: tuple[str, ...]


def take_away(cache: CacheDir, plan: Plan) -> tuple[str, ...]:
    """
    The plan's devices, but for those that have come into use since it was made. Space is free after `clean`.

    Raises:
        CacheError: the disk does not let us.

    """
    try:
        return tuple(name for name in plan.devices if cache.discard(name))
    except OSError as error:
        raise_cache_error(cache.path, "evict a device", error)


def take_away_images(path: Path, names: Iterable[str]) -> tuple[str, ...]:
    """
    Files of images: a few renames each, so that it can be done on the loop. The caller knows that nobody needs them.

    Raises:
        CacheError: the disk does not let us.

    """
    gone = []
    try:
        for name in names:
            # The record last: without it the other files would belong to an image of no devices. They go all the same.
            for folder, ending in ((inventory.BOOTSTRAPS, "zst"), (inventory.BOOTSTRAPS, "tar"),
                                   (inventory.IMAGES, "erofs"), (inventory.IMAGES, "plan"),
                                   (inventory.IMAGES, "json")):
                with contextlib.suppress(FileNotFoundError):
                    move_away(path, path / folder / f"{name}.{ending}")
            gone.append(name)
    except OSError as error:
        raise_cache_error(path, "remove an image's files", error)
    return tuple(gone)


def move_away(path: Path, victim: Path) -> None:
    """Into `evicted/`, under a name that nothing has. Atomic. Raises OSError."""
    place = path / inventory.EVICTED
    place.mkdir(mode=0o700, exist_ok=True)
    os.rename(victim, place / f"{victim.name}.{os.urandom(8).hex()}")  # noqa: PTH104 - tests cut here


def clean(path: Path) -> None:
    """
    Delete what is in `evicted/`, and temporary files of dead processes. What cannot be deleted stays for the next time.

    Raises:
        CacheError: the disk does not let us.

    """
    leftovers = inventory.leftovers(path)
    if not leftovers:
        return
    try:
        for folder in (inventory.DEVICES, inventory.IMAGES, inventory.BOOTSTRAPS, inventory.EVICTED):
            with contextlib.suppress(FileNotFoundError):
                sync_directory(path / folder)
        for leftover in leftovers:
            with contextlib.suppress(FileNotFoundError):
                _delete(leftover)
    except OSError as error:
        raise_cache_error(path, "delete what was evicted", error)


def _delete(path: Path) -> None:
    if not stat.S_ISDIR(path.lstat().st_mode):
        os.unlink(path)  # noqa: PTH108
        return
    names = sorted(os.listdir(path), key=lambda name: (name not in _RECORDS, name))  # noqa: PTH208
    for name in names:
        _delete(path / name)
    os.rmdir(path)  # noqa: PTH106
