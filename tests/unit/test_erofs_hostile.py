"""Hostile EROFS images, one attack a case: each is refused with FormatError. Checksums are made to fit again."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.erofs import ErofsImage, superblock, write_image
from lazyfs.image.model import Attributes, DataMap, FileType, Inode
from tests.erofskit import ACL, directory, patched, regular, resealed, symlink

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (1 << 20, 1 << 16)
# Offsets of an extended inode's fields
FORMAT, XATTRS, MODE, RESERVED, SIZE, UNION, INO, NS, NLINK, RESERVED2 = 0, 2, 4, 6, 8, 16, 20, 40, 44, 48
NAMES = [".", "..", "b", "c", "d", "l", "n", "p", "w", "x"]


def build() -> bytes:
    big = directory(**{f"f{index:03}": regular() for index in range(300)})
    chunked = Inode(FileType.REGULAR, Attributes(), size=3 * 4096, data=DataMap(12, ((0, 1, 1), (2, 1, 7))))
    return write_image(
        directory(
            b=big, c=chunked, d=directory(e=directory()), l=symlink(b"target"), n=Inode(FileType.FIFO, Attributes()),
            p=directory(q=regular(9)), w=symlink(b"w" * 4090),
            x=regular(5, xattrs=((b"user.a", b"1234"), (b"user.b", b""))),
        ),
        SIZES,
    )  # fmt: skip


GOOD = build()
IMAGE = ErofsImage.parse(GOOD, SIZES)
PATHS = {path.decode(): nid for path, nid in IMAGE.walk()}
ROOT = IMAGE.root_nid


def at(path: str, field: int = 0) -> int:
    """Byte offset of an inode's field."""
    return PATHS[path] * 32 + field


def dirent(path: str, index: int) -> int:
    """Byte offset of a dirent in an inline directory without xattrs."""
    return at(path, 64 + 12 * index)


def root_dirent(name: str) -> int:
    return dirent("", NAMES.index(name))


def name_place(name: str) -> int:
    offset = struct.unpack_from("<H", GOOD, root_dirent(name) + 8)[0]
    return dirent("", 0) + offset


def put(offset: int, fmt: str, *values: object) -> Callable[[], bytes]:
    return lambda: patched(GOOD, offset, fmt, *values)


def swap(first: str, second: str) -> Callable[[], bytes]:
    """Two names of the root change places; their order is wrong then."""

    def attack() -> bytes:
        data = bytearray(GOOD)
        data[name_place(first)], data[name_place(second)] = data[name_place(second)], data[name_place(first)]
        return resealed(data)

    return attack


BIG_BLOCK = struct.unpack_from("<I", GOOD, at("b", UNION))[0] * 4096
XATTR = at("x", 64)

ATTACKS: dict[str, Callable[[], bytes]] = {
    # superblock
    "empty": lambda: b"",
    "less than a block": lambda: GOOD[:4095],
    "truncated": lambda: GOOD[:-4096],
    "not whole blocks": lambda: GOOD + b"\0",
    "longer than it says": lambda: GOOD + bytes(4096),
    "magic": put(1024, "I", 0x12345678),
    "checksum": lambda: GOOD[:1028] + bytes(4) + GOOD[1032:],
    "byte under the checksum": lambda: GOOD[:4000] + b"\xaa" + GOOD[4001:],
    "compression feature": put(1024 + 80, "I", 0xD),
    "unknown compat feature": put(1024 + 8, "I", 0x7),
    "no device table": put(1024 + 80, "I", 0x4),
    "block size": put(1024 + 12, "B", 9),
    "extra slots": put(1024 + 13, "B", 1),
    "metadata elsewhere": put(1024 + 40, "I", 1),
    "shared xattrs": put(1024 + 44, "I", 1),
    "packed inode": put(1024 + 96, "Q", 5),
    "reserved of superblock": put(1024 + 104, "B", 1),
    "label": put(1024 + 64, "B", 65),
    "inode count 0": put(1024 + 16, "Q", 0),
    "inode count huge": put(1024 + 16, "Q", 2**64 - 1),
    "inode count one less": put(1024 + 16, "Q", IMAGE.inode_count - 1),
    "device count": put(1024 + 86, "H", 65535),
    "device table elsewhere": put(1024 + 88, "H", 10),
    "device blocks": put(1152 + 64, "I", 2**32 - 1),
    "device tag is a path": put(1152, "11s", b"/etc/shadow"),
    "device mapped": put(1152 + 128 + 68, "I", 1),
    # root
    "root outside": put(1024 + 14, "H", 0xFFFF),
    "root in the superblock": put(1024 + 14, "H", 33),
    "root is a file": put(1024 + 14, "H", PATHS["c"]),
    # the shape of the tree
    "cycle to the root": put(root_dirent("d"), "Q", ROOT),
    "cycle below": put(dirent("d", 2), "Q", PATHS["d"]),
    "directory with two parents": put(root_dirent("d"), "Q", PATHS["p"]),
    "dot names another": put(root_dirent("."), "Q", PATHS["d"]),
    "dotdot of root": put(root_dirent(".."), "Q", PATHS["d"]),
    "dotdot of directory": put(dirent("d", 1), "Q", PATHS["p"]),
    "dot is no directory": put(root_dirent(".") + 10, "B", 1),
    "no dot": put(name_place("."), "B", 1),
    "no dotdot": put(name_place("..") + 1, "B", ord("/") + 1),
    "nid outside": put(root_dirent("c"), "Q", 1 << 40),
    "nid beyond signed": put(root_dirent("c"), "Q", 2**64 - 1),
    "nid of directory outside": put(root_dirent("d"), "Q", 2**63),
    "nid at the last slot": put(root_dirent("c"), "Q", len(GOOD) // 32 - 1),
    "nid into a name": put(root_dirent("c"), "Q", ROOT + 2),
    "dirent type": put(root_dirent("c") + 10, "B", 5),
    "dirent type unknown": put(root_dirent("c") + 10, "B", 200),
    "dirent says directory of a file": put(root_dirent("c") + 10, "B", 2),
    "dirent says file of a directory": put(root_dirent("d") + 10, "B", 1),
    "dirent reserved": put(root_dirent("c") + 11, "B", 1),
    # names
    "slash": put(name_place("c"), "B", ord("/")),
    "nul in the middle": put(name_place("c"), "B", 0),
    "nul at the end": put(name_place("x"), "B", 0),
    "unsorted": swap("c", "d"),
    "twice": put(name_place("d"), "B", ord("c")),
    "unsorted far down": put(BIG_BLOCK + struct.unpack_from("<H", GOOD, BIG_BLOCK + 12 * 9 + 8)[0], "B", ord("z")),
    "unsorted across blocks": put(at("b", UNION), "I", BIG_BLOCK // 4096 + 1),
    "first name offset 0": put(root_dirent(".") + 8, "H", 0),
    "first name offset odd": put(root_dirent(".") + 8, "H", 121),
    "first name offset beyond": put(root_dirent(".") + 8, "H", 12 * 300),
    "first name offset less": put(root_dirent(".") + 8, "H", 12 * 9),
    "name offset underflow": put(root_dirent("c") + 8, "H", 1),
    "name offset beyond the block": put(root_dirent("x") + 8, "H", 65535),
    "empty name": put(root_dirent("c") + 8, "H", struct.unpack_from("<H", GOOD, root_dirent("d") + 8)[0]),
    "name over 255": put(BIG_BLOCK + 12 * 5 + 8, "H", 4095),
    # inodes
    "directory with chunks": put(at("d", FORMAT), "H", 9),
    "directory compressed": put(at("d", FORMAT), "H", 3),
    "compact inode": put(at("c", FORMAT), "H", 8),
    "file inline": put(at("c", FORMAT), "H", 5),
    "file plain": put(at("c", FORMAT), "H", 1),
    "unknown format bits": put(at("c", FORMAT), "H", 9 | 0x10),
    "fifo inline": put(at("n", FORMAT), "H", 5),
    "fifo with data": put(at("n", SIZE), "Q", 1),
    "fifo with number": put(at("n", UNION), "I", 1),
    "mode without type": put(at("c", MODE), "H", 0o644),
    "mode of unknown type": put(at("c", MODE), "H", 0o170644),
    "mode of another type": put(at("c", MODE), "H", 0o120777),
    "reserved": put(at("c", RESERVED), "H", 1),
    "reserved at the end": put(at("c", RESERVED2 + 15), "B", 1),
    "inode number": put(at("c", INO), "I", 1),
    "nanoseconds": put(at("c", NS), "I", 10**9),
    "link count of file 0": put(at("c", NLINK), "I", 0),
    "link count of file 2": put(at("c", NLINK), "I", 2),
    "link count of directory": put(at("d", NLINK), "I", 2),
    "negative size": put(at("c", SIZE), "Q", 2**63),
    "size that overflows": put(at("c", SIZE), "Q", 2**64 - 1),
    "directory size 0": put(at("d", SIZE), "Q", 0),
    "directory size huge": put(at("d", SIZE), "Q", 2**63 - 1),
    "directory size beyond its block": put(at("d", SIZE), "Q", 4095),
    "directory size one less": put(at("d", SIZE), "Q", 39),
    "directory data beyond the image": put(at("b", UNION), "I", 2**32 - 1),
    "directory data in the superblock": put(at("b", UNION), "I", 0),
    "symlink empty": put(at("l", SIZE), "Q", 0),
    "symlink too long": put(at("w", SIZE), "Q", 4096),
    "symlink beyond the block": put(at("l", SIZE), "Q", 4095),
    "symlink with nul": put(at("l", 64), "B", 0),
    "symlink data beyond": put(at("w", UNION), "I", 10**6),
    "symlink shares a directory's block": put(at("w", UNION), "I", BIG_BLOCK // 4096),
    "inodes overlap": put(at("l", SIZE), "Q", 100),
    # chunks
    "chunk format without indexes": put(at("c", UNION), "H", 0),
    "chunk format of 48 bits": put(at("c", UNION), "H", 0x60),
    "chunk format reserved": put(at("c", UNION + 2), "H", 1),
    "device 0": put(at("c", 64 + 2), "H", 0),
    "device beyond": put(at("c", 64 + 2), "H", 3),
    "device far beyond": put(at("c", 64 + 2), "H", 65535),
    "two devices": put(at("c", 64 + 2), "H", 2),
    "hole with device": put(at("c", 64 + 8 + 2), "H", 1),
    "block beyond": put(at("c", 64 + 4), "I", (1 << 20) // 4096),
    "block nearly a hole": put(at("c", 64 + 4), "I", 2**32 - 2),
    "upper bits of block": put(at("c", 64), "H", 1),
    "more chunks than the image": put(at("c", SIZE), "Q", 1 << 50),
    "chunk table over the neighbour": put(at("c", SIZE), "Q", 9 * 4096),
    # xattrs
    "xattr area beyond the image": put(at("x", XATTRS), "H", 65535),
    "xattr area without entries": put(at("x", XATTRS), "H", 1),
    "xattr area cut": put(at("x", XATTRS), "H", 3),
    "xattr shared": put(XATTR + 4, "B", 1),
    "xattr filter": put(XATTR, "I", 1),
    "xattr prefix 0": put(XATTR + 13, "B", 0),
    "xattr prefix lustre": put(XATTR + 13, "B", 5),
    "xattr prefix long": put(XATTR + 13, "B", 0x81),
    "xattr name beyond": put(XATTR + 12, "B", 255),
    "xattr value beyond": put(XATTR + 14, "H", 65535),
    "xattr name empty": put(XATTR + 12, "B", 0),
    "xattr twice": put(XATTR + 16 + 8 + 4, "B", ord("a")),
    "xattr unsorted": put(XATTR + 16, "B", ord("z")),
    "xattr name nul": put(XATTR + 16, "B", 0),
    "xattr acl with suffix": put(XATTR + 13, "B", 2),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_is_refused(attack: str) -> None:
    data = ATTACKS[attack]()
    assert data != GOOD
    with pytest.raises(FormatError):
        ErofsImage.parse(data, SIZES)


def test_the_unharmed_image_is_accepted() -> None:
    assert resealed(GOOD) == GOOD
    assert sorted(PATHS) == sorted(path.decode() for path, _ in ErofsImage.parse(GOOD, SIZES).walk())


@pytest.mark.parametrize("sizes", [(), (1 << 20,), (1 << 20, 1 << 16, 4096), (1 << 16, 1 << 20), (1 << 20, 4096),
                                   (1 << 20, 5), (1 << 20, -4096)])  # fmt: skip
def test_other_devices_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        ErofsImage.parse(GOOD, sizes)


def test_features_of_other_tools_are_told_apart() -> None:
    with pytest.raises(UnsupportedError):
        ErofsImage.parse(patched(GOOD, 1024 + 80, "I", 0x1D), SIZES)


@pytest.mark.parametrize("name", [b"user.overlay.x", b"trusted.overlay.opaque"])
def test_overlay_xattr_is_refused(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.image.erofs.xattr._FORBIDDEN", (b"nothing",))
    data = write_image(directory(f=regular(xattrs=((name, b"y"),))), ())
    monkeypatch.undo()
    with pytest.raises(FormatError, match="overlayfs"):
        ErofsImage.parse(data, ())


def test_malformed_acl_is_refused() -> None:
    """The kernel would answer EINVAL to everything in such a directory. (Found by mounting mutated images.)"""
    good = write_image(directory(f=regular(xattrs=((b"system.posix_acl_access", ACL),))), ())
    place = good.index(ACL)
    for offset in (0, 4, 6, 12, len(ACL) - 8):
        with pytest.raises(FormatError, match="POSIX ACL"):
            ErofsImage.parse(patched(good, place + offset, "H", 0x7F), ())


def test_tree_too_deep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = node = directory()
    depth = limits.PATH_DEPTH_MAX + 1
    for _ in range(depth):
        node.children[b"d"] = node = directory()
    monkeypatch.setattr(limits, "PATH_DEPTH_MAX", 1 << 20)
    monkeypatch.setattr(limits, "PATH_BYTES_MAX", 1 << 20)
    data = write_image(root, ())
    assert ErofsImage.parse(data, ()).inode_count == depth + 1
    monkeypatch.undo()
    with pytest.raises(FormatError, match="deeper"):
        ErofsImage.parse(data, ())


def test_path_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = node = directory()
    for _ in range(17):
        child = directory()
        node.children[b"d" * 250] = child
        node = child
    monkeypatch.setattr(limits, "PATH_BYTES_MAX", 1 << 20)
    data = write_image(root, ())
    monkeypatch.undo()
    with pytest.raises(FormatError, match="longer"):
        ErofsImage.parse(data, ())


def many_directories(count: int = 2000) -> tuple[bytes, list[int]]:
    """An image with a directory of many blocks and many small ones; their inodes' offsets."""
    big = directory(**{f"name-{index:06}": regular() for index in range(20_000)})
    small = {f"s{index:05}": directory() for index in range(count)}
    data = write_image(directory(big=big, **small), ())
    image = ErofsImage.parse(data, ())
    return data, [nid * 32 for name, nid, _ in image.entries(image.root_nid)]


def test_many_directories_on_the_same_blocks_cost_little() -> None:
    """Each claims the large one's blocks: 2000 times 600 KB, were they read before they are counted."""
    data, (big, *small) = many_directories()
    inode = data[big : big + 64]
    damaged = bytearray(data)
    for offset in small:
        damaged[offset : offset + 20] = inode[:20]
    assert_cheap(resealed(damaged))


def test_many_files_on_the_same_chunk_table_cost_little() -> None:
    """Files of overlapping inodes, each with a table as long as the image."""
    root = directory(**{f"f{index:05}": regular(5) for index in range(5000)})
    data = bytearray(write_image(root, (4096,)))
    image = ErofsImage.parse(bytes(data), (4096,))
    for name, nid, _ in image.entries(image.root_nid):
        assert name
        room = (len(data) - nid * 32 - 64) // 8
        struct.pack_into("<Q", data, nid * 32 + SIZE, room * 4096)
    assert_cheap(resealed(data), (4096,))


def test_many_overlapping_xattr_areas_cost_little() -> None:
    """Areas of 256 KB, one every 96 bytes."""
    root = directory(**{f"f{index:05}": regular() for index in range(8000)})
    data = bytearray(write_image(root, ()))
    image = ErofsImage.parse(bytes(data), ())
    for _, nid, _ in image.entries(image.root_nid):
        struct.pack_into("<H", data, nid * 32 + XATTRS, 65535)
    assert_cheap(resealed(data))


def assert_cheap(data: bytes, sizes: tuple[int, ...] = ()) -> None:
    """Refused, within memory that is a small multiple of the image's size."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            ErofsImage.parse(data, sizes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(data)


def test_superblock_fields_are_where_they_should_be() -> None:
    fields = superblock.parse_superblock(memoryview(GOOD), SIZES)
    assert dataclasses.astuple(fields) == (ROOT, IMAGE.inode_count, len(GOOD) // 4096, 2)
