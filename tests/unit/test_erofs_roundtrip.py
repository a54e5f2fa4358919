"""EROFS writer and reader against each other, and against fsck.erofs."""

from __future__ import annotations

import dataclasses
import mmap
import random
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lazyfs import limits
from lazyfs.errors import BugError, FormatError
from lazyfs.image.erofs import ErofsImage, ondisk, write_image
from lazyfs.image.model import EMPTY_MAP, Attributes, DataMap, FileType, Inode
from tests.erofskit import (
    ACL,
    CAPABILITY,
    DEVICE_SIZES,
    directory,
    extents,
    random_tree,
    regular,
    snapshot,
    symlink,
    write_devices,
)

if TYPE_CHECKING:
    from pathlib import Path

FSCK = shutil.which("fsck.erofs")


def roundtrip(root: Inode, device_sizes: tuple[int, ...] = DEVICE_SIZES) -> ErofsImage:
    return ErofsImage.parse(write_image(root, device_sizes), device_sizes)


def attributes(**values: object) -> Attributes:
    return dataclasses.replace(Attributes(), **values)


def test_empty_root() -> None:
    image = roundtrip(directory(), ())
    assert image.inode_count == 1
    assert image.entries(image.root_nid) == []
    assert image.parent(image.root_nid) == image.root_nid
    assert list(image.walk()) == [(b"", image.root_nid)]
    stat = image.stat(image.root_nid)
    assert (stat.type, stat.link_count, stat.mode) == (FileType.DIRECTORY, 2, 0o755)


def test_all_types_and_numbers_come_back() -> None:
    odd = attributes(mode=0o7777, uid=2**32 - 1, gid=2**32 - 1, mtime_s=-(2**63), mtime_ns=999_999_999)
    root = directory()
    root.children = {
        b"char": Inode(FileType.CHARACTER, odd, rdev=(4095, 2**20 - 1)),
        b"block": Inode(FileType.BLOCK, odd, rdev=(8, 256)),
        b"fifo": Inode(FileType.FIFO, odd),
        b"socket": Inode(FileType.SOCKET, attributes(mtime_s=2**63 - 1)),
        b"link": Inode(FileType.SYMLINK, odd, target=b"x/../\xff"),
        b"file": regular(5000, device=2, block=3),
        b"empty": regular(0),
    }
    image = roundtrip(root)
    assert snapshot(image.to_tree()) == snapshot(root) | {b"": snapshot(image.to_tree())[b""]}
    found = {path: image.stat(nid) for path, nid in image.walk()}
    assert found[b"char"].rdev == (4095, 2**20 - 1)
    assert found[b"char"].uid == 2**32 - 1
    assert found[b"socket"].mtime_s == 2**63 - 1
    assert found[b"empty"].size == 0


def test_names_sort_around_the_dots() -> None:
    names = [b"!", b"-", b"+a", b"...", b".a", b"..a", b"a", b"ab", b"a" * 255, b"\x01", b"\xff\xfe"]
    root = directory()
    root.children = {name: regular() for name in names}
    image = roundtrip(root)
    assert [name for name, _, _ in image.entries(image.root_nid)] == sorted(names)
    for name in names:
        assert image.lookup(image.root_nid, name) is not None
    for name in (b".", b"..", b"b", b"", b"a" * 254, b"\xff\xff"):
        assert image.lookup(image.root_nid, name) is None


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 200, 255])
def test_directory_of_many_blocks(length: int) -> None:
    root = directory()
    count = 1000 if length > 2 else 200
    root.children = {(b"%d" % index if length > 2 else bytes([index + 47])).rjust(length, b"x"): regular()
                     for index in range(count) if index + 47 not in {47, 46}}  # fmt: skip
    image = roundtrip(root)
    entries = image.entries(image.root_nid)
    assert [name for name, _, _ in entries] == sorted(root.children)
    assert all(image.lookup(image.root_nid, name) == nid for name, nid, _ in entries)


def test_every_directory_size_around_a_block() -> None:
    """Tails that just fit behind the inode, just do not, fill a block, or begin the next."""
    root = directory()
    for size in range(3990, 4110, 1):
        child = directory()
        # . and .. take 27 bytes; each name 12 more than itself
        rest = size - 27
        names = []
        while rest > 267:
            names.append(b"%03d" % len(names) + b"n" * 197)
            rest -= 212
        if rest > 15:
            names.append(b"zzz" + b"z" * (rest - 15))
        child.children = {name: regular() for name in names}
        root.children[b"%d" % size] = child
    assert snapshot(roundtrip(root).to_tree()).keys() == snapshot(root).keys()


def test_hard_links_are_one_inode() -> None:
    file = regular(10)
    root = directory(a=file, b=directory(c=file), d=file)
    image = roundtrip(root)
    nids = dict(image.walk())
    assert nids[b"a"] == nids[b"b/c"] == nids[b"d"]
    assert image.stat(nids[b"a"]).link_count == 3
    assert image.inode_count == 3
    tree = image.to_tree()
    assert tree.children[b"a"] is tree.children[b"b"].children[b"c"]


@pytest.mark.parametrize("size", [1, 59, 4031, 4032, 4033, 4095])
def test_symlinks_of_every_size(size: int) -> None:
    root = directory(a=symlink(b"t" * size), b=symlink(b"u" * size, xattrs=((b"trusted.x", b"y" * 100),)))
    image = roundtrip(root)
    for path, nid in image.walk():
        if path:
            assert image.readlink(nid) == (b"t" if path == b"a" else b"u") * size
    assert image.xattrs(image.lookup(image.root_nid, b"b") or 0) == ((b"trusted.x", b"y" * 100),)


def test_xattrs_come_back_sorted() -> None:
    xattrs = ((b"user.b", b""), (b"security.capability", CAPABILITY), (b"user.a", b"1" * 65535),
              (b"trusted.md5", b"\0"), (b"system.posix_acl_access", ACL), (b"user." + b"n" * 250, b"x"))  # fmt: skip
    image = roundtrip(directory(f=regular(1, xattrs=xattrs)))
    assert image.xattrs(image.lookup(image.root_nid, b"f") or 0) == tuple(sorted(xattrs))
    assert image.xattrs(image.root_nid) == ()


def test_extents_of_a_sparse_file() -> None:
    file = Inode(FileType.REGULAR, Attributes(), size=5 * 8192 - 100, device=1,
                 data=DataMap(13, ((1, 2, 8), (3, 1, 40))))  # fmt: skip
    image = roundtrip(directory(f=file), (4096, 1 << 20))
    nid = image.lookup(image.root_nid, b"f") or 0
    assert image.extents(nid, 0, 1 << 40) == [
        (-1, 0, 8192), (1, 8 * 4096, 16384), (1, 40 * 4096, 8192), (-1, 0, 8192 - 100),
    ]  # fmt: skip
    assert image.extents(nid, 8200, 10) == [(1, 8 * 4096 + 8, 10)]
    assert image.extents(nid, 24570, 10) == [(1, 8 * 4096 + 16378, 6), (1, 40 * 4096, 4)]
    assert image.extents(nid, file.size, 1) == []
    assert image.extents(nid, file.size - 1, 100) == [(-1, 0, 1)]
    assert image.data_map(nid) == (1, file.data)


def test_sparse_files_of_a_tebibyte_and_more_stay_small() -> None:
    hole = Inode(FileType.REGULAR, Attributes(), size=1 << 40)
    most = Inode(FileType.REGULAR, Attributes(), size=limits.FILE_BYTES_MAX)
    one = Inode(FileType.REGULAR, Attributes(), size=1 << 40, data=DataMap(30, ((1023, 1, 0),)))
    sizes = (1 << 30,)
    data = write_image(directory(hole=hole, most=most, one=one), sizes)
    assert len(data) < 9 << 20
    image = ErofsImage.parse(data, sizes)
    nid = image.lookup(image.root_nid, b"one") or 0
    assert image.extents(nid, (1 << 40) - 5, 100) == [(0, (1 << 30) - 5, 5)]
    nid = image.lookup(image.root_nid, b"most") or 0
    assert image.extents(nid, limits.FILE_BYTES_MAX - 3, 100) == [(-1, 0, 3)]
    assert image.data_map(nid) == (0, EMPTY_MAP)


def test_file_of_several_large_units() -> None:
    """A file over 8 TiB needs more than one of the largest units."""
    size = (1 << 43) + 12345
    file = Inode(FileType.REGULAR, Attributes(), size=size, data=DataMap(43, ((0, 2, 5),)))
    image = roundtrip(directory(f=file), (limits.DEVICE_BYTES_MAX,))
    nid = image.lookup(image.root_nid, b"f") or 0
    assert image.extents(nid, 0, size) == [(0, 5 * 4096, size)]


def test_same_tree_same_bytes_whatever_the_order() -> None:
    first, second = random_tree(random.Random(3), 100), random_tree(random.Random(3), 100)
    for node in [second, *second.children.values()]:
        node.children = dict(reversed(list(node.children.items())))
    data = write_image(first, DEVICE_SIZES)
    assert data == write_image(second, DEVICE_SIZES)
    assert len(data) % 4096 == 0
    other = random_tree(random.Random(4), 100)
    assert data[1072:1088] != write_image(other, DEVICE_SIZES)[1072:1088], "the uuid tells images apart"


def test_mmap_and_memoryview_parse_like_bytes(tmp_path: Path) -> None:
    data = write_image(directory(f=regular(10)), DEVICE_SIZES)
    path = tmp_path / "image"
    path.write_bytes(data)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        image = ErofsImage.parse(mapped, DEVICE_SIZES)
        assert snapshot(image.to_tree()) == snapshot(ErofsImage.parse(memoryview(data), DEVICE_SIZES).to_tree())
        del image


def test_asking_for_what_is_not_there_is_a_bug() -> None:
    image = roundtrip(directory(f=regular(10)))
    file = image.lookup(image.root_nid, b"f") or 0
    for call in (lambda: image.stat(file + 1), lambda: image.stat(1 << 70), lambda: image.entries(file),
                 lambda: image.readlink(file), lambda: image.data_map(image.root_nid), lambda: image.parent(file),
                 lambda: image.stat(-1)):  # fmt: skip
        with pytest.raises(BugError):
            call()


def _sparse_forever() -> Inode:
    return Inode(FileType.REGULAR, Attributes(), size=1 << 42, data=DataMap(12, ((0, 1, 0),)))


def _twice() -> Inode:
    child = directory()
    return directory(a=child, b=child)


def _deep(depth: int) -> Inode:
    root = node = directory()
    for _ in range(depth):
        node.children[b"d"] = node = directory()
    return root


def _named(name: bytes) -> Inode:
    root = directory()
    root.children[name] = regular()
    return root


def _long_path() -> Inode:
    root = node = directory()
    for _ in range(17):
        child = directory()
        node.children[b"d" * 250] = child
        node = child
    return root


REFUSED = {
    "slash": _named(b"a/b"), "nul": _named(b"a\0"), "empty": _named(b""), "dot": _named(b"."), "dotdot": _named(b".."),
    "long": _named(b"x" * 256), "root is a file": regular(), "directory twice": _twice(), "deep": _deep(2049),
    "long path": _long_path(),
    "uid": directory(f=regular(uid=2**32)), "negative gid": directory(f=regular(gid=-1)),
    "mtime": directory(f=regular(mtime_s=2**63)), "nanoseconds": directory(f=regular(mtime_ns=10**9)),
    "mode": directory(f=Inode(FileType.REGULAR, Attributes(mode=0o10000))),
    "major": directory(f=Inode(FileType.BLOCK, Attributes(), rdev=(4096, 0))),
    "minor": directory(f=Inode(FileType.BLOCK, Attributes(), rdev=(0, 1 << 20))),
    "empty symlink": directory(f=symlink(b"")), "long symlink": directory(f=symlink(b"x" * 4096)),
    "nul in symlink": directory(f=symlink(b"a\0b")),
    "device": directory(f=regular(10, device=3)), "beyond device": directory(f=regular(5000, device=1)),
    "negative block": directory(f=regular(10, block=-1)), "size": directory(f=regular(2**63)),
    "negative size": directory(f=Inode(FileType.REGULAR, Attributes(), size=-1)),
    "unit": directory(f=Inode(FileType.REGULAR, Attributes(), size=1, data=DataMap(44, ((0, 1, 0),)))),
    "run beyond end": directory(f=Inode(FileType.REGULAR, Attributes(), size=1, data=DataMap(12, ((1, 1, 0),)))),
    "runs overlap": directory(f=Inode(FileType.REGULAR, Attributes(), size=9999,
                                      data=DataMap(12, ((0, 2, 0), (1, 1, 0))))),
    "too many units": directory(f=_sparse_forever()),
    "xattr namespace": directory(f=regular(xattrs=((b"os2.x", b""),))),
    "xattr empty name": directory(f=regular(xattrs=((b"user.", b""),))),
    "xattr long name": directory(f=regular(xattrs=((b"user." + b"x" * 251, b""),))),
    "xattr nul": directory(f=regular(xattrs=((b"user.a\0", b""),))),
    "xattr acl with suffix": directory(f=regular(xattrs=((b"system.posix_acl_accessx", b""),))),
    "xattr overlay": directory(f=regular(xattrs=((b"trusted.overlay.opaque", b"y"),))),
    "xattr user overlay": directory(f=regular(xattrs=((b"user.overlay.redirect", b"y"),))),
    "xattr twice": directory(f=regular(xattrs=((b"user.a", b""), (b"user.a", b"1")))),
    "acl empty": directory(f=regular(xattrs=((b"system.posix_acl_access", b""),))),
    "acl cut": directory(f=regular(xattrs=((b"system.posix_acl_access", ACL[:-1]),))),
    "acl version": directory(f=regular(xattrs=((b"system.posix_acl_default", b"\3" + ACL[1:]),))),
    "acl tag": directory(f=regular(xattrs=((b"system.posix_acl_access", ACL[:4] + b"\3" + ACL[5:]),))),
    "acl permissions": directory(f=regular(xattrs=((b"system.posix_acl_access", ACL[:6] + b"\x08" + ACL[7:]),))),
    "acl without other": directory(f=regular(xattrs=((b"system.posix_acl_access", ACL[:-8]),))),
    "acl without mask": directory(f=regular(xattrs=((b"system.posix_acl_access", ACL[:-16] + ACL[-8:]),))),
    "acl of nobody": directory(f=regular(xattrs=((b"system.posix_acl_access",
                                                  ACL.replace(b"\xe8\x03\0\0", b"\xff" * 4)),))),
    "xattr value": directory(f=regular(xattrs=((b"user.a", bytes(65536)),))),
    "xattrs in all": directory(f=regular(xattrs=tuple((b"user.%d" % i, bytes(65000)) for i in range(5)))),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_is_refused(case: str) -> None:
    with pytest.raises(FormatError):
        write_image(REFUSED[case], DEVICE_SIZES)


def test_refusal_names_the_path() -> None:
    root = directory(usr=directory(lib=directory(bad=Inode(FileType.BLOCK, Attributes(), rdev=(4096, 0)))))
    with pytest.raises(FormatError, match="/usr/lib/bad: device number 4096:0"):
        write_image(root, ())


def test_greatest_depth_is_written_and_read() -> None:
    root = _deep(limits.PATH_DEPTH_MAX)
    assert roundtrip(root, ()).inode_count == limits.PATH_DEPTH_MAX + 1


@pytest.mark.parametrize("sizes", [(4095,), (-4096,), (limits.DEVICE_BYTES_MAX + 4096,), (0,) * 513])
def test_impossible_devices_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        write_image(directory(), sizes)


def test_the_most_devices() -> None:
    sizes = (0,) * 511 + (4096,)
    image = roundtrip(directory(f=regular(10, device=511)), sizes)
    assert image.data_map(image.lookup(image.root_nid, b"f") or 0)[0] == 511


def test_crc32c_known_answer() -> None:
    assert ondisk.crc32c(b"123456789") ^ 0xFFFF_FFFF == 0xE306_9283      # RFC 3720 B.4


@pytest.mark.skipif(FSCK is None, reason="fsck.erofs is not installed")
def test_fsck_accepts_what_we_write(tmp_path: Path) -> None:
    files, _ = write_devices(tmp_path)
    rng = random.Random(12)
    roots = [directory(), *(random_tree(rng, 60) for _ in range(5))]
    roots += [directory(**{f"d{n}": directory(**{f"f{i:05}": regular() for i in range(n)})}) for n in (100, 3000)]
    for root in roots:
        data = write_image(root, DEVICE_SIZES)
        fsck(tmp_path, data, [str(path) for path in files])


def fsck(folder: Path, data: bytes, devices: list[str]) -> None:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(data)
        file.flush()
        options = [f"--device={device}" for device in devices]
        result = subprocess.run([FSCK or "", *options, file.name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_extents_cover_every_byte() -> None:
    rng = random.Random(5)
    for _ in range(20):
        image = roundtrip(random_tree(rng, 60))
        tree = image.to_tree()
        for path, nid in image.walk():
            node = tree
            for part in path.split(b"/") if path else []:
                node = node.children[part]
            if node.type is not FileType.REGULAR:
                continue
            offset, size = rng.randrange(node.size + 1), rng.choice([1, 4096, 1 << 62])
            pieces = image.extents(nid, offset, size)
            assert sum(length for _, _, length in pieces) == min(size, node.size - offset)
            position = offset
            for device, place, length in pieces:
                inside = [e for e in extents(node) if e[1] <= position and position + length <= e[1] + e[3]]
                if device < 0:
                    assert not any(e[1] < position + length and position < e[1] + e[3] for e in extents(node))
                else:
                    assert [(e[0], e[2] + position - e[1]) for e in inside] == [(device, place)]
                position += length


@pytest.mark.parametrize("seed", range(4))
def test_paths_are_those_of_a_walk(seed: int) -> None:
    image = roundtrip(random_tree(random.Random(seed)))
    names: dict[int, set[bytes]] = {}
    for path, nid in image.walk():
        names.setdefault(nid, set()).add(path)
    asked = np.array(sorted(nid for nid in names if nid != image.root_nid), dtype=np.int64)
    found = image.paths(asked)
    assert set(found) == set(asked.tolist())
    assert all(path in names[nid] for nid, path in found.items())
    assert image.paths(asked[:0]) == {}


def test_the_path_of_a_file_as_deep_as_can_be() -> None:
    root = below = directory()
    for _ in range(limits.PATH_DEPTH_MAX - 1):
        below.children = {b"d": directory()}
        below = below.children[b"d"]
    below.children = {b"f": symlink(b"x")}
    image = roundtrip(root)
    deepest = max(image.walk(), key=lambda one: len(one[0]))
    assert image.paths(np.array([deepest[1]])) == {deepest[1]: deepest[0]}
