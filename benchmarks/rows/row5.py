"""
Row 5: random 4 KiB reads, data in the local cache, page cache cold.

Two states of the cache: the whole image is there (the kernel's EROFS reads the cache's files itself), or the files
that are read are there but others not (reads go through the worker). And two of the cache's own files: their pages in
memory (what lazyfs costs), or not (what the disk costs as well; ext4 in the same state stands beside it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.proc import run
from benchmarks.rows.trees import READ_TIMEOUT_S, fill_cache, large_files, open_mount, random_reads_us, settle

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "random 4 KiB reads, data in the cache, page cache cold"


# key, driver, cache, whether the cache's files are in memory, title, target
_CASES = (
    ("5", "erofs", "whole", True, "a read, driver erofs, whole image cached, cache files in memory", 60.0),
    ("5-cold", "erofs", "whole", False, "the same, cache files on disk only", None),
    ("5-part", "erofs", "part", True, "driver erofs, part of the image cached, in memory", None),
    ("5-part-cold", "erofs", "part", False, "the same, on disk only", None),
    ("5-fuse", "fuse", "whole", True, "driver fuse, whole image cached, in memory", None),
    ("5-fuse-cold", "fuse", "whole", False, "the same, on disk only", None),
)


def measure(session: Session) -> list[Figure]:
    names = large_files(session.tree)
    caches = {name: session.place.folder(f"cache-{name}") for name in ("whole", "part")}
    fill_cache(session, caches["whole"])
    mount = open_mount(session, "auto", caches["part"])
    _read_files([mount.path / name for name in names])
    mount.close()
    settle(session.tree, *caches.values())
    times: dict[str, list[float]] = {case[0]: [] for case in _CASES}
    ext4 = []
    for _ in range(session.runs):
        drop_page_cache()
        ext4.append(random_reads_us(session.tree, names))
        for key, driver, cache, in_memory, _title, _target in _CASES:
            mount = open_mount(session, driver, caches[cache])
            if in_memory:
                _read_files([path for path in caches[cache].rglob("*") if path.is_file()])
            times[key].append(random_reads_us(mount.path, names))
            mount.close()
    figures = [plain(key, title, target, "us", times[key]) for key, _, _, _, title, target in _CASES]
    return [*figures, plain("5-ext4", "ext4, page cache cold", None, "us", ext4)]


def _read_files(paths: list[Path]) -> None:
    run(["cat", *paths], timeout_s=READ_TIMEOUT_S, discard=True)
