"""
A validated EROFS image, and questions to it.

Layer: lazyfs.image, pure. Who calls: the mount (validates a bootstrap before the kernel gets it), the fuse driver
(serves the tree from it), `check` and `inspect`. `parse` looks at everything (superblock.py, tree.py, inodes.py);
afterwards every accessor is safe. A nid that is not in the image is a bug of the caller: BugError.

The image's bytes are kept by reference: they must not change, and an mmap cannot be closed before its ErofsImage is
gone.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from lazyfs.errors import BugError
from lazyfs.image.erofs import ondisk, xattr
from lazyfs.image.erofs.inodes import check_inodes
from lazyfs.image.erofs.ondisk import BLOCK_BYTES, BLOCK_SHIFT, INODE_BYTES, INODE_STRUCT, SLOT_BYTES, Int64s, Views
from lazyfs.image.erofs.runs import FileRuns, file_runs
from lazyfs.image.erofs.superblock import parse_superblock
from lazyfs.image.erofs.tree import Tree, TreeWalk
from lazyfs.image.model import EMPTY_MAP, Attributes, DataMap, FileType, Inode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from mmap import mmap
HOLE_DEVICE = -1
_TYPES = {mode: FileType(kind) for kind, mode in ondisk.MODE_OF_TYPE.items()}


@dataclass(frozen=True, slots=True)
class InodeStat:
    """What stat(2) says. `mode`: permission bits only; `rdev`: (major, minor); `size` in bytes."""

    nid: int
    type: FileType
    mode: int
    uid: int
    gid: int
    mtime_s: int
    mtime_ns: int
    size: int
    link_count: int
    rdev: tuple[int, int]


class _Raw(NamedTuple):
    """An inode's fields as stored, and where its body (tail or chunk indexes) begins. (Made often: a tuple.)"""

    form: int
    type: FileType
    size: int
    union: int
    xattr_start: int
    body: int


class ErofsImage:
    """Made by `parse` only. Immutable; safe to use from several threads."""

    def __init__(self, views: Views, tree: Tree, nids: Int64s, root_nid: int) -> None:
        self._views = views
        self._data = views.data
        self._nids = nids
        self._names = tree.names
        self._name_starts = tree.name_starts.astype(np.uint32)
        self._name_bytes = tree.name_bytes.astype(np.uint8)
        self._entry_nids = tree.entry_nids.astype(np.uint32)
        self._entry_types = tree.entry_types
        self._first_entry = tree.first_entry
        self._parents = tree.parent_nids
        self._directory_order = np.argsort(tree.directory_nids)
        self._directory_nids = tree.directory_nids[self._directory_order]
        self.root_nid = root_nid
        self.inode_count = len(nids)

    @classmethod
    def parse(cls, data: bytes | memoryview | mmap, device_sizes: Sequence[int]) -> Self:
        """
        Validate a whole image.

        Args:
            data: the image; kept by reference.
            device_sizes: bytes of each layer device it will be mounted with.

        Raises:
            FormatError: whatever is wrong with it.
            UnsupportedError: it is EROFS of a kind that lazyfs does not write.

        """
        view = memoryview(data).cast("B")
        fields = parse_superblock(view, device_sizes)
        views = Views.of(view)
        tree = TreeWalk(views).run(fields.root_nid)
        inodes = check_inodes(views, tree, device_sizes, fields.inode_count)
        return cls(views, tree, inodes.nids, fields.root_nid)

    def stat(self, nid: int) -> InodeStat:
        self._check_nid(nid)
        return self._stat(nid)

    def size(self, nid: int) -> int:
        """In bytes."""
        return self._raw(nid).size

    def lookup(self, nid: int, name: bytes) -> int | None:
        """The inode of `name` in directory `nid`, or None. Not for . and .. ."""
        row = self._directory(nid)
        first, end = int(self._first_entry[row]), int(self._first_entry[row + 1])
        index = bisect_left(range(first, end), name, key=self._name) + first
        if index < end and self._name(index) == name:
            return int(self._entry_nids[index])
        return None

    def entries(self, nid: int) -> list[tuple[bytes, int, FileType]]:
        """Name, inode and type of all entries but . and .., sorted by name."""
        row = self._directory(nid)
        part = slice(int(self._first_entry[row]), int(self._first_entry[row + 1]))
        names = self._names
        return [
            (names[start : start + length], child, FileType(kind))
            for start, length, child, kind in zip(
                self._name_starts[part].tolist(),
                self._name_bytes[part].tolist(),
                self._entry_nids[part].tolist(),
                self._entry_types[part].tolist(),
                strict=True,
            )
        ]

    def parent(self, nid: int) -> int:
        """The directory that holds directory `nid`; the root's is the root."""
        return int(self._parents[self._directory(nid)])

    def readlink(self, nid: int) -> bytes:
        return self._target(self._raw(nid, FileType.SYMLINK))

    def xattrs(self, nid: int) -> tuple[tuple[bytes, bytes], ...]:
        """(full name, value) pairs, sorted by name."""
        return self._xattrs(self._raw(nid))

    def data_map(self, nid: int) -> tuple[int, DataMap]:
        """Device index (0-based; 0 if there is no data) and map of a regular file; runs are as long as can be."""
        return self._data_map(self._raw(nid, FileType.REGULAR))

    def extents(self, nid: int, offset: int, size: int) -> list[tuple[int, int, int]]:
        """
        Where bytes [offset, min(offset + size, file size)) are: (device index, device offset, length) in order.

        Device index -1 is a hole (zeros), its device offset 0. Neighbours that continue each other are one extent.
        """
        raw = self._raw(nid, FileType.REGULAR)
        end = min(offset + size, raw.size)
        if offset < 0 or offset >= end:
            return []
        shift = _unit_shift(raw)
        first = offset >> shift
        found: list[tuple[int, int, int]] = []
        for unit, count, device, block in self._runs(raw, first, (-(-end >> shift)) - first):
            start = max(unit << shift, offset)
            length = min((unit + count) << shift, end) - start
            place = 0 if device == HOLE_DEVICE else (block << BLOCK_SHIFT) + start - (unit << shift)
            found.append((device, place, length))
        return found

    def file_runs(self) -> FileRuns | None:
        """Which blocks of the devices are which files'. None: too many runs to be worth it."""
        return file_runs(self._views, self._nids)

    def walk(self) -> Iterator[tuple[bytes, int]]:
        """(path, inode) of the root (b"") and of each name, parents first, entries in order."""
        yield b"", self.root_nid
        stack = [(b"", self.entries(self.root_nid)[::-1])]
        while stack:
            prefix, rest = stack[-1]
            if not rest:
                stack.pop()
                continue
            name, nid, kind = rest.pop()
            path = prefix + name
            yield path, nid
            if kind is FileType.DIRECTORY:
                stack.append((path + b"/", self.entries(nid)[::-1]))

    def paths(self, nids: Int64s) -> dict[int, bytes]:
        """A path of each of these inodes, without a slash in front; of several names one. The root has none."""
        rows = np.flatnonzero(np.isin(self._entry_nids, nids))
        entries: dict[int, int] = dict(zip(self._entry_nids[rows].tolist(), rows.tolist(), strict=True))
        rows = np.flatnonzero(self._entry_types == FileType.DIRECTORY)
        entry_of: dict[int, int] = dict(zip(self._entry_nids[rows].tolist(), rows.tolist(), strict=True))
        nid_of = np.empty_like(self._directory_nids)
        nid_of[self._directory_order] = self._directory_nids

        def holder(entry: int) -> int:
            return int(nid_of[self._first_entry.searchsorted(entry, side="right") - 1])

        prefixes = {self.root_nid: b""}    # of directories, with a slash behind
        found: dict[int, bytes] = {}
        for nid, entry in entries.items():
            directory, unknown = holder(entry), []
            while directory not in prefixes:
                unknown.append(directory)
                directory = holder(entry_of[directory])
            for below in reversed(unknown):
                prefixes[below] = prefixes[directory] + self._name(entry_of[below]) + b"/"
                directory = below
            found[nid] = prefixes[directory] + self._name(entry)
        return found

    def to_tree(self) -> Inode:
        """The model's tree; hard links are one Inode. `device` of a file without data is 0."""
        inodes = {nid: self._inode(nid) for nid in self._nids.tolist()}
        for nid in self._directory_nids.tolist():
            inodes[nid].children = {name: inodes[child] for name, child, _ in self.entries(nid)}
        return inodes[self.root_nid]

    def _inode(self, nid: int) -> Inode:
        raw, stat = self._load(nid), self._stat(nid)
        attributes = Attributes(stat.mode, stat.uid, stat.gid, stat.mtime_s, stat.mtime_ns, self._xattrs(raw))
        inode = Inode(stat.type, attributes, rdev=stat.rdev, link_count=stat.link_count)
        if stat.type is FileType.REGULAR:
            inode.size = stat.size
            inode.device, inode.data = self._data_map(raw)
        elif stat.type is FileType.SYMLINK:
            inode.target = self._target(raw)
        return inode

    def _stat(self, nid: int) -> InodeStat:
        (_, _, mode, _, size, union, _, uid, gid, mtime_s, mtime_ns, nlink) = INODE_STRUCT.unpack_from(
            self._data, nid * SLOT_BYTES
        )
        kind = _TYPES[mode >> 12]
        rdev = ondisk.decode_rdev(union) if kind in {FileType.CHARACTER, FileType.BLOCK} else (0, 0)
        return InodeStat(nid, kind, mode & 0o7777, uid, gid, mtime_s, mtime_ns, size, nlink, rdev)

    def _target(self, raw: _Raw) -> bytes:
        start = raw.body if raw.form == ondisk.FORMAT_INLINE else raw.union * BLOCK_BYTES
        return self._views.copy(start, start + raw.size)

    def _data_map(self, raw: _Raw) -> tuple[int, DataMap]:
        shift = _unit_shift(raw)
        runs = self._runs(raw, 0, -(-raw.size >> shift))
        if len(runs) == 1 and runs[0][2] != HOLE_DEVICE:
            first, count, device, block = runs[0]
            return device, DataMap(shift, ((first, count, block),))
        found = [(first, count, block) for first, count, device, block in runs if device != HOLE_DEVICE]
        device = next((device for _, _, device, _ in runs if device != HOLE_DEVICE), 0)
        return device, DataMap(shift, tuple(found)) if found else EMPTY_MAP

    def _xattrs(self, raw: _Raw) -> tuple[tuple[bytes, bytes], ...]:
        if raw.body == raw.xattr_start:
            return ()
        return xattr.decode_area(self._views.copy(raw.xattr_start, raw.body))

    def _check_nid(self, nid: int) -> None:
        index = int(self._nids.searchsorted(nid))
        if index >= len(self._nids) or self._nids[index] != nid:
            raise BugError(f"no inode {nid} in this image")

    def _directory(self, nid: int) -> int:
        index = int(self._directory_nids.searchsorted(nid))
        if index >= len(self._directory_nids) or self._directory_nids[index] != nid:
            raise BugError(f"inode {nid} is no directory of this image")
        return int(self._directory_order[index])

    def _name(self, entry: int) -> bytes:
        start = int(self._name_starts[entry])
        return self._names[start : start + int(self._name_bytes[entry])]

    def _raw(self, nid: int, kind: FileType | None = None) -> _Raw:
        self._check_nid(nid)
        raw = self._load(nid)
        if kind is not None and raw.type is not kind:
            raise BugError(f"inode {nid} is a {raw.type.name}, not a {kind.name}")
        return raw

    def _load(self, nid: int) -> _Raw:
        offset = nid * SLOT_BYTES
        form, units, mode, _, size, union, *_ = INODE_STRUCT.unpack_from(self._data, offset)
        start = offset + INODE_BYTES
        return _Raw(form, _TYPES[mode >> 12], size, union, start, start + ondisk.xattr_bytes(units))

    def _runs(self, raw: _Raw, first: int, count: int) -> list[tuple[int, int, int, int]]:
        """(first unit, units, device or -1, block), without gaps, for `count` units from `first` on."""
        start = ondisk.index_table_offset(raw.body) + first * ondisk.INDEX_BYTES
        if count == 1:      # nearly every file
            _, stored, block = ondisk.INDEX_STRUCT.unpack_from(self._data, start)
            return [(first, 1, HOLE_DEVICE if block == ondisk.HOLE_BLOCK else stored - 1, block)]
        if count == 0:
            return []
        table = self._views.indexes[start // ondisk.INDEX_BYTES :][:count]
        blocks = table["block"].astype(np.int64)
        step = 1 << (_unit_shift(raw) - BLOCK_SHIFT)
        hole = blocks == ondisk.HOLE_BLOCK
        goes_on = np.where(hole[1:], hole[:-1], ~hole[:-1] & (blocks[1:] == blocks[:-1] + step))
        begins = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
        lengths = np.diff(begins, append=count)
        devices = np.where(hole[begins], HOLE_DEVICE, table["device"][begins].astype(np.int64) - 1)
        return list(
            zip((begins + first).tolist(), lengths.tolist(), devices.tolist(), blocks[begins].tolist(), strict=True)
        )


def _unit_shift(raw: _Raw) -> int:
    return BLOCK_SHIFT + (raw.union & ondisk.CHUNK_SHIFT_MASK)
