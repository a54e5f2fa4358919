"""Row 4: whole tree read, data in the local cache, page cache cold, against ext4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.host import drop_page_cache
from benchmarks.rows.trees import fill_cache, open_mount, read_tree, settle

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "whole tree read, data in the cache, page cache cold, against ext4"


def measure(session: Session) -> list[Figure]:
    cache = session.place.folder("full-cache")
    fill_cache(session, cache)
    settle(session.tree, cache)
    theirs: list[float] = []
    erofs: list[float] = []
    fuse: list[float] = []
    for _ in range(session.runs):
        drop_page_cache()
        theirs.append(read_tree(session.tree))
        for driver, times in (("erofs", erofs), ("fuse", fuse)):
            mount = open_mount(session, driver, cache)
            times.append(read_tree(mount.path))
            mount.close()
    return [
        ratio("4a", "tar of the tree, driver erofs", 1.2, erofs, theirs),
        ratio("4b", "tar of the tree, driver fuse", 2.5, fuse, theirs),
    ]
