"""
EROFS writer: the model's merged tree to the bytes of a mountable image.

Layer: lazyfs.image, pure; the converter calls it. The image holds metadata only; file data is named by chunk indexes
into extra devices (device k of the model is EROFS device k + 1). Deterministic: the same tree gives the same bytes,
whatever the order of `children`. Link counts are counted here, not taken from the model.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.digest import chunk_digest
from lazyfs.image.erofs import layout, ondisk, superblock
from lazyfs.image.erofs.ondisk import (
    BLOCK_BYTES,
    BLOCK_SHIFT,
    DIRENT_BYTES,
    INDEX_STRUCT,
    INODE_STRUCT,
    SLOT_BYTES,
    Records,
)
from lazyfs.image.model import FileType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lazyfs.image.erofs.layout import Placed
    from lazyfs.image.model import Inode

_MTIME_NS_LIMIT = 1_000_000_000


def write_image(root: Inode, device_sizes: Sequence[int]) -> bytes:
    """
    Write a tree as an EROFS image.

    Args:
        root: the root directory. Hard links are one Inode object under several names.
        device_sizes: of the layer devices, in bytes, multiples of 4096.

    Raises:
        FormatError: something cannot be represented (named by its path).

    """
    superblock.check_device_sizes(device_sizes)
    plan = layout.lay_out(root, superblock.metadata_start(len(device_sizes)))
    image = bytearray(plan.image_bytes)
    for placed in plan.inodes:
        try:
            _write_inode(image, placed, device_sizes)
        except struct.error as error:
            raise FormatError(f"{placed.path()}: a number is out of range: {error}") from error
    fields = superblock.Superblock(
        plan.inodes[0].nid, len(plan.inodes), plan.image_bytes // BLOCK_BYTES, len(device_sizes)
    )
    superblock.write_superblock(image, fields, device_sizes)
    superblock.seal(image, chunk_digest(image))
    return bytes(image)


def _write_inode(image: bytearray, placed: Placed, device_sizes: Sequence[int]) -> None:
    inode = placed.inode
    attributes = inode.attributes
    if not 0 <= attributes.mode <= 0o7777 or not 0 <= attributes.mtime_ns < _MTIME_NS_LIMIT:
        raise FormatError(f"{placed.path()}: mode {attributes.mode:#o} or nanoseconds {attributes.mtime_ns} impossible")
    if inode.type is FileType.REGULAR:
        form, union = ondisk.FORMAT_CHUNKED, ondisk.CHUNK_INDEXES | placed.unit_shift - BLOCK_SHIFT
        _write_indexes(image, placed, device_sizes)
    else:
        form = ondisk.FORMAT_INLINE if placed.tail_bytes else ondisk.FORMAT_PLAIN
        union = placed.first_block
    if inode.type is FileType.DIRECTORY:
        _write_data(image, placed, _directory_data(placed))
    elif inode.type is FileType.SYMLINK:
        if not 1 <= len(inode.target) <= limits.SYMLINK_BYTES_MAX or b"\0" in inode.target:
            raise FormatError(f"{placed.path()}: symlink target of {len(inode.target)} bytes, or with NUL, is invalid")
        _write_data(image, placed, inode.target)
    elif inode.type in {FileType.CHARACTER, FileType.BLOCK}:
        union = _rdev(placed)
    INODE_STRUCT.pack_into(
        image, placed.offset, form, (len(placed.xattrs) - 8) // 4 if placed.xattrs else 0,
        ondisk.MODE_OF_TYPE[inode.type] << 12 | attributes.mode, 0, placed.data_bytes, union, 0,
        attributes.uid, attributes.gid, attributes.mtime_s, attributes.mtime_ns, placed.link_count,
    )  # fmt: skip
    if placed.xattrs:
        image[placed.body_offset - len(placed.xattrs) : placed.body_offset] = placed.xattrs


def _write_data(image: bytearray, placed: Placed, data: bytes) -> None:
    whole = placed.whole_blocks * BLOCK_BYTES
    if whole:
        start = placed.first_block * BLOCK_BYTES
        image[start : start + min(whole, len(data))] = data[:whole]
    if placed.tail_bytes:
        image[placed.body_offset : placed.body_offset + placed.tail_bytes] = data[-placed.tail_bytes :]


def _directory_data(placed: Placed) -> bytes:
    blocks: list[bytes] = []
    starts = placed.block_starts
    for start, end in zip(starts, [*starts[1:], len(placed.names)], strict=True):
        names = placed.names[start:end]
        name_offset = DIRENT_BYTES * len(names)
        fields: list[int] = []
        for name, target in zip(names, placed.targets[start:end], strict=True):
            fields += (target.offset // SLOT_BYTES, name_offset, target.inode.type, 0)
            name_offset += len(name)
        block = struct.pack("<" + "QHBB" * len(names), *fields) + b"".join(names)
        blocks.append(block if end == len(placed.names) else block.ljust(BLOCK_BYTES, b"\0"))
    return b"".join(blocks)


def _rdev(placed: Placed) -> int:
    major, minor = placed.inode.rdev
    if not (0 <= major <= ondisk.MAJOR_MAX and 0 <= minor <= ondisk.MINOR_MAX):
        raise FormatError(f"{placed.path()}: device number {major}:{minor} is beyond Linux' 12 and 20 bits")
    return ondisk.encode_rdev(major, minor)


def _write_indexes(image: bytearray, placed: Placed, device_sizes: Sequence[int]) -> None:
    inode = placed.inode
    runs = inode.data.runs
    if runs:
        _check_runs(placed, device_sizes)
    offset = ondisk.index_table_offset(placed.body_offset)
    if placed.index_count == 1 and runs:    # nearly every file
        INDEX_STRUCT.pack_into(image, offset, 0, inode.device + 1, runs[0][2])
        return
    if not placed.index_count:
        return
    table: Records = np.frombuffer(image, dtype=ondisk.INDEX, count=placed.index_count, offset=offset)
    table["block"] = ondisk.HOLE_BLOCK
    step = 1 << placed.unit_shift - BLOCK_SHIFT
    for first, count, block in runs:
        table["block"][first : first + count] = block + step * np.arange(count, dtype=np.uint64)
        table["device"][first : first + count] = inode.device + 1


def _check_runs(placed: Placed, device_sizes: Sequence[int]) -> None:
    inode = placed.inode
    if not 0 <= inode.device < len(device_sizes):
        raise FormatError(f"{placed.path()} lies in layer device {inode.device} of {len(device_sizes)}")
    shift, next_unit = placed.unit_shift, 0
    readable = ondisk.round_up(inode.size, BLOCK_BYTES)
    for first, count, block in inode.data.runs:
        if first < next_unit or count < 1 or first + count > placed.index_count or block < 0:
            raise FormatError(f"{placed.path()}: run ({first}, {count}, {block}) of its data map is impossible")
        next_unit = first + count
        length = min(next_unit << shift, readable) - (first << shift)
        if block * BLOCK_BYTES + length > device_sizes[inode.device]:
            raise FormatError(f"{placed.path()}: its data reaches beyond layer device {inode.device}")
