"""A node that starts again, or is used, while what it stands on is not as it was: registry, cache directory, mounts."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from tests.daemonkit import WAIT_S, Daemon, running_daemon, start_daemon
from tests.faultproxy import FaultProxy
from tests.mountkit import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
RNG = random.Random(29)
FILES = {f"f{number}": RNG.randbytes(1_300_000) for number in range(6)}     # more than a chunk each
DRIVERS = pytest.mark.parametrize("driver", ["erofs", "fuse"])


def mount(machine: Machine, host: str, driver: str = "erofs", name: str = "mnt", timeout_s: int = 60) -> Path:
    target = machine.target(name)
    machine.lazyfs("mount", f"{host}/app:lazy", target, "--insecure", "--driver", driver, "--read-timeout",
                   str(timeout_s))
    return target


def read(path: Path) -> bytes | int:
    """Past the page cache; or the errno."""
    try:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read()
    except OSError as error:
        return error.errno or 0


def page_of(path: Path) -> bytes | int:
    """The first one: its read fails once, not once for each page of the file."""
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), 4096, 0)
    except OSError as error:
        return error.errno or 0


def wait_until_right(path: Path, data: bytes) -> None:
    """Errors are remembered for a moment, a worker takes one to come."""
    deadline = time.monotonic() + WAIT_S
    while (found := read(path)) != data:
        assert isinstance(found, int), "wrong bytes"
        assert time.monotonic() < deadline, os.strerror(found)
        time.sleep(0.1)


@DRIVERS
def test_a_restart_without_registry_serves_what_is_cached(machine: Machine, registry: str, driver: str) -> None:
    with FaultProxy(registry) as proxy, running_daemon(machine) as daemon:
        target = mount(machine, proxy.host, driver, timeout_s=2)
        wait_until_right(target / "f0", FILES["f0"])
        proxy.down()
        worker = daemon.worker()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_ready(not_worker=worker)
        wait_until_right(target / "f0", FILES["f0"])
        assert page_of(target / "f5") in {errno.EIO, errno.ETIMEDOUT}
        machine.umount(target)
        daemon.stop()
        with restarted(daemon):      # from nothing: the image's bootstrap has to come from somewhere
            machine.lazyfs("mount", f"{proxy.host}/app:lazy", target, "--insecure", code=20)
            proxy.up()
            mount(machine, proxy.host, driver)
            wait_until_right(target / "f5", FILES["f5"])
            machine.umount(target)


@contextlib.contextmanager
def restarted(daemon: Daemon) -> Iterator[None]:
    daemon.process = start_daemon(daemon.machine).process
    daemon.wait_ready()
    yield


@DRIVERS
def test_unmounting_in_a_loop_under_readers(machine: Machine, registry: str, driver: str) -> None:
    ended, problems = threading.Event(), list[str]()

    def reader(seed: int) -> None:
        chance = random.Random(seed)
        while not ended.is_set():
            name = chance.choice(sorted(FILES))
            found = read(machine.directory / "mnt" / name)
            if found not in (FILES[name], errno.ENOENT, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN):
                problems.append(f"{name}: {found if isinstance(found, int) else 'wrong bytes'}")

    with running_daemon(machine) as daemon:
        worker = daemon.worker()
        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(4):
                target = mount(machine, registry, driver)
                with (target / "f1").open("rb") as file:
                    assert os.pread(file.fileno(), 10, 0) == FILES["f1"][:10]
                    if number % 2:
                        # In use, and the message says by whom.
                        assert str(os.getpid()) in machine.umount(target, code=42)
                    machine.umount(target, "--lazy")
                    assert mountapi.mount_at(str(target)) is None
                    assert os.pread(file.fileno(), 10, 1_000_000) == FILES["f1"][1_000_000:1_000_010]
        finally:
            ended.set()
            for thread in threads:
                thread.join(90)
        assert not any(thread.is_alive() for thread in threads)
        assert problems == []
        deadline = time.monotonic() + WAIT_S
        while True:                # the detached ones are taken away when their last reader is gone
            health = daemon.health()
            if health["detached"] == health["mounts"] == 0:
                break
            assert time.monotonic() < deadline, health
            time.sleep(0.1)
        assert daemon.worker() == worker
        daemon.stop()
    machine.assert_clean()


def _remove(cache: Path) -> None:
    shutil.rmtree(cache)


def _empty(cache: Path) -> None:
    for path in cache.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _open_to_all(cache: Path) -> None:
    cache.chmod(0o777)


@pytest.mark.parametrize("change", [_remove, _empty, _open_to_all])
def test_a_cache_directory_that_changes_under_load(
    machine: Machine, registry: str, change: Callable[[Path], None]
) -> None:
    """Readers see the right bytes, before and after the worker is another one."""
    with running_daemon(machine) as daemon:
        target = mount(machine, registry)
        wait_until_right(target / "f0", FILES["f0"])
        change(machine.cache)
        for name in ("f1", "f0"):
            wait_until_right(target / name, FILES[name])
        worker = daemon.worker()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_ready(not_worker=worker)
        for name, data in FILES.items():
            wait_until_right(target / name, data)
        assert machine.cache.stat().st_mode & 0o777 == 0o700
        machine.umount(target)


def test_a_daemon_whose_cache_is_on_its_own_mount_is_refused(machine: Machine, registry: str) -> None:
    with running_daemon(machine):
        target = mount(machine, registry)
        other = Machine(machine.directory / "other")
        other.directory.mkdir()
        for place in (target / "cache", target):
            assert "lies on a" in other.lazyfs("daemon", "--cache-dir", place, code=30)
        other.assert_clean()
        machine.umount(target)
