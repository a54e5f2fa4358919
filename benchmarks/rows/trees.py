"""Reading trees: what rows 3, 4, 5 and 6 do with a directory, wherever it comes from."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import LazyMount
from benchmarks.kit.proc import run
from benchmarks.session import TENSORFLOW

if TYPE_CHECKING:
    from benchmarks.session import Session

READ_TIMEOUT_S = 300.0
RANDOM_READ_BYTES = 4096
RANDOM_READ_COUNT = 4000
_LARGE_FILE_BYTES = 4 << 20


def list_tree(tree: Path) -> float:
    """Seconds of `find -ls` over a tree, page cache as it is."""
    return run(["bash", "-c", 'find "$0" -ls >/dev/null', tree], timeout_s=READ_TIMEOUT_S).wall_s


def read_tree(tree: Path) -> float:
    """Seconds of a tar of the whole tree, thrown away (through a pipe: tar reads nothing when it sees /dev/null)."""
    script = 'set -o pipefail; tar -C "$0" --one-file-system -cf - . | cat >/dev/null'
    return run(["bash", "-c", script, tree], timeout_s=READ_TIMEOUT_S).wall_s


def large_files(tree: Path) -> list[str]:
    """The tree's larger files, relative, in order of name."""
    found = []
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink() and path.stat().st_size >= _LARGE_FILE_BYTES:
                found.append(str(path.relative_to(tree)))
    return sorted(found)


def random_reads_us(tree: Path, names: list[str]) -> float:
    """Microseconds a read: 4 KiB at random offsets of the larger files, by size; every time the same ones."""
    generator = random.Random(4096)
    files = [os.open(tree / name, os.O_RDONLY) for name in names]
    try:
        sizes = [os.fstat(file).st_size for file in files]
        picks = generator.choices(range(len(files)), weights=sizes, k=RANDOM_READ_COUNT)
        places = [(files[pick], generator.randrange(sizes[pick] // RANDOM_READ_BYTES)) for pick in picks]
        begin = time.perf_counter()
        for file, block in places:
            os.pread(file, RANDOM_READ_BYTES, block * RANDOM_READ_BYTES)
        return (time.perf_counter() - begin) / len(places) * 1e6
    finally:
        for file in files:
            os.close(file)


def fill_cache(session: Session, cache: Path) -> None:
    """Have the whole image in a lazyfs cache directory, whatever driver mounts it later."""
    mount = open_mount(session, "auto", cache)
    read_tree(mount.path)
    mount.close()


def settle(*folders: Path) -> None:
    """
    Read freshly written files once from the disk, unmeasured.

    On a virtual machine the first read of what was just written is several times slower than later cold ones (the
    host's own cache); every side gets this first read for nothing.
    """
    drop_page_cache()
    for folder in folders:
        read_tree(folder)


def open_mount(session: Session, driver: str, cache: Path | None = None) -> LazyMount:
    """Mount the large image from the registry on loopback, page cache cold."""
    image = session.lazy(TENSORFLOW, session.near)
    mount = LazyMount(session.place, image, "--driver", driver, cache=cache)
    mount.mount()
    drop_page_cache()
    return mount
