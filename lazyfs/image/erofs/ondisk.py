"""
EROFS on-disk structures that lazyfs uses, and nothing else of EROFS.

Layer: lazyfs.image, pure. Used by the writer and the validating reader beside it. Source: Linux
Documentation/filesystems/erofs.rst ("On-disk format") and the names of fields in fs/erofs/erofs_fs.h. All numbers are
little-endian. The subset (docs/format.md): 4096-byte blocks, extended inodes only, no compression, no shared xattrs;
metadata area at block 0, so an inode's number (nid) is its byte offset divided by 32.

Invariant: whatever the writer emits is accepted by the reader, and the reader accepts nothing that the kernel would
read in another way than it does itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lazyfs import limits
from lazyfs.image.model import FileType

if TYPE_CHECKING:
    from collections.abc import Sequence
    from mmap import mmap

BLOCK_BYTES = limits.BLOCK_SIZE_BYTES
BLOCK_SHIFT = 12
SLOT_BYTES = 32                # unit of inode numbers
INODE_BYTES = 64               # extended inode
DIRENT_BYTES = 12
INDEX_BYTES = 8                # chunk index
HOLE_BLOCK = 0xFFFF_FFFF       # EROFS_NULL_ADDR
ROOT_NID_MAX = 0xFFFF          # the superblock stores it in 16 bits

# i_format: bit 0 extended inode, bits 1-3 data layout
FORMAT_PLAIN = 1 | 0 << 1      # whole blocks; also devices, FIFOs and sockets
FORMAT_INLINE = 1 | 2 << 1     # the tail (less than a block) follows the inode
FORMAT_CHUNKED = 1 | 4 << 1    # a table of chunk indexes follows the inode

CHUNK_INDEXES = 0x20           # 8-byte indexes (with a device), not 4-byte block numbers
CHUNK_SHIFT_MASK = 0x1F
UNIT_SHIFT_MAX = BLOCK_SHIFT + CHUNK_SHIFT_MASK

INODE_STRUCT = struct.Struct("<HHHHQIIIIqII16x")
DIRENT_STRUCT = struct.Struct("<QHBB")
INDEX_STRUCT = struct.Struct("<HHI")
assert (INODE_STRUCT.size, DIRENT_STRUCT.size, INDEX_STRUCT.size) == (INODE_BYTES, DIRENT_BYTES, INDEX_BYTES)

INODE = np.dtype(
    [
        ("format", "<u2"), ("xattr_units", "<u2"), ("mode", "<u2"), ("reserved", "<u2"), ("size", "<u8"), ("u", "<u4"),
        ("ino", "<u4"), ("uid", "<u4"), ("gid", "<u4"), ("mtime", "<i8"), ("mtime_ns", "<u4"), ("nlink", "<u4"),
        ("reserved2", "<u8"), ("reserved3", "<u8"),
    ]
)  # fmt: skip
DIRENT = np.dtype([("nid", "<u8"), ("name_offset", "<u2"), ("type", "u1"), ("reserved", "u1")])
INDEX = np.dtype([("advise", "<u2"), ("device", "<u2"), ("block", "<u4")])
assert (INODE.itemsize, DIRENT.itemsize, INDEX.itemsize) == (INODE_BYTES, DIRENT_BYTES, INDEX_BYTES)

# File type of stat(2) st_mode >> 12, and back. 0: no such type.
MODE_OF_TYPE = {
    FileType.FIFO: 0o1, FileType.CHARACTER: 0o2, FileType.DIRECTORY: 0o4, FileType.BLOCK: 0o6, FileType.REGULAR: 0o10,
    FileType.SYMLINK: 0o12, FileType.SOCKET: 0o14,
}  # fmt: skip
TYPE_OF_MODE = np.zeros(16, dtype=np.uint8)
for _type, _mode in MODE_OF_TYPE.items():
    TYPE_OF_MODE[_mode] = _type

MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1

Buffer = bytes | bytearray | memoryview
Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]


def encode_rdev(major: int, minor: int) -> int:
    """Linux' new_encode_dev(): 12-bit major, 20-bit minor (the caller checks both)."""
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def decode_rdev(value: int) -> tuple[int, int]:
    return value >> 8 & 0xFFF, (value & 0xFF) | (value >> 12 & 0xFFF00)


def xattr_bytes(units: int) -> int:
    """Size of an inode's xattr area from i_xattr_icount: a 12-byte header, then 4-byte units, the first free."""
    return 0 if units == 0 else 12 + 4 * (units - 1)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def index_table_offset(end_of_xattrs: int) -> int:
    """Where the chunk indexes of an inode begin, given where its xattrs end."""
    return round_up(end_of_xattrs, INDEX_BYTES)


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ 0x82F6_3B78 if value & 1 else value >> 1  # noqa: PLW2901
        table.append(value)
    return table


_CRC32C_TABLE = _crc32c_table()


def crc32c(data: Buffer) -> int:
    """CRC-32C (Castagnoli, reflected), starting at ~0 and without the final inversion, as the kernel computes it."""
    value = 0xFFFF_FFFF
    table = _CRC32C_TABLE
    for byte in bytes(data):
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """
    One image seen as arrays, without copying.

    `inodes[nid]`, `dirents[offset // 4]`, `indexes[offset // 8]`: overlapping strided views, so that any set of
    records can be gathered in one step. `data` is the raw image.
    """

    data: memoryview
    inodes: Records
    dirents: Records
    indexes: Records

    @classmethod
    def of(cls, data: bytes | memoryview | mmap) -> Views:
        view = memoryview(data).cast("B").toreadonly()
        return cls(
            view,
            _strided(view, INODE, SLOT_BYTES),
            _strided(view, DIRENT, 4),
            _strided(view, INDEX, INDEX_BYTES),
        )

    @property
    def size(self) -> int:
        return len(self.data)

    def copy(self, start: int, end: int) -> bytes:
        return bytes(self.data[start:end])


def _strided(data: memoryview, dtype: np.dtype[np.void], stride: int) -> Records:
    count = (len(data) - dtype.itemsize) // stride + 1
    return np.ndarray((count,), dtype=dtype, buffer=data, strides=(stride,))


def first_wrong(wrong: Bools) -> int:
    """Index of the first True, or -1."""
    return int(wrong.argmax()) if wrong.any() else -1


def positions_within(counts: Int64s) -> Int64s:
    """0, 1, .. count-1 for each count, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)


def device_blocks(device_sizes: Sequence[int]) -> Int64s:
    return np.array(device_sizes, dtype=np.int64) // BLOCK_BYTES
