"""
Pinning images, and what is pinned: `lazyfs cache pin` and `unpin`.

Layer: node; blocking. Who calls: node.housekeeping, one at a time and never beside an eviction; set_unserved() for a
cache directory that nobody serves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lazyfs.cache import inventory, pins
from lazyfs.cache.store import CacheDir
from lazyfs.errors import NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


def set_pin(path: Path, name: str, *, pinned: bool) -> dict[str, Any]:
    """
    Pin or unpin the images that are called so: by the name they were mounted by last, or their bootstrap's digest.

    Returns:
        {"images": [{"image", "bootstrap"}], "changed": how many of them were not so before}.

    Raises:
        NotFoundError: there is none. CacheError, DiskFullError: the disk does not let us.

    """
    found, known = inventory.take(path), pins.pinned(path)
    hexadecimal = name.removeprefix("sha256:")
    names = [one.name for one in found.images.values() if hexadecimal == one.name or name == one.record.image]
    if not pinned and hexadecimal in known and hexadecimal not in names:
        names.append(hexadecimal)    # its own files are gone: a disk was lost, or a hand was at work
    if not names:
        raise NotFoundError(f"{name} is not in the cache",
                            hint="lazyfs cache ls shows what is; lazyfs cache fetch --pin gets an image and pins it")
    changed = 0
    for one in names:
        if pinned:
            changed += one not in known
            pins.pin(path, one)
        else:
            changed += pins.unpin(path, one)
    return {"images": [{"image": found.images[one].record.image if one in found.images else "",
                        "bootstrap": f"sha256:{one}"} for one in names], "changed": changed}


def set_unserved(path: Path, name: str, *, pinned: bool) -> dict[str, Any]:
    """As set_pin, in a directory that no worker serves. Raises also CacheOwnedError: one does, ask it."""
    with CacheDir.open(path) as cache:
        return set_pin(cache.path, name, pinned=pinned)
