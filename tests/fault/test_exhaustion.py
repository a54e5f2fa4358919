"""What a worker needs runs out: descriptors, memory; and everybody wants the same at once (faults, rows 15 and 19)."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemonkit import WAIT_S, Daemon, running_daemon
from tests.faultproxy import Fault, FaultProxy, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mountkit import Machine

pytestmark = pytest.mark.mount
RNG = random.Random(31)
FILES = {f"f{number}": RNG.randbytes(1_300_000) for number in range(8)}     # more than a chunk each
READERS = 200
CHUNK = 64 * 1024                # of tests.convertkit.OPTIONS


@pytest.fixture
def daemon(machine: Machine) -> Iterator[Daemon]:
    with running_daemon(machine) as running:
        yield running


def mount(machine: Machine, host: str, driver: str = "erofs", name: str = "mnt", timeout_s: int = 60) -> Path:
    target = machine.target(name)
    machine.lazyfs("mount", f"{host}/app:lazy", target, "--insecure", "--driver", driver, "--read-timeout",
                   str(timeout_s))
    return target


def read(path: Path) -> bytes | int:
    """Or the errno."""
    try:
        return path.read_bytes()
    except OSError as error:
        return error.errno or 0


def read_all_right(target: Path) -> None:
    for name, data in FILES.items():
        deadline = time.monotonic() + WAIT_S
        while (found := read(target / name)) != data:
            assert isinstance(found, int), "wrong bytes"
            assert time.monotonic() < deadline, f"{name}: {os.strerror(found)}"
            time.sleep(0.1)


def test_a_worker_without_descriptors_reads_again_when_there_are_some(
    machine: Machine, daemon: Daemon, registry: str
) -> None:
    """No connection to the registry can be opened: reads wait or fail, what is cached is served."""
    with FaultProxy(registry) as proxy:
        target = mount(machine, proxy.host, timeout_s=3)
        read_until_right(target / "f0")
        worker = daemon.worker()
        proxy.disconnect()
        used = max(int(path.name) for path in Path(f"/proc/{worker}/fd").iterdir()) + 1
        before = resource.prlimit(worker, resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        assert page_of(target / "f5") in {errno.EIO, errno.ETIMEDOUT, FILES["f5"][:4096]}
        assert page_of(target / "f0") == FILES["f0"][:4096]
        resource.prlimit(worker, resource.RLIMIT_NOFILE, before)
        read_all_right(target)
        assert daemon.worker() == worker
        machine.umount(target)


def test_a_worker_without_memory_serves_again_when_there_is_some(
    machine: Machine, daemon: Daemon, registry: str
) -> None:
    target = mount(machine, registry, timeout_s=3)
    read_until_right(target / "f0")
    worker = daemon.worker()
    used = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.prlimit(worker, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    found = [page_of(target / name) for name in list(FILES)[1:]]
    for name, page in zip(list(FILES)[1:], found, strict=True):
        assert isinstance(page, int) or page == FILES[name][:4096], "wrong bytes"
    resource.prlimit(worker, resource.RLIMIT_AS, before)
    daemon.wait_ready()      # one that died of it is followed by another
    read_all_right(target)
    machine.umount(target)


def page_of(path: Path) -> bytes | int:
    """The first one, past the page cache: its read fails once, not once for each page of the file."""
    try:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return os.pread(file.fileno(), 4096, 0)
    except OSError as error:
        return error.errno or 0


def read_until_right(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while read(path) != FILES[path.name]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_two_hundred_readers_of_a_cold_file_make_one_request_a_chunk(
    machine: Machine, daemon: Daemon, registry: str, driver: str
) -> None:
    """Of two mounts of the same image, all at once; the registry is slow, so that they do meet."""
    with FaultProxy(registry) as proxy:
        targets = [mount(machine, proxy.host, driver, name=f"m{number}") for number in range(2)]
        proxy.add(Fault(Kind.DELAY, path="/blobs/", seconds=1.0))
        proxy.forget()
        name, wrong = "f3", list[int]()
        start = threading.Barrier(READERS)

        def reader(number: int) -> None:
            start.wait()
            found = read(targets[number % 2] / name)
            if found != FILES[name]:
                wrong.append(number)

        threads = [threading.Thread(target=reader, args=(number,)) for number in range(READERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        asked = sorted(tuple(map(int, seen.headers["range"].removeprefix("bytes=").split("-")))
                       for seen in proxy.seen("GET", "/blobs/"))
        assert asked
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(asked)), f"asked for twice: {asked}"
        assert len(asked) <= -(-len(FILES[name]) // CHUNK) + 1
        for target in targets:
            machine.umount(target)
    assert daemon.process.poll() is None
