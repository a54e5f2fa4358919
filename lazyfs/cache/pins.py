"""
Pins: images that are never evicted, however long nobody uses them.

    <path>/images/<hex of the bootstrap's digest>.pin     empty; there or not

Layer: lazyfs.cache; blocking. Who calls: node.housekeeping, which gives pinned images to the eviction as in use, and
node.fetching. Who pins or unpins owns the directory, and does not evict at the same time. Invariant: a pin that was
set is on the disk when pin() returns, whatever happens to the machine; pinning twice is pinning.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from lazyfs.cache.files import sync_directory
from lazyfs.cache.inventory import IMAGES
from lazyfs.cache.ownership import raise_cache_error

if TYPE_CHECKING:
    from pathlib import Path

_PIN = re.compile(r"([0-9a-f]{64})\.pin")


def pinned(path: Path) -> set[str]:
    """Hex of the bootstraps' digests of all pinned images of the cache directory `path`. Needs no lock."""
    with contextlib.suppress(OSError):
        return {match[1] for name in os.listdir(path / IMAGES)  # noqa: PTH208
                if (match := _PIN.fullmatch(name)) is not None}
    return set()


def pin(path: Path, name: str) -> None:
    """
    Pin image `name` (hex).

    Raises:
        CacheError, DiskFullError: not possible; it may be pinned or not.

    """
    file = path / IMAGES / f"{name}.pin"
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        sync_directory(file.parent)
    except OSError as error:
        raise_cache_error(path, "pin an image", error)


def unpin(path: Path, name: str) -> bool:
    """
    Unpin image `name` (hex). False: it was not pinned.

    Raises:
        CacheError: not possible; it is pinned still.

    """
    file = path / IMAGES / f"{name}.pin"
    try:
        file.unlink()
        sync_directory(file.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise_cache_error(path, "unpin an image", error)
    return True
