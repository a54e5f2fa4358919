"""
Layer stacks for the differential tests: random ones (hypothesis), as archives, and snapshots of unpacked trees.

    stacks()                                  # strategy: Stack, layers of unpackkit.Items
    archive(items, style="gnu")               # the layer's tar
    snapshot(top, random.Random(1))           # path -> Node, everything that can be compared
"""

# ruff: noqa: PTH115, PTH208 (paths are bytes)
from __future__ import annotations

import hashlib
import mmap
import os
import random
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from tests.tarbuilder import TarBuilder
from tests.unpackkit import Item

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_LONG = b"n" * 251 + b"\xc3\xbc.x"               # 255 bytes
# Few names, so that layers collide; now and then one that is hard to carry.
_NAMES = [b"a", b"b", b"c", b"a", b"b", b"c", b"d", b"\xff\xfe", _LONG, b"a.wh.b", b"- \n\\x"]
_TARGETS = [b"a", b"b", b"../a", b"./c/", b"/a", b"/b/c", b"..", b"/", b"nowhere", b"../../x/y", b"a/../b", b"/c/\xff",
            b"t" * 200]
_OWNERS = [0, 0, 1000, 65_536, 2**31, 2**32 - 2]
_TIMES = [0, 1, 1_700_000_000, -1, -(2**31) - 7, 2**32 + 5, 9_000_000_000]
_SIZES = [0, 1, 4095, 4096, 5000, 70_000, 200_000]       # the test's chunks have 65,536 bytes
_MODES = [0o644, 0o755, 0o4755, 0o2711, 0o1777, 0o000, 0o7777]
_CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 10, 0, 0, 0)     # cap_net_bind_service=ep
_KINDS = ["file"] * 5 + ["directory"] * 4 + ["symlink"] * 3 + ["link"] * 3 + ["whiteout"] * 3 + [
    "opaque", "char", "block", "fifo"]


@dataclass(frozen=True, repr=False)
class Stack:
    """Layers, lowest first; of each its archive's style and its compression."""

    layers: tuple[tuple[Item, ...], ...]
    styles: tuple[str, ...]
    compressions: tuple[str, ...]
    codec: str

    def __repr__(self) -> str:
        return "".join(
            f"\n layer {index} ({style}, {compression}):" + "".join(f"\n  {item!r}" for item in items)
            for index, (items, style, compression) in enumerate(
                zip(self.layers, self.styles, self.compressions, strict=True))
        )

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(repr(self))


@st.composite
def stacks(draw: Callable[..., Any]) -> Stack:
    """One to five layers over few names."""
    count = draw(st.integers(1, 5))
    known: list[bytes] = []          # names that may be something a hard link can name
    layers = []
    for _ in range(count):
        size = draw(st.integers(0, 9))
        items = [draw(_items(tuple(known)))]
        for _ in range(size):
            if items[-1].kind not in {"directory", "whiteout", "opaque"}:
                known.append(items[-1].path)
            items.append(draw(_items(tuple(known))))
        layers.append(tuple(items))
    styles = tuple(draw(st.sampled_from(["pax", "gnu"])) for _ in layers)
    compressions = tuple(draw(st.sampled_from(["gzip", "zstd", "plain"])) for _ in layers)
    return Stack(tuple(layers), styles, compressions, draw(st.sampled_from(["lz4", "zstd", "none"])))


@st.composite
def _items(draw: Callable[..., Any], known: tuple[bytes, ...]) -> Item:
    kind = draw(st.sampled_from(_KINDS))
    path = b"/".join(draw(st.lists(st.sampled_from(_NAMES), min_size=1, max_size=3)))
    if kind == "opaque":
        return Item(kind, draw(st.sampled_from([path, b""])))
    if kind == "whiteout":
        # umoci's and containerd's limit is the marker's own name: four bytes more
        return Item(kind, path.replace(_LONG, b"a"))
    if kind == "link":
        return Item(kind, path, target=draw(st.sampled_from([*known, path + b"/a", b"a", b"b"])))
    if kind == "directory" and draw(st.integers(0, 7)) == 0:
        path = b""
    mode = 0o777 if kind == "symlink" else draw(st.sampled_from(_MODES))
    mtime = (draw(st.sampled_from(_TIMES)), draw(st.sampled_from([0, 0, 1, 999_999_999])))
    more: dict[str, Any] = {}
    if kind == "symlink":
        more["target"] = draw(st.sampled_from([*_TARGETS, *known]))
    elif kind in {"char", "block"}:
        more["rdev"] = draw(st.sampled_from([(1, 3), (8, 17), (259, 70_000), (4095, 2**20 - 1)]))
    elif kind == "file":
        more["size"], more["segments"] = draw(_contents())
    return Item(kind, path, mode, draw(st.sampled_from(_OWNERS)), draw(st.sampled_from(_OWNERS)), mtime,
                draw(_xattrs(kind, mode)), **more)


@st.composite
def _contents(draw: Callable[..., Any]) -> tuple[int, tuple[tuple[int, bytes], ...]]:
    """Few different ones, so that the same file is there twice."""
    seed = draw(st.integers(0, 2))
    size = draw(st.sampled_from(_SIZES))
    rng = random.Random(seed)
    if draw(st.integers(0, 3)) or not size:
        return size, ((0, rng.randbytes(size)),) if size else ()
    points = sorted(draw(st.lists(st.integers(0, size), min_size=0, max_size=8, unique=True)))
    pairs = [(low, high) for low, high in zip(points[::2], points[1::2], strict=False) if low < high]
    return size, tuple((low, rng.randbytes(high - low)) for low, high in pairs)


@st.composite
def _xattrs(draw: Callable[..., Any], kind: str, mode: int) -> tuple[tuple[str, bytes], ...]:
    """
    What the kernel lets anybody set on such a file.

    user.* on links and devices is left to test_exact_semantics: umoci fails on it, containerd warns.
    """
    if draw(st.integers(0, 3)):
        return ()
    found = {"trusted.t": draw(st.sampled_from([b"", b"\0\xff", b"v" * 300]))}
    if kind in {"file", "directory"}:
        found["user.k"] = draw(st.binary(max_size=20))
        found["user." + "u" * 250] = b"1"
    if kind != "symlink":
        found["system.posix_acl_access"] = acl(mode)
    if kind == "directory":
        found["system.posix_acl_default"] = acl(0o750)
    if kind == "file":
        found["security.capability"] = _CAPABILITY
    chosen = draw(st.lists(st.sampled_from(sorted(found)), unique=True))
    return tuple(sorted((name, found[name]) for name in chosen))


def acl(mode: int, user: int = 1000) -> bytes:
    """An access control list that agrees with `mode`: its mask is what stat shows as the group's bits."""
    nobody = 0xFFFF_FFFF
    owner, mask, other = mode >> 6 & 7, mode >> 3 & 7, mode & 7
    entries = [(1, owner, nobody), (2, 4, user), (4, 5, nobody), (16, mask, nobody), (32, other, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


# --- as archives ------------------------------------------------------------------------------------------------------


def archive(items: Sequence[Item], style: str = "pax") -> bytes:
    """The layer's tar. What a GNU header cannot hold (xattrs, nanoseconds) is in PAX headers in both styles."""
    tar = TarBuilder(style)
    for item in items:
        fields: dict[str, Any] = {"mode": item.mode, "uid": item.uid, "gid": item.gid, "mtime": item.mtime,
                                  "xattrs": dict(item.xattrs)}
        if item.kind == "file":
            _add_file(tar, item, fields)
        elif item.kind == "directory":
            tar.directory(item.path or b"./", **fields)
        elif item.kind == "symlink":
            tar.symlink(item.path, item.target, **fields)
        elif item.kind == "link":
            tar.hardlink(item.path, item.target)
        elif item.kind == "fifo":
            tar.fifo(item.path, **fields)
        elif item.kind == "whiteout":
            tar.whiteout(item.path)
        elif item.kind == "opaque":
            tar.opaque(item.path)
        else:
            tar.device(item.path, item.kind[0], *item.rdev, **fields)
    return tar.build()


def _add_file(tar: TarBuilder, item: Item, fields: dict[str, Any]) -> None:
    is_whole = item.segments == () if item.size == 0 else [len(d) for _, d in item.segments] == [item.size]
    plain = not item.xattrs and not item.mtime[1] and max(item.uid, item.gid) < 8**7 and 0 <= item.mtime[0] < 8**11
    if is_whole or not plain or len(item.path) > 100:
        content = bytearray(item.size)
        for offset, data in item.segments:
            content[offset : offset + len(data)] = data
        tar.file(item.path, bytes(content), **fields)
        return
    header = {"mode": item.mode, "uid": item.uid, "gid": item.gid, "mtime": item.mtime[0]}
    segments = [*item.segments, (item.size, b"")]     # GNU tar ends its map with an empty piece at the end
    if tar.style == "gnu":
        tar.sparse_gnu(item.path, item.size, segments, **header)
    else:
        tar.sparse_pax("1.0", item.path, item.size, segments, **header)


# --- what is there ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """Everything of a name that two trees can agree on. `group`: the first name of the same inode."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]
    size: int
    rdev: tuple[int, int]
    target: bytes
    digest: str
    group: bytes
    link_count: int


def snapshot(top: Path, rng: random.Random) -> dict[bytes, Node]:
    """Walk the tree at `top`; contents are read at random places, then whole through mmap."""
    root = os.fsencode(top)
    found: dict[bytes, Node] = {}
    groups: dict[tuple[int, int], bytes] = {}
    todo = [b""]
    while todo:
        path = todo.pop()
        full = root + b"/" + path if path else root
        stats = os.lstat(full)
        kind = stat.S_IFMT(stats.st_mode)
        is_directory = kind == stat.S_IFDIR
        if is_directory:
            todo += sorted((path + b"/" + name if path else name for name in os.listdir(full)), reverse=True)
        group = path if is_directory else groups.setdefault((stats.st_dev, stats.st_ino), path)
        is_device = kind in {stat.S_IFCHR, stat.S_IFBLK}
        names = sorted(os.listxattr(full, follow_symlinks=False))
        found[path] = Node(
            kind, stat.S_IMODE(stats.st_mode), stats.st_uid, stats.st_gid, stats.st_mtime_ns,
            tuple((name, os.getxattr(full, name, follow_symlinks=False)) for name in names),
            0 if is_directory else stats.st_size,
            (os.major(stats.st_rdev), os.minor(stats.st_rdev)) if is_device else (0, 0),
            os.readlink(full) if kind == stat.S_IFLNK else b"",
            _digest(full, stats.st_size, rng) if kind == stat.S_IFREG else "",
            group, 0 if is_directory else stats.st_nlink,
        )
    return found


def _digest(path: bytes, size: int, rng: random.Random) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        places = [(rng.randint(0, size), rng.choice([1, 512, 4096, 100_000])) for _ in range(3)]
        pieces = [(offset, length, os.pread(descriptor, length, offset)) for offset, length in places]
        if not size:
            assert not any(piece for _, _, piece in pieces)
            return hashlib.sha256(b"").hexdigest()
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
            for offset, length, piece in pieces:
                assert piece == mapped[offset : offset + length], f"{path!r}: pread at {offset} and mmap differ"
            return hashlib.sha256(mapped).hexdigest()
    finally:
        os.close(descriptor)
