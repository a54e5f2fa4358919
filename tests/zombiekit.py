"""
Containers that read and execute from a lazy image, each its own files, to be killed in the middle of it.

    image = zombie_layer(rounds, count)                  # a layer's archive: busybox, and files for each container
    with Containers(directory, lowers, round_name, count) as group:     # runc, overlayfs on a lazy mount
        group.wait("up")            # each has read and executed something: all works
        group.go()                  # each reads and executes files that nobody has read
        group.wait("begun")
        group.kill(within_s=8.0)    # all of them, and nothing of them is left

A container's files: w/<round>/<number>/{warm,cold}{,.x}; .x is a program, of which the kernel maps pages far apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import random
import select
import shutil
import signal
import struct
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from lazyfs.fs import mountapi
from tests.runnerkit import BUSYBOX, require_runc
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILE_BYTES = 64 << 10            # one chunk of a converted image of 64 KiB chunks
START_S = 60.0                   # for a container to come up, on a machine that has other work
_SUBREAPER = 36                  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
_SCRIPT = b"""
d=/w/$1/$2
until cat /bin/busybox $d/warm >/dev/null && $d/warm.x; do sleep 0.2; done
: >/ctl/$2.up
while [ ! -e /ctl/go ]; do sleep 0.1; done
: >/ctl/$2.begun
while :; do
  cat $d/cold >/dev/null 2>&1 &
  $d/cold.x 2>/dev/null && wait $! && : >/ctl/$2.done
  wait
  sleep 0.2
done
"""


def require_zombies() -> None:
    require_runc()
    if platform.machine() != "x86_64":
        pytest.skip("the program of these containers is for x86-64")


def zombie_layer(rounds: Sequence[str], count: int) -> bytes:
    """The archive."""
    rng = random.Random(8)
    builder = TarBuilder().directory("bin").file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)
    for name in ("cat", "sh", "sleep"):
        builder.symlink(f"bin/{name}", "busybox")
    for name in ("proc", "ctl", "w", "dev"):
        builder.directory(name)
    builder.file("run.sh", _SCRIPT)
    for one in rounds:
        builder.directory(f"w/{one}")
        for number in range(count):
            place = f"w/{one}/{number}"
            builder.directory(place)
            for name in ("warm", "cold"):
                builder.file(f"{place}/{name}", rng.randbytes(FILE_BYTES))
                builder.file(f"{place}/{name}.x", _program(rng), mode=0o755)
    return builder.build()


def _program(rng: random.Random) -> bytes:
    """exit(0), at the end of a program of some pages."""
    base, code = 0x400000, b"\xb8\x3c\x00\x00\x00\x31\xff\x0f\x05"   # mov eax, 60; xor edi, edi; syscall
    size = FILE_BYTES // 2
    entry = size - len(code)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base + entry, 64, 0, 0, 64, 56, 1,
                         0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)   # PT_LOAD, read and execute
    return header + segment + rng.randbytes(entry - len(header) - len(segment)) + code


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Orphans of our children become our children: somebody has to collect them."""
    libc = ctypes.CDLL(None)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_SUBREAPER, 0, 0, 0, 0)


@dataclass
class Containers:
    """`lowers`: lazy mounts, in turn; the containers of a round are numbered."""

    directory: Path
    lowers: Sequence[Path]
    round_name: str
    count: int
    inits: dict[int, int] = field(default_factory=dict)     # number -> pidfd of its first process
    pids: list[int] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.control.mkdir(parents=True)
        (self.directory / "empty").mkdir(exist_ok=True)
        try:
            for number in range(self.count):
                self._start(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """However the test ended."""
        for descriptor in self.inits.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        self._collect()
        for number in range(self.count):
            bundle = self.directory / f"{self.round_name}-{number}"
            if bundle.exists():
                self._runc("delete", "--force", self._name(number), code=None)
                if os.path.ismount(bundle / "rootfs"):
                    mountapi.unmount(str(bundle / "rootfs"), mountapi.MNT_DETACH)
                shutil.rmtree(bundle)

    @property
    def control(self) -> Path:
        return self.directory / f"{self.round_name}-ctl"

    def _name(self, number: int) -> str:
        return f"zombie-{os.getpid()}-{self.round_name}-{number}"

    def _runc(self, *words: str | Path, code: int | None = 0) -> None:
        """What it says goes to a file: a pipe would be the container's too. `code`: None, whatever it ends with."""
        log = self.directory / "log"
        with log.open("wb") as file:
            done = subprocess.run(["runc", "--root", self.directory / "runc", *words], stdin=subprocess.DEVNULL,
                                  stdout=file, stderr=file, check=False, timeout=START_S)
        assert code in (None, done.returncode), log.read_text()

    def _start(self, number: int) -> None:
        bundle = self.directory / f"{self.round_name}-{number}"
        (bundle / "rootfs").mkdir(parents=True)
        lower = self.lowers[number % len(self.lowers)]
        mountapi.mount("overlay", str(bundle / "rootfs"), "overlay", mountapi.MS_RDONLY,
                       f"lowerdir={lower}:{self.directory / 'empty'}")
        spec = {
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/sh", "/run.sh", self.round_name, str(number)], "cwd": "/",
                        "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs", "readonly": True},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                       {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                       {"destination": "/ctl", "type": "bind", "source": str(self.control), "options": ["bind", "rw"]}],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
                      "cgroupsPath": f"/{self._name(number)}"},
        }
        (bundle / "config.json").write_text(json.dumps(spec))
        pid_file = bundle / "pid"
        self._runc("run", "--detach", "--bundle", bundle, "--pid-file", pid_file, self._name(number))
        pid = int(pid_file.read_text())
        self.inits[number] = os.pidfd_open(pid)
        self.pids.append(pid)

    def go(self) -> None:
        (self.control / "go").touch()

    def wait(self, mark: str, within_s: float = START_S) -> None:
        """Until each has said so."""
        deadline = time.monotonic() + within_s
        while len(found := list(self.control.glob(f"*.{mark}"))) < self.count:
            assert time.monotonic() < deadline, f"{self.round_name}: {len(found)} of {self.count} are {mark}"
            time.sleep(0.02)

    def kill(self, within_s: float) -> float:
        """
        SIGKILL to each container's first process; all processes of it end before that does. Returns seconds.

        Asserts that all are gone `within_s`, and can be removed: runc, overlayfs, directories.
        """
        began = time.monotonic()
        for descriptor in self.inits.values():
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        alive = {descriptor: number for number, descriptor in self.inits.items()}
        for descriptor in alive:
            poll.register(descriptor, select.POLLIN)
        while alive:
            left_s = began + within_s - time.monotonic()
            assert left_s > 0, f"{self.round_name}: {_states(self.pids)} {within_s:g} s after SIGKILL"
            for descriptor, _ in poll.poll(left_s * 1000):
                poll.unregister(descriptor)
                del alive[descriptor]
        took_s = time.monotonic() - began
        self._collect()
        for number in range(self.count):
            bundle = self.directory / f"{self.round_name}-{number}"
            self._runc("delete", self._name(number))
            mountapi.unmount(str(bundle / "rootfs"), 0)
            shutil.rmtree(bundle)
        return took_s

    def _collect(self) -> None:
        for number in list(self.inits):
            os.close(self.inits.pop(number))
        for pid in self.pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        self.pids.clear()


def _states(pids: list[int]) -> dict[int, str]:
    """Of each process, and of all below it: its state, and where in the kernel it is."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            rest = (path / "stat").read_text().rpartition(")")[2].split()
            if int(path.name) in pids or int(rest[1]) in pids:
                found[int(path.name)] = f"{rest[0]} {(path / 'wchan').read_text()}"
    return found
