"""Row 3: `find -ls` over the large image, page cache cold, against ext4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.host import drop_page_cache
from benchmarks.rows.trees import list_tree, open_mount

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "find -ls cold against ext4"


def measure(session: Session) -> list[Figure]:
    theirs: list[float] = []
    erofs: list[float] = []
    fuse: list[float] = []
    list_tree(session.tree)  # unmeasured: see settle()
    for _ in range(session.runs):
        drop_page_cache()
        theirs.append(list_tree(session.tree))
        for driver, times in (("erofs", erofs), ("fuse", fuse)):
            mount = open_mount(session, driver)
            times.append(list_tree(mount.path))
            mount.close()
    return [
        ratio("3", "find -ls, driver erofs", 1.0, erofs, theirs),
        ratio("3-fuse", "find -ls, driver fuse", None, fuse, theirs),
    ]
