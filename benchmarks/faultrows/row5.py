"""
Row 5: reads of an image that is in the cache as a whole, from a new mount, against ext4: how quick they are.

The image is fetched (`lazyfs cache fetch`), then mounted; the kernel reads the cache's own files. Page cache cold.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.figures import Figure
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import COMMAND, LazyMount, environment
from benchmarks.kit.proc import ToolError, run
from benchmarks.rows.trees import large_files, list_tree, random_reads_us, settle
from benchmarks.session import TENSORFLOW

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "reads after a full copy, new mount, page cache cold, against ext4 (speed)"
_FETCH_TIMEOUT_S = 600.0
_READ_TIMEOUT_S = 300.0
_TARGET = 0.95


def measure(session: Session) -> list[Figure]:
    """Figures 5a (random 4 KiB), 5b (sequential), 5c (find)."""
    image = session.lazy(TENSORFLOW, session.near)
    cache = session.place.folder("whole-cache")
    run([COMMAND, "cache", "--cache-dir", cache, "fetch", "--insecure", image], timeout_s=_FETCH_TIMEOUT_S,
        env=environment(session.place))
    settle(session.tree, cache)
    names = large_files(session.tree)
    kinds: list[tuple[str, str, Callable[[Path], float]]] = [
        ("5a", "random 4 KiB", lambda top: random_reads_us(top, names)),
        ("5b", "sequential: large files one after another", lambda top: _read_in_order(top, names)),
        ("5c", "find -ls", list_tree),
    ]
    figures = []
    for key, title, action in kinds:
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(session.runs):
            for lazy in (False, True) if number % 2 else (True, False):
                (ours if lazy else theirs).append(_once(session, cache, image, action, lazy=lazy))
        session.say(f"{title}: ext4 {statistics.median(theirs):.2f}, lazyfs {statistics.median(ours):.2f}")
        speeds = [other / mine for mine, other in zip(ours, theirs, strict=True)]
        figures.append(Figure(key, title, statistics.median(theirs) / statistics.median(ours), _TARGET, "x", len(ours),
                              (min(speeds), max(speeds)), {"ours": ours, "theirs": theirs}, better="higher"))
    return figures


def _once(session: Session, cache: Path, image: str, action: Callable[[Path], float], *, lazy: bool) -> float:
    """How long it takes, of a mount made anew each time or of the tree on ext4."""
    mount = LazyMount(session.place, image, "--no-prefetch", cache=cache) if lazy else None
    try:
        if mount is not None:
            mount.mount()
            if not mount.statistics()["mounts"][0]["complete"]:
                raise ToolError("the image is not there as a whole")
        drop_page_cache()
        return action(session.tree if mount is None else mount.path)
    finally:
        if mount is not None:
            mount.close()


def _read_in_order(top: Path, names: list[str]) -> float:
    """Seconds; by cat, so that none of them is Python's."""
    words: list[str | Path] = ["bash", "-c", 'cd "$0" && cat "$@" >/dev/null', top, *names]
    return run(words, timeout_s=_READ_TIMEOUT_S).wall_s
