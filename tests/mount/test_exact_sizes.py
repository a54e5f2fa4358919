"""
How large an image may be: files over 4 GiB and of 1 TiB, directories of 100,000 names, 128 layers, a million entries.

With both drivers. What is small is in test_exact_semantics.py. LAZYFS_TEST_QUICK skips the million.
"""

# ruff: noqa: PTH116, PTH208 (system calls are what is tested here)

from __future__ import annotations

import multiprocessing
import os
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.convertkit import Layout, run_convert
from tests.mountkit import Machine, require_mounting
from tests.tarbuilder import TarBuilder, header, pad

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.mount
DRIVERS = ("erofs", "fuse")
GIB, TIB = 1 << 30, 1 << 40


@contextmanager
def mount(tmp_path: Path, tars: Sequence[bytes], driver: str) -> Iterator[Path]:
    """Convert and mount; nothing is left."""
    layout = Layout(tmp_path / "in")
    layout.add_image("app", tars)
    reference = f"oci:{tmp_path}/out:app"
    run_convert(layout.reference("app"), reference)
    machine = Machine(tmp_path)
    try:
        target = machine.target()
        machine.mount(reference, target, "--driver", driver)
        yield target
        machine.umount(target)
        machine.assert_clean()
    finally:
        machine.close()


def stored_bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in (place / "out/blobs/sha256").iterdir())


@pytest.mark.parametrize("driver", DRIVERS)
def test_files_larger_than_any_32_bit_number(tmp_path: Path, driver: str) -> None:
    require_mounting()
    block = bytes(range(256)) * 16
    pieces = {
        "5gib": (5 * GIB + 1, [(0, block), (4 * GIB - 100, block), (5 * GIB, b"e")]),
        "1tib": (TIB, [(0, block), (TIB // 2 + 5, b"middle"), (TIB - 3, b"end")]),
        "hole": (TIB + 7, []),
    }
    tar = TarBuilder()
    for form in ("pax", "gnu"):
        for name, (size, segments) in pieces.items():
            if form == "pax":
                tar.sparse_pax("1.0", f"{form}-{name}", size, [*segments, (size, b"")])
            else:
                tar.sparse_gnu(f"{form}-{name}", size, [*segments, (size, b"")])
    with mount(tmp_path, [tar.build()], driver) as top:
        # 1 TiB with three pieces costs 32,768 map entries and 192 MiB of zeros around them, 150 kB when compressed.
        assert stored_bytes(tmp_path) < 1_000_000, "holes are not stored"
        for form in ("pax", "gnu"):
            for name, (size, segments) in pieces.items():
                path = top / f"{form}-{name}"
                found = path.stat()
                assert found.st_size == size
                # EROFS does not count holes: both drivers say what the kernel's says.
                assert found.st_blocks * 512 == -(-size // 4096) * 4096
                with path.open("rb") as file:
                    for offset, data in segments:
                        file.seek(max(offset - 10, 0))
                        before = bytes(min(offset, 10))
                        assert file.read(len(before) + len(data)) == before + data
                    for offset in (8192, size // 3, size - 8192):
                        assert os.pread(file.fileno(), 4096, offset) == bytes(4096)
                    assert os.pread(file.fileno(), 10, size) == b""
                    assert len(os.pread(file.fileno(), 4096, size - 5)) == 5
                    assert file.seek(0, os.SEEK_END) == size


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_hundred_thousand_names_in_one_directory(tmp_path: Path, driver: str) -> None:
    require_mounting()
    names = [f"{number:06}{'x' * (number % 60)}" for number in range(100_001)]
    tar = TarBuilder().directory("d")
    for number, name in enumerate(names):
        tar.file(f"d/{name}", b"%d" % number if number % 1000 == 0 else b"", mtime=number)
    with mount(tmp_path, [tar.build()], driver) as top:
        assert sorted(os.listdir(top / "d")) == names
        for number in (0, 1, 49_999, 77_000, 100_000):
            path = top / "d" / names[number]
            assert os.stat(path).st_mtime_ns == number * 10**9
            assert path.read_bytes() == (b"%d" % number if number % 1000 == 0 else b"")
        assert not (top / "d/nothing").exists()
        with os.scandir(top / "d") as entries:
            assert sum(entry.is_file() for entry in entries) == len(names)


@pytest.mark.parametrize("driver", DRIVERS)
def test_128_layers(tmp_path: Path, driver: str) -> None:
    """Each adds a file, changes one that all have, and removes what the one below it has brought."""
    require_mounting()
    tars = []
    for number in range(128):
        tar = TarBuilder().file(f"own/{number:03}", b"%d" % number * 3000).file("all", b"layer %d" % number)
        tar.directory("dir", mode=0o700 + number % 8, mtime=number).file(f"passing/{number}", b"x")
        if number:
            tar.whiteout(f"passing/{number - 1}").hardlink(f"links/{number:03}", "own/000")
        tars.append(tar.build())
    with mount(tmp_path, tars, driver) as top:
        assert (top / "all").read_bytes() == b"layer 127"
        assert os.listdir(top / "passing") == ["127"]
        assert sorted(os.listdir(top / "own")) == [f"{number:03}" for number in range(128)]
        for number in range(128):
            assert (top / f"own/{number:03}").read_bytes() == b"%d" % number * 3000
        assert os.stat(top / "own/000").st_nlink == 128
        assert os.stat(top / "links/127").st_ino == os.stat(top / "own/000").st_ino
        found = os.stat(top / "dir")
        assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o707, 127 * 10**9)


# A million files: 1,000 directories of 1,000. Measured: 1.0 GiB to convert (all entries, and the merged tree, are
# objects in memory: 1 kB an entry), 0.5 to 0.6 GiB for a worker with the image mounted twice.
# So that it does not grow:
MILLION_CONVERT_BYTES_MAX = 3 * GIB // 2
MILLION_WORKER_BYTES_MAX = GIB


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_entries(tmp_path: Path) -> None:
    require_mounting()
    if os.environ.get("LAZYFS_TEST_QUICK"):
        pytest.skip("LAZYFS_TEST_QUICK is set: a million entries take minutes")
    machine = Machine(tmp_path)
    layout = Layout(tmp_path / "in")
    # In a child: a process' ru_maxrss begins with its parent's size, and that must not count.
    writer = multiprocessing.get_context("fork").Process(target=write_million, args=(layout,))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    reference = f"oci:{tmp_path}/out:app"
    started = time.monotonic()
    with machine.start("convert", "--quiet", layout.reference("app"), reference) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    figures = {"convert s": round(time.monotonic() - started, 1), "convert MiB": usage.ru_maxrss >> 10}
    assert usage.ru_maxrss << 10 < MILLION_CONVERT_BYTES_MAX
    try:
        for driver in DRIVERS:
            target = machine.target(driver)
            started = time.monotonic()
            machine.mount(reference, target, "--driver", driver)     # validates all of it
            figures[f"{driver} mount s"] = round(time.monotonic() - started, 1)
            assert len(os.listdir(target)) == 1000
            for number in (0, 123_456, 999_999):
                directory, name = divmod(number, 1000)
                path = target / f"d{directory:03}/f{name:03}"
                assert path.read_bytes() == (b"%08d" % number if number % 10 == 0 else b"")
                assert os.stat(path).st_mtime_ns == number * 10**9
            assert sorted(os.listdir(target / "d777")) == [f"f{name:03}" for name in range(1000)]
        worker = machine.worker()
        assert worker is not None
        peak = next(line for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines() if "VmHWM" in line)
        figures["worker MiB"] = int(peak.split()[1]) >> 10
        assert int(peak.split()[1]) << 10 < MILLION_WORKER_BYTES_MAX
        for driver in DRIVERS:
            machine.umount(machine.target(driver))
        machine.assert_clean()
    finally:
        machine.close()
        print(figures)


def write_million(layout: Layout) -> None:
    layout.add_image("app", [million_tar()], compression="zstd")


def million_tar() -> bytes:
    """A header a file is made from a template: only name, time and checksum differ. A tenth of the files hold bytes."""
    empty, full = bytearray(header("?" * 9)), bytearray(header("?" * 9, size=8))
    parts = []
    for directory in range(1000):
        parts.append(header(f"d{directory:03}/", type="5", mode=0o755))
        for name in range(1000):
            number = directory * 1000 + name
            block = full if number % 10 == 0 else empty
            block[:9] = b"d%03d/f%03d" % (directory, name)
            block[136:148] = b"%011o\0" % number
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            parts.append(bytes(block))
            if number % 10 == 0:
                parts.append(pad(b"%08d" % number))
    return b"".join(parts) + bytes(1024)
