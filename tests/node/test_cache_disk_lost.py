"""A daemon whose cache directory is deleted, or whose cache's disk becomes read-only, while containers read."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.convertkit import registry_with, tar_of
from tests.daemonkit import WAIT_S, Daemon, end_daemon, start_daemon
from tests.diskkit import ext4, mounted_disks, needs_mounts
from tests.mountkit import Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.mount, needs_mounts]
FILE_COUNT, FILE_BYTES = 8, 700_000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(FILE_BYTES)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_mounting()
    layers = {"app": [tar_of({f"file{number}": content(number) for number in range(FILE_COUNT)})]}
    with registry_with(tmp_path_factory.mktemp("registry"), layers) as running:
        yield f"{running.host}/app:lazy"


@contextlib.contextmanager
def daemon_on(machine: Machine) -> Iterator[Daemon]:
    daemon = start_daemon(machine, environment={"LAZYFS_CACHE_EVICT_INTERVAL_S": "1"})
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        end_daemon(daemon)


def mount(machine: Machine, image: str, name: str = "mnt") -> Path:
    target = machine.target(name)
    machine.lazyfs("mount", image, target, "--insecure", "--driver", "fuse")
    return target


def read(target: Path, number: int) -> bytes:
    with (target / f"file{number}").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


@contextlib.contextmanager
def reading(target: Path) -> Iterator[Callable[[], int]]:
    """Somebody reads all files, over and over; the value: how many reads there were. All must be right."""
    done, wrong, count = threading.Event(), list[str](), [0]

    def read_all() -> None:
        while not done.is_set():
            for number in range(FILE_COUNT):
                try:
                    if read(target, number) != content(number):
                        wrong.append(f"file{number}: wrong bytes")
                except OSError as error:
                    wrong.append(f"file{number}: {error}")
                count[0] += 1

    thread = threading.Thread(target=read_all)
    thread.start()
    try:
        yield lambda: count[0]
    finally:
        done.set()
        thread.join()
    assert not wrong, wrong[:3]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fail(disk: Path) -> None:
    """The kernel finds an error in the ext4 on `disk`, and makes it read-only, whoever has files open for writing."""
    source = subprocess.run(["findmnt", "-no", "SOURCE", disk], check=True, capture_output=True, text=True).stdout
    Path(f"/sys/fs/ext4/{Path(source.strip()).name}/trigger_fs_error").write_text("for a test")
    until(lambda: not writable(disk))


def writable(disk: Path) -> bool:
    try:
        (disk / "probe").write_bytes(b"")
    except OSError:
        return False
    return True


def test_a_cache_directory_that_is_deleted_under_load_is_made_again(machine: Machine, image: str) -> None:
    with daemon_on(machine) as daemon:
        target = mount(machine, image)
        with reading(target) as count:
            until(lambda: count() >= FILE_COUNT)
            shutil.rmtree(machine.cache)
            until((machine.cache / "lock").exists)
            assert machine.cache.stat().st_mode & 0o077 == 0
            again = count() + 2 * FILE_COUNT
            until(lambda: count() >= again)
        until(lambda: any((machine.cache / "v1").glob("*/live")))
        machine.umount(target)
        target = mount(machine, image)
        assert all(read(target, number) == content(number) for number in range(FILE_COUNT))
        assert daemon.wait_ready() == daemon.worker()
        machine.umount(target)


def test_a_worker_that_takes_over_on_a_read_only_disk_serves_on(tmp_path: Path, image: str) -> None:
    require_mounting()
    with mounted_disks(tmp_path) as disks, contextlib.ExitStack() as stack:
        machine = Machine(tmp_path)
        disk = disks("-o", "loop,errors=remount-ro", ext4(tmp_path / "disk.img", 128 << 20), name="cache")
        stack.callback(machine.close)
        (disk / "lost+found").rmdir()
        daemon = stack.enter_context(daemon_on(machine))
        target = mount(machine, image)
        assert all(read(target, number) == content(number) for number in range(3))
        fail(disk)
        with reading(target) as count:
            until(lambda: count() >= FILE_COUNT)
            os.kill(worker := daemon.worker(), signal.SIGKILL)
            daemon.wait_ready(not_worker=worker)
            again = count() + 2 * FILE_COUNT
            until(lambda: count() >= again)
            assert machine.statistics()["cache"]["trouble"][0]["why"] == "Read-only file system"
        machine.umount(target)
