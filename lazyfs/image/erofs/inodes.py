"""
Validate all inodes of an EROFS image at once: fields, link counts, places, data.

Layer: lazyfs.image, pure. Used by reader.py only, after tree.py. What holds afterwards: every inode is of the type its
entries say, has a known format and only known bits; link counts are true; inodes, xattrs, chunk indexes, directory
data, symlinks and the superblock lie within the image and do not overlap; every chunk lies within its device, and all
of a file's chunks in one.

Chunk indexes are looked at in slices of bounded size, after their places are known to be disjoint: so work and memory
are linear in the image, whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  (kept out of TYPE_CHECKING: annotations are read by dataclass)
from dataclasses import dataclass

import numpy as np

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.erofs import ondisk, superblock, xattr
from lazyfs.image.erofs.ondisk import (
    BLOCK_BYTES,
    BLOCK_SHIFT,
    INDEX_BYTES,
    INODE_BYTES,
    SLOT_BYTES,
    Bools,
    Int64s,
    Records,
    Views,
    first_wrong,
)
from lazyfs.image.erofs.tree import Tree  # noqa: TC001
from lazyfs.image.model import FileType

_INDEX_SLICE = 1 << 20         # chunk indexes looked at together: bounds the memory
_MTIME_NS_LIMIT = 1_000_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Inodes:
    """All inodes by ascending nid; derived columns in bytes (int64)."""

    nids: Int64s
    rows: Records
    types: Int64s
    sizes: Int64s
    offsets: Int64s
    xattr_bytes: Int64s
    bodies: Int64s             # where inode and xattrs end
    index_counts: Int64s       # regular files: chunk indexes; else 0


def check_inodes(views: Views, tree: Tree, device_sizes: Sequence[int], inode_count: int) -> Inodes:
    """Validate everything about the inodes that `tree` names. Raises FormatError."""
    outside = (tree.entry_nids < 0) | (tree.entry_nids >= len(views.inodes))
    if outside.any():
        raise FormatError("EROFS directory entry names an inode outside the image")
    named = np.concatenate([tree.directory_nids[:1], tree.entry_nids])
    nids, inverse, name_counts = np.unique(named, return_inverse=True, return_counts=True)
    if len(nids) != inode_count:
        raise FormatError(f"EROFS superblock states {inode_count} inodes, the tree has {len(nids)}")
    inodes = inode_columns(views, nids)
    _check_fields(inodes)
    claimed = np.concatenate([[FileType.DIRECTORY], tree.entry_types])
    _refuse(inodes.types[inverse] != claimed, named, "is not of the type that a directory entry says")
    _check_links(inodes, tree, name_counts)
    _check_formats(inodes)
    _check_regions(views, inodes, len(device_sizes))
    _check_xattrs(views, inodes)
    _check_symlinks(views, inodes)
    _check_chunks(views, inodes, device_sizes)
    return inodes


def inode_columns(views: Views, nids: Int64s) -> Inodes:
    """The inodes as they are stored. Raises FormatError: a size that nothing can have."""
    rows: Records = views.inodes[nids]
    if (rows["size"] > limits.FILE_BYTES_MAX).any():
        raise FormatError("EROFS inode states a negative size")
    types = ondisk.TYPE_OF_MODE[rows["mode"] >> 12].astype(np.int64)
    sizes = rows["size"].astype(np.int64)
    offsets = nids * SLOT_BYTES
    units = rows["xattr_units"].astype(np.int64)
    xattr_bytes = np.where(units > 0, 8 + 4 * units, 0)
    shifts = (BLOCK_SHIFT + (rows["u"] & ondisk.CHUNK_SHIFT_MASK)).astype(np.int64)
    # ceil(size / 2^shift) without overflow; sizes reach 2^63 - 1
    counts = (sizes >> shifts) + ((sizes & ((np.int64(1) << shifts) - 1)) > 0)
    counts = np.where(types == FileType.REGULAR, counts, 0)
    return Inodes(nids, rows, types, sizes, offsets, xattr_bytes, offsets + INODE_BYTES + xattr_bytes, counts)


def _check_fields(inodes: Inodes) -> None:
    rows = inodes.rows
    _refuse(inodes.types == 0, inodes.nids, "has an unknown file type")
    unknown = (rows["reserved"] != 0) | (rows["reserved2"] != 0) | (rows["reserved3"] != 0) | (rows["ino"] != 0)
    _refuse(unknown, inodes.nids, "uses fields that lazyfs does not know")
    _refuse(rows["mtime_ns"] >= _MTIME_NS_LIMIT, inodes.nids, "has a second of more than 999,999,999 nanoseconds")


def _check_links(inodes: Inodes, tree: Tree, name_counts: Int64s) -> None:
    """Directories: 2 + subdirectories; all else: the names counted."""
    expected = name_counts.copy()
    below = np.bincount(tree.entry_owners[tree.entry_types == FileType.DIRECTORY], minlength=len(tree.directory_nids))
    expected[np.searchsorted(inodes.nids, tree.directory_nids)] = 2 + below
    _refuse(inodes.rows["nlink"] != expected, inodes.nids, "has a wrong link count")


def _check_formats(inodes: Inodes) -> None:
    """Layout by type. Directories were looked at by tree.py; here for what it leaves open."""
    form, types, union = inodes.rows["format"], inodes.types, inodes.rows["u"]
    regular, link = types == FileType.REGULAR, types == FileType.SYMLINK
    flat = (form == ondisk.FORMAT_PLAIN) | (form == ondisk.FORMAT_INLINE)
    with_data = link | (types == FileType.DIRECTORY)
    known = np.where(regular, form == ondisk.FORMAT_CHUNKED, np.where(with_data, flat, form == ondisk.FORMAT_PLAIN))
    _refuse(~known, inodes.nids, "has a data layout that lazyfs does not write for its type")
    bad_chunks = regular & (union & ~np.uint32(ondisk.CHUNK_SHIFT_MASK) != ondisk.CHUNK_INDEXES)
    _refuse(bad_chunks, inodes.nids, "has an unknown chunk format")
    special = ~(regular | with_data)
    _refuse(special & (inodes.sizes != 0), inodes.nids, "is a device, FIFO or socket with data")
    number = (types == FileType.FIFO) | (types == FileType.SOCKET)
    _refuse(number & (union != 0), inodes.nids, "is a FIFO or socket with a device number")
    _refuse(link & ((inodes.sizes < 1) | (inodes.sizes > limits.SYMLINK_BYTES_MAX)), inodes.nids, "has no valid target")


def _check_regions(views: Views, inodes: Inodes, device_count: int) -> None:
    """Nothing reaches beyond the image, and no two regions overlap."""
    inline = inodes.rows["format"] == ondisk.FORMAT_INLINE
    tables = (inodes.bodies + INDEX_BYTES - 1) // INDEX_BYTES * INDEX_BYTES
    _refuse(inodes.index_counts > views.size // INDEX_BYTES, inodes.nids, "has more chunk indexes than the image holds")
    ends = np.where(inodes.index_counts > 0, tables + INDEX_BYTES * inodes.index_counts, inodes.bodies)
    blocks = (inodes.sizes + BLOCK_BYTES - 1) // BLOCK_BYTES
    with_data = (inodes.types == FileType.SYMLINK) | (inodes.types == FileType.DIRECTORY)
    whole = np.where(with_data, blocks - inline, 0)
    tails = np.where(inline, inodes.sizes - whole * BLOCK_BYTES, 0)
    _refuse(inline & (tails < 1), inodes.nids, "has an empty tail")
    ends = ends + tails
    block_end = inodes.offsets // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES
    _refuse(inline & (ends > block_end), inodes.nids, "has a tail that leaves the inode's block")
    _refuse(ends > views.size, inodes.nids, "reaches beyond the image")
    rows = np.flatnonzero(whole)
    starts = inodes.rows["u"][rows].astype(np.int64) * BLOCK_BYTES
    block_ends = starts + whole[rows] * BLOCK_BYTES
    _refuse(block_ends > views.size, inodes.nids[rows], "has data beyond the image")
    head = np.array([superblock.metadata_start(device_count)], dtype=np.int64)
    all_starts = np.concatenate([np.zeros(1, dtype=np.int64), inodes.offsets, starts])
    all_ends = np.concatenate([head, ends, block_ends])
    order = np.argsort(all_starts, kind="stable")
    if (all_ends[order[:-1]] > all_starts[order[1:]]).any():
        raise FormatError("EROFS image has inodes or data that overlap")


def _check_xattrs(views: Views, inodes: Inodes) -> None:
    """Equal areas, the common case where a label is on every file, are looked at once."""
    rows = np.flatnonzero(inodes.xattr_bytes)
    ends = inodes.bodies[rows]
    starts = ends - inodes.xattr_bytes[rows]
    good: set[bytes] = set()
    for start, end, row in zip(starts.tolist(), ends.tolist(), rows.tolist(), strict=True):
        area = bytes(views.data[start:end])
        if area not in good:
            try:
                xattr.decode_area(area)
            except FormatError as error:
                raise FormatError(f"EROFS inode {inodes.nids[row]}: {error}") from error
            good.add(area)


def _check_symlinks(views: Views, inodes: Inodes) -> None:
    rows = np.flatnonzero(inodes.types == FileType.SYMLINK)
    inline = inodes.rows["format"][rows] == ondisk.FORMAT_INLINE
    starts = np.where(inline, inodes.bodies[rows], inodes.rows["u"][rows].astype(np.int64) * BLOCK_BYTES)
    ends = starts + inodes.sizes[rows]
    data = views.data
    targets = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    if b"\0" in b"".join(targets):
        raise FormatError("EROFS image has a symlink with NUL in its target")


def _check_chunks(views: Views, inodes: Inodes, device_sizes: Sequence[int]) -> None:
    rows = np.flatnonzero(inodes.index_counts)
    counts = inodes.index_counts[rows]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    tables = (inodes.bodies[rows] + INDEX_BYTES - 1) // INDEX_BYTES
    block_counts = np.concatenate([np.zeros(1, dtype=np.int64), ondisk.device_blocks(device_sizes)])
    shifts = (inodes.rows["u"][rows] & ondisk.CHUNK_SHIFT_MASK).astype(np.int64)
    file_blocks = (inodes.sizes[rows] >> BLOCK_SHIFT) + ((inodes.sizes[rows] & (BLOCK_BYTES - 1)) > 0)
    device_of_file = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, total, _INDEX_SLICE):
        positions = np.arange(start, min(start + _INDEX_SLICE, total), dtype=np.int64)
        files = np.searchsorted(ends, positions, side="right")
        units = positions - (ends[files] - counts[files])
        indexes: Records = views.indexes[tables[files] + units]
        hole = indexes["block"] == ondisk.HOLE_BLOCK
        device, block = indexes["device"].astype(np.int64), indexes["block"].astype(np.int64)
        nids = inodes.nids[rows[files]]
        _refuse((indexes["advise"] != 0) | (hole & (device != 0)), nids, "has a chunk index with unknown bits")
        _refuse(~hole & ((device < 1) | (device > len(device_sizes))), nids, "names a device that is not there")
        done = units << shifts[files]
        needed = np.minimum(file_blocks[files] - done, np.int64(1) << shifts[files])
        _refuse(~hole & (block + needed > block_counts[device]), nids, "has data beyond its device")
        full = ~hole
        before = device_of_file[files[full]]
        device_of_file[files[full]] = device[full]
        two = ((before != 0) & (before != device[full])) | (device_of_file[files[full]] != device[full])
        _refuse(two, nids[full], "has data in two devices")


def _refuse(wrong: Bools, nids: Int64s, what: str) -> None:
    index = first_wrong(wrong)
    if index >= 0:
        raise FormatError(f"EROFS inode {nids[index]} {what}")
