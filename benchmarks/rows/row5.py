"""
Row 5: random 4 KiB reads, data in the local cache, page cache cold.

Two states of the cache's own file: its pages in memory (what lazyfs itself costs) and not (what the disk costs as
well; ext4 in the same state stands beside it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.proc import run
from benchmarks.rows.trees import READ_TIMEOUT_S, fill_cache, large_files, open_mount, random_reads_us

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "random 4 KiB reads, data in the cache, page cache cold"


def measure(session: Session) -> list[Figure]:
    cache = session.place.folder("full-cache")
    fill_cache(session, cache)
    names = large_files(session.tree)
    times: dict[str, list[float]] = {"ext4_cold": []}
    for _ in range(session.runs):
        drop_page_cache()
        times["ext4_cold"].append(random_reads_us(session.tree, names))
        for driver in ("erofs", "fuse"):
            for state in ("warm", "cold"):
                mount = open_mount(session, driver, cache)
                if state == "warm":
                    _read_files(cache)
                times.setdefault(f"{driver}_{state}", []).append(random_reads_us(mount.path, names))
                mount.close()
    return [
        plain("5", "a read, driver erofs, cache file in memory", 60.0, "us", times["erofs_warm"], **times),
        plain("5-cold", "the same, cache file on disk only", None, "us", times["erofs_cold"]),
        plain("5-ext4-cold", "ext4, page cache cold", None, "us", times["ext4_cold"]),
        plain("5-fuse", "driver fuse, cache file in memory", None, "us", times["fuse_warm"]),
        plain("5-fuse-cold", "driver fuse, cache file on disk only", None, "us", times["fuse_cold"]),
    ]


def _read_files(folder: Path) -> None:
    run(["bash", "-c", 'find "$0" -type f -exec cat {} + >/dev/null', folder], timeout_s=READ_TIMEOUT_S)
