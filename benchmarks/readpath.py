"""
The read path's knobs, in turns: read-ahead by driver, and how many read-ahead requests may wait.

`python -m benchmarks.readpath [readahead|background] [--runs N]`. Image `web`; the files read are in the cache, but
their layer devices are not complete, so every page that the kernel has not comes from the worker. Prints a line a
setting: requests that reached the worker, its CPU milliseconds, seconds (least and median). docs/readpath.md has the
figures.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import LazyMount
from benchmarks.kit.proc import ToolError, run
from benchmarks.kit.workspace import measured
from benchmarks.session import NUMPY, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kit.workspace import Workspace

BDI = Path("/sys/class/bdi")
READ_AHEADS_KIB = {"erofs": (4, 32, 128, 512, 1024, 4096), "fuse": (4, 64, 128, 256, 1024)}
BACKGROUNDS = (12, 256)              # FUSE's default, ours
_SCATTERED = 1500                    # reads of a page
_PAGE = 4096
_STEP = 16 << 10
_LARGE_COUNT = 3                     # files read from end to end
_WAITING_FILES = 200                 # not in the cache, whose reads wait while others are timed
SILENT_S = 3.0
_MOUNT_TRY_COUNT = 10
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Samples:
    requests: list[int] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return (f"{statistics.median(self.requests):6.0f} requests, worker {min(self.cpu_ms):5.0f} ms CPU (median "
                f"{statistics.median(self.cpu_ms):.0f}), {min(self.seconds):.3f} s (median "
                f"{statistics.median(self.seconds):.3f})")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readpath", description=__doc__)
    parser.add_argument("what", choices=["readahead", "background"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    def measure_all(place: Workspace) -> None:
        session = Session(place, options.runs)
        (read_ahead if options.what == "readahead" else background)(session)

    return measured("readpath", measure_all)


def read_ahead(session: Session) -> None:
    """Whole large files, and scattered pages of the largest, by read-ahead."""
    for driver, sizes in READ_AHEADS_KIB.items():
        with mounted(session, driver) as (mount, knob):
            files = large_files(mount.path)
            loads = {"whole files": partial(read_whole, files), "scattered pages": partial(scatter, files[0])}
            read_whole(files)    # into the cache
            found: dict[tuple[str, int], Samples] = {}
            for _ in range(session.runs):
                for name, load in loads.items():
                    for size in sizes:
                        knob.write_text(str(size))
                        drop_page_cache()
                        measure(mount, load, found.setdefault((name, size), Samples()))
            for (name, size), samples in found.items():
                print(f"{driver} {name:16} {size:5} KiB: {samples}", flush=True)


def background(session: Session) -> None:
    """Cached pages read while many read-ahead requests wait for data, by `max_background`."""
    found: dict[int, Samples] = {}
    for _ in range(session.runs):
        for count in BACKGROUNDS:
            with mounted(session, "fuse") as (mount, _):
                files = large_files(mount.path)
                read_whole(files[:1])
                set_background(session, mount, count)
                with silent(session.near.daemon.pid), asked_ahead(mount.path, files):
                    measure(mount, partial(scatter, files[0]), found.setdefault(count, Samples()))
    for count, samples in found.items():
        print(f"max_background {count}: {samples}", flush=True)


@contextmanager
def mounted(session: Session, driver: str) -> Iterator[tuple[LazyMount, Path]]:
    """A fresh mount with an empty cache, and the file that says how far its reads go ahead."""
    image = session.lazy(NUMPY, session.near)
    for _ in range(_MOUNT_TRY_COUNT):
        before = set(BDI.iterdir())
        cache = Path(tempfile.mkdtemp(prefix="cache-", dir=session.place.top))    # the last worker may be there still
        mount = LazyMount(session.place, image, "--driver", driver, cache=cache)
        try:
            mount.mount()
            device = mount.path.stat().st_dev
            own = {BDI / f"{os.major(device)}:{os.minor(device)}"}
            if driver == "erofs":    # named by a counter: ours if nobody else mounted in this moment
                own = {path for path in set(BDI.iterdir()) - before if path.name.startswith("erofs")}
            if len(own) == 1:
                yield mount, own.pop() / "read_ahead_kb"
                return
        finally:
            mount.close()
    raise ToolError("others mount EROFS all the time: which read-ahead is ours cannot be told")


def set_background(session: Session, mount: LazyMount, count: int) -> None:
    """Let so many background requests of a FUSE mount be under way."""
    control = session.place.folder("fusectl")
    run(["mount", "-t", "fusectl", "none", control], timeout_s=20)
    try:
        connection = control / str(os.minor(mount.path.stat().st_dev))
        (connection / "max_background").write_text(str(count))
        (connection / "congestion_threshold").write_text(str(count * 3 // 4))
    finally:
        run(["umount", control], timeout_s=20)


@contextmanager
def silent(pid: int) -> Iterator[None]:
    """The registry answers nobody, for SILENT_S at most."""
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(SILENT_S, os.kill, (pid, signal.SIGCONT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)


@contextmanager
def asked_ahead(top: Path, others: list[Path]) -> Iterator[None]:
    """Files that are not in the cache have been asked for, by read-ahead; nobody waits for them but the kernel."""
    found = [path for path in top.rglob("*.py") if path.is_file() and path not in others][:_WAITING_FILES]

    def ask() -> None:
        for path in found:
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    drop_page_cache()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.5)    # it may be held up itself
    try:
        yield
    finally:
        thread.join(SILENT_S + 30)


def large_files(top: Path) -> list[Path]:
    found = [path for path in top.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.stat().st_size)[: -_LARGE_COUNT - 1 : -1]


def read_whole(files: list[Path]) -> None:
    """From end to end, in small steps: how much is asked for at once is the kernel's choice."""
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.read(_STEP):
                pass


def scatter(path: Path) -> None:
    """Read pages all over a file, in an order that no read-ahead can guess."""
    draw = random.Random(5)
    pages = path.stat().st_size // _PAGE
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(_SCATTERED):
            os.pread(descriptor, _PAGE, draw.randrange(pages) * _PAGE)
    finally:
        os.close(descriptor)


def measure(mount: LazyMount, load: Callable[[], None], samples: Samples) -> None:
    """Run a load; the page cache has nothing of it."""
    pid = mount.worker_pid()
    requests, cpu_s, begin = asked(mount), cpu_seconds(pid), time.perf_counter()
    load()
    samples.seconds.append(time.perf_counter() - begin)
    samples.cpu_ms.append(1e3 * (cpu_seconds(pid) - cpu_s))
    samples.requests.append(asked(mount) - requests)


def asked(mount: LazyMount) -> int:
    found = mount.statistics()["fetch"]
    count: int = found["hits"] + found["misses"]
    return count


def cpu_seconds(pid: int) -> float:
    words = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _TICKS


if __name__ == "__main__":
    sys.exit(main())
