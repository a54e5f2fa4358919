"""
Small hand-made images and devices for tests of the file system, and helpers around mounts.

    tree = sample_tree()                  # ErofsImage + the bytes of its device
    MemoryDevice(data)                    # a fs.served.DeviceReader
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import Attributes, DataMap, FileType, Inode

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4096


def require_mounting() -> None:
    """Skip, saying why, where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")


@dataclass
class MemoryDevice:
    """Bytes in memory. `fail(offset, size)` may raise or sleep."""

    data: bytes
    read_timeout_s: float = 5.0
    reads: list[tuple[int, int]] = field(default_factory=list)
    fail: Callable[[int, int], object] | None = None

    @property
    def size(self) -> int:
        return len(self.data)

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
