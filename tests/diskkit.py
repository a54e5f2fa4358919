"""
Small disks for tests: mounts that are taken away again, ext4 in a file, power cuts.

    with mounted_disks(tmp_path) as mount:
        disk = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", name="small")
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

Mounts = Callable[..., Path]
SHUTDOWN = 0x8004587D           # EXT4_IOC_SHUTDOWN, fs/ext4/ext4.h
NO_LOG_FLUSH = struct.pack("I", 2)

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None, reason="needs root and mkfs.ext4 to make small disks"
)


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextlib.contextmanager
def mounted_disks(tmp_path: Path) -> Iterator[Mounts]:
    """The value mounts somewhere, and returns where: mount("-t", "tmpfs", ..., name=...)."""
    places: list[Path] = []

    def mount(*words: str | Path, name: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        run("mount", *words, place)
        places.append(place)
        return place

    try:
        yield mount
    finally:
        for place in reversed(places):
            if os.path.ismount(place):
                # Lazily, where a test that failed left files open: they go with the process.
                done = subprocess.call(["umount", place], stderr=subprocess.DEVNULL) == 0
                assert done or subprocess.call(["umount", "--lazy", place]) == 0


def umount(place: Path) -> None:
    """Somebody who walks through /tmp may be in there for a moment: EBUSY is not the end before 20 s."""
    deadline = time.monotonic() + 20
    while (done := subprocess.run(["umount", place], capture_output=True, text=True, check=False)).returncode:
        assert "busy" in done.stderr, done.stderr
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.05)


def ext4(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", path)
    return path


def xfs(path: Path) -> Path:
    """300 MB, sparse: mkfs.xfs makes nothing smaller."""
    with path.open("wb") as file:
        file.truncate(300 << 20)
    run("mkfs.xfs", "-q", "-f", "-K", path)
    return path


def wait_detached(image: Path) -> None:
    """A mount namespace that another process made meanwhile has a copy of the mount: the disk is still in use."""
    for _ in range(300):
        if not subprocess.run(["losetup", "-j", image], check=True, capture_output=True).stdout:
            return
        time.sleep(0.1)
    raise AssertionError("the disk stays in use after umount")


def cut_power(disk: Path) -> None:
    """Shut the ext4 or XFS on `disk` down without flushing its log, as xfstests do: both know this number."""
    fd = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH)
    os.close(fd)


class PowerCutError(BaseException):
    """The machine stops here."""


class CuttingOs:
    """
    The os module, but the Nth call that changes a file never happens: power is cut, or (`kill`) this process killed.

    For module `lazyfs.cache.files`: monkeypatch.setattr(files, "os", CuttingOs(N)).
    """

    CALLS = ("pwrite", "fdatasync", "fsync", "ftruncate", "open", "rename", "unlink", "rmdir")

    def __init__(self, calls_left: int, *, kill: bool = False) -> None:
        self.calls_left = calls_left
        self.kill = kill

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in self.CALLS:
            return function

        def call(*arguments: Any) -> Any:
            if self.calls_left == 0:
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise PowerCutError
            self.calls_left -= 1
            return function(*arguments)

        return call


class FailingOs:
    """As CuttingOs, but the Nth call fails with errno `number`: that one, or (`lasting`) all from then on."""

    CALLS = (*CuttingOs.CALLS, "pread", "preadv", "fstat", "utime")

    def __init__(self, calls_left: int, number: int, *, lasting: bool = False) -> None:
        self.calls_left = calls_left
        self.number = number
        self.lasting = lasting
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in self.CALLS:
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls_left -= 1
            if self.calls_left == -1 or (self.lasting and self.calls_left < 0):
                self.failed = True
                raise OSError(self.number, os.strerror(self.number))
            return function(*arguments, **options)

        return call
