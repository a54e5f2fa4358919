"""
Small hand-made images and devices for tests of the file system, and helpers around mounts.

    tree = sample_tree()                  # ErofsImage + the bytes of its device
    MemoryDevice(data)                    # a fs.served.DeviceReader
    machine = Machine(tmp_path)           # run and cache directory of its own
    machine.mount("oci:...:lazy", machine.target())
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.fs import mountapi
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import Attributes, DataMap, FileType, Inode
from lazyfs.node import protocol, rundir

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4096


def require_mounting() -> None:
    """Skip, saying why, where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse")


@dataclass
class MemoryDevice:
    """Bytes in memory. `fail(offset, size)` may raise or sleep; `at_hand`: no waiting needed."""

    data: bytes
    read_timeout_s: float = 5.0
    reads: list[tuple[int, int]] = field(default_factory=list)
    fail: Callable[[int, int], object] | None = None
    waiting: set[Any] = field(default_factory=set)
    at_hand: bool = False

    @property
    def size(self) -> int:
        return len(self.data)

    def read_now(self, offset: int, size: int, pid: int = 0) -> bytes | None:
        if not self.at_hand:
            return None
        result = self.fail(offset, size) if self.fail is not None else None
        return result if isinstance(result, bytes) else self.data[offset : offset + size]

    async def read(self, offset: int, size: int, deadline: float) -> bytes:
        self.reads.append((offset, size))
        if self.fail is not None:
            result = self.fail(offset, size)
            if hasattr(result, "__await__"):
                result = await result
            if isinstance(result, bytes):
                return result
        return self.data[offset : offset + size]


@dataclass
class Sample:
    image: bytes
    tree: ErofsImage
    data: bytes
    files: dict[bytes, bytes]


def sample_tree(seed: int = 1) -> Sample:
    """Files of many sizes, holes, links, every type, xattrs, odd names."""
    rng = random.Random(seed)
    device = bytearray()
    files: dict[bytes, bytes] = {}
    root = Inode(FileType.DIRECTORY, Attributes(mode=0o755))

    def regular(path: bytes, content: bytes, **attributes: object) -> Inode:
        first = len(device) // BLOCK
        device.extend(content + bytes(-len(content) % BLOCK))
        shift = max(12, (max(1, len(content)) - 1).bit_length())
        inode = Inode(
            FileType.REGULAR,
            Attributes(**{"mode": 0o644, "mtime_s": 1_700_000_000, "mtime_ns": 123_456_789, **attributes}),
            size=len(content),
            data=DataMap(shift, ((0, 1, first),) if content else ()),
        )
        files[path] = content
        return inode

    for size in (0, 1, 4095, 4096, 4097, 100_000, 1_500_000):
        root.children[b"f%d" % size] = regular(b"f%d" % size, rng.randbytes(size))
    sub = Inode(FileType.DIRECTORY, Attributes(mode=0o2750, uid=1000, gid=70_000, mtime_s=-5))
    root.children[b"sub"] = sub
    sub.children[b"\xff\xfenot utf-8"] = regular(b"sub/\xff\xfenot utf-8", b"bytes")
    linked = regular(b"sub/one", rng.randbytes(5000), mode=0o4755, xattrs=((b"user.a", b"1"), (b"user.b", b"\0\xff")))
    linked.link_count = 2
    sub.children[b"one"] = root.children[b"two"] = linked
    files[b"two"] = files[b"sub/one"]
    sub.children[b"link"] = Inode(FileType.SYMLINK, Attributes(mode=0o777), size=9, target=b"../f100000"[:9])
    sub.children[b"null"] = Inode(FileType.CHARACTER, Attributes(mode=0o666), rdev=(1, 3))
    sub.children[b"disk"] = Inode(FileType.BLOCK, Attributes(mode=0o660), rdev=(259, 70_000))
    sub.children[b"pipe"] = Inode(FileType.FIFO, Attributes(mode=0o600))
    sub.children[b"socket"] = Inode(FileType.SOCKET, Attributes(mode=0o600))
    many = Inode(FileType.DIRECTORY, Attributes(mode=0o755))
    root.children[b"many"] = many
    for number in range(1000):
        name = b"entry-with-a-rather-long-name-%05d" % number
        many.children[name] = Inode(FileType.REGULAR, Attributes(mode=0o600), size=0)
    first = len(device) // BLOCK
    device.extend(rng.randbytes(2 * BLOCK))
    holes = Inode(
        FileType.REGULAR, Attributes(mode=0o600), size=10 * BLOCK - 7,
        data=DataMap(12, ((3, 1, first), (7, 1, first + 1))),
    )
    root.children[b"holes"] = holes
    content = bytearray(10 * BLOCK - 7)
    content[3 * BLOCK : 4 * BLOCK] = device[first * BLOCK : (first + 1) * BLOCK]
    content[7 * BLOCK : 8 * BLOCK] = device[(first + 1) * BLOCK : (first + 2) * BLOCK]
    files[b"holes"] = bytes(content)
    for directory in (root,):
        directory.link_count = 2 + sum(child.type is FileType.DIRECTORY for child in directory.children.values())
    sub.link_count = many.link_count = 2
    data = bytes(device)
    image = write_image(root, [len(data)])
    return Sample(image, ErofsImage.parse(image, [len(data)]), data, files)


# --- the command line ------------------------------------------------------------------------------------------------

LAZYFS = [sys.executable, "-m", "lazyfs"]


@dataclass
class Machine:
    """A run directory and a cache directory of their own, and `lazyfs` in them."""

    directory: Path

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "LAZYFS_RUN_DIR": str(self.run_dir)}

    def target(self, name: str = "mnt") -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def start(self, *words: str | Path, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*LAZYFS, *map(str, words)], env=self.environment, **{**pipes, **options})

    def lazyfs(self, *words: str | Path, code: int = 0, timeout_s: float = 60) -> str:
        """Run a command; returns what it wrote to stderr. `code`: the exit code it must have."""
        with self.start(*words) as process:
            try:
                _, errors = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == code, f"lazyfs {words}: exit code {process.returncode}: {errors}"
        assert "Traceback" not in errors, errors
        return errors

    def mount(self, image: str, target: Path, *words: str, code: int = 0) -> str:
        return self.lazyfs("mount", image, target, "--cache-dir", self.cache, *words, code=code)

    def umount(self, target: Path, *words: str, code: int = 0) -> str:
        return self.lazyfs("umount", target, *words, code=code)

    def worker(self) -> rundir.ProcessIdentity | None:
        found = [rundir.WorkerDir(path.parent).worker() for path in self.run_dir.glob("*/worker.json")]
        return next((worker for worker in found if worker is not None), None)

    def statistics(self) -> dict[str, Any]:
        (socket,) = self.run_dir.glob("*/control.sock")
        with protocol.ControlClient.connect(socket) as client:
            found: dict[str, Any] = client.request(protocol.STATS, 10)
            return found

    def mounts(self) -> list[mountapi.MountEntry]:
        return [entry for entry in mountapi.mounts() if entry.target.startswith(f"{self.directory}/")]

    def assert_clean(self) -> None:
        """Nothing is mounted, and the run directory is empty."""
        deadline = time.monotonic() + 30
        while self.mounts() or any(self.run_dir.glob("*")):
            assert time.monotonic() < deadline, f"{self.mounts()} {list(self.run_dir.rglob('*'))}"
            time.sleep(0.02)

    def close(self) -> None:
        """Take everything away; for the end of a test, however it ended."""
        worker = self.worker()
        if worker is not None:
            os.kill(worker.pid, signal.SIGKILL)
        while entries := self.mounts():
            mountapi.unmount(entries[-1].target, mountapi.MNT_DETACH)


def libraries(*programs: str) -> list[Path]:
    """The shared libraries of programs, and their loader."""
    text = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    return sorted({Path(word) for word in text.split() if word.startswith("/") and not word.endswith(":")})
