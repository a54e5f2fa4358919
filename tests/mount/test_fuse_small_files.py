"""Driver fuse gives small files to the page cache when they are opened: whole, right, never while they are read."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs.operations import GIVEN_BYTES_MAX
from tests.convertkit import Layout, run_convert
from tests.mountkit import Machine, require_mounting
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
PAGE = mmap.PAGESIZE
RNG = random.Random(11)
SIZES = [1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7, GIVEN_BYTES_MAX - 1, GIVEN_BYTES_MAX, GIVEN_BYTES_MAX + 1]
FILES = {f"f{size}": RNG.randbytes(size) for size in SIZES}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require_mounting()
    tmp_path = tmp_path_factory.mktemp("small")
    tar = TarBuilder()
    for name, content in FILES.items():
        tar.file(name, content)
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [tar.build()])
    run_convert(layout.reference("app"), f"oci:{tmp_path}/out:app")
    machine = Machine(tmp_path)
    try:
        target = machine.target()
        machine.mount(f"oci:{tmp_path}/out:app", target, "--driver", "fuse")
        for name in FILES:   # now all is in the cache
            (target / name).read_bytes()
        yield target
        machine.umount(target)
        machine.assert_clean()
    finally:
        machine.close()


def forget(path: Path) -> None:
    """Have the kernel drop what it has of a file, and the worker know it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.pread(descriptor, 1, 0)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def pages_there(descriptor: int, size: int) -> int:
    """How many pages of an open file are in the page cache; reads nothing."""
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        vector = ctypes.create_string_buffer(-(-size // PAGE))
        assert _libc.mincore(ctypes.addressof(first), size, vector) == 0
        del first
        return sum(byte & 1 for byte in vector.raw)


@pytest.mark.parametrize("size", SIZES)
def test_an_opened_small_file_is_in_the_page_cache_whole_and_right(mounted: Path, size: int):
    path = mounted / f"f{size}"
    forget(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        there = pages_there(descriptor, size)
        assert there == (-(-size // PAGE) if size <= GIVEN_BYTES_MAX else 0)
        assert os.pread(descriptor, size + 1, 0) == FILES[path.name]
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == FILES[path.name]
    finally:
        os.close(descriptor)


def test_many_readers_of_the_same_files_neither_hang_nor_see_other_bytes(mounted: Path):
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            path = mounted / rng.choice(list(FILES))
            descriptor = os.open(path, os.O_RDONLY)
            try:
                offset = rng.randrange(len(FILES[path.name]))
                if os.pread(descriptor, 9000, offset) != FILES[path.name][offset : offset + 9000]:
                    wrong.append(path.name)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    threads = [threading.Thread(target=read, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
