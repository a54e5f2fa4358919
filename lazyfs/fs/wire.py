"""
The bytes of the FUSE protocol: what the kernel asks, and how it wants its answers. Little-endian; nothing but packing.

Layer: fs, pure. Who calls: fs.server (requests), fs.operations (answers), fs.session (notifications). Source of numbers
and structures: Linux include/uapi/linux/fuse.h, protocol 7.38. Only what a read-only file system of ours is asked;
other opcodes get an errno. The kernel writes well-formed requests, so a body that is too short is a bug, not an attack.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

MAJOR: Final = 7
MINOR_MIN: Final = 31            # Linux 5.4
MINOR: Final = 38                # what these structures are; newer kernels are told so, and keep to it

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18
SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, INIT = 21, 22, 23, 24, 26
OPENDIR, READDIR, RELEASEDIR, CREATE, INTERRUPT, DESTROY = 27, 28, 29, 35, 36, 38
BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, COPY_FILE_RANGE, TMPFILE = 42, 43, 44, 45, 47, 51
NOTIFY_STORE, NOTIFY_RESEND = 4, 7

# FUSE_INIT's flags
ASYNC_READ, EXPORT_SUPPORT, DO_READDIRPLUS, ASYNC_DIO = 1 << 0, 1 << 4, 1 << 13, 1 << 15
PARALLEL_DIROPS, POSIX_ACL, MAX_PAGES, CACHE_SYMLINKS = 1 << 18, 1 << 20, 1 << 22, 1 << 23
# FUSE_OPEN's and FUSE_OPENDIR's
KEEP_CACHE, CACHE_DIR = 1 << 1, 1 << 3

HEADER = struct.Struct("<IIQQIIII")         # len, opcode, unique, nodeid, uid, gid, pid, extension's length
OUT_HEADER = struct.Struct("<IiQ")          # len, -errno (or the notification), unique (0: notification)
READ_IN = struct.Struct("<QQI")             # fh, offset, size; more follows
READDIR_IN = READ_IN
GETXATTR_IN = struct.Struct("<II")          # size, padding; then the name
INIT_IN = struct.Struct("<IIII")            # major, minor, max_readahead, flags; more follows
OPEN_IN = struct.Struct("<I")               # flags; more follows
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_OPEN_OUT = struct.Struct("<QIi")           # fh, open flags, backing id
_XATTR_SIZE_OUT = struct.Struct("<II")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_ATTR_OUT = struct.Struct("<QIIQQQqqqIIIIIIIIII")
_ENTRY_OUT = struct.Struct("<QQQQIIQQQqqqIIIIIIIIII")
_DIRENT = struct.Struct("<QQII")            # ino, offset of the next, length of the name, type; then the name
_STORE_OUT = struct.Struct("<QQII")        # inode, offset, size, padding; then the data
_BLOCK_BYTES: Final = 4096
_ENTRY_NONE = bytes(_ENTRY_OUT.size)
_PADDING = [bytes(-count % 8) for count in range(8)]


class Status(NamedTuple):
    """What is said about an inode. `mode` with the format's bits; `blocks` of 512 bytes; `valid_s`: kept so long."""

    inode: int
    mode: int
    link_count: int = 1
    uid: int = 0
    gid: int = 0
    size: int = 0
    blocks: int = 0
    rdev: int = 0
    mtime_s: int = 0
    mtime_ns: int = 0
    name_valid_s: int = 0
    valid_s: int = 0


def pack_init(max_readahead: int, flags: int, max_background: int, page_count_max: int) -> bytes:
    """The answer to FUSE_INIT: how we want to be asked."""
    congestion = max_background * 3 // 4
    return _INIT_OUT.pack(
        MAJOR, MINOR, max_readahead, flags, max_background, congestion, _BLOCK_BYTES, 1, page_count_max, 0, 0
    )


def pack_entry(status: Status) -> bytes:
    """What a name is: the answer to LOOKUP."""
    inode, mode, links, uid, gid, size, blocks, rdev, mtime_s, mtime_ns, name_valid_s, valid_s = status
    return _ENTRY_OUT.pack(
        inode, 0, name_valid_s, valid_s, 0, 0,
        inode, size, blocks, mtime_s, mtime_s, mtime_s, mtime_ns, mtime_ns, mtime_ns,
        mode, links, uid, gid, rdev & 0xFFFFFFFF, _BLOCK_BYTES, 0,
    )  # fmt: skip


def pack_no_entry(valid_s: int) -> bytes:
    """There is no such name, and this stays so for `valid_s` seconds: the kernel need not ask again."""
    return _ENTRY_OUT.pack(0, 0, valid_s, *[0] * 19)


def pack_attributes(status: Status) -> bytes:
    """The answer to GETATTR."""
    inode, mode, links, uid, gid, size, blocks, rdev, mtime_s, mtime_ns, _, valid_s = status
    return _ATTR_OUT.pack(
        valid_s, 0, 0, inode, size, blocks, mtime_s, mtime_s, mtime_s, mtime_ns, mtime_ns, mtime_ns,
        mode, links, uid, gid, rdev & 0xFFFFFFFF, _BLOCK_BYTES, 0,
    )  # fmt: skip


def pack_open(handle: int, flags: int) -> bytes:
    return _OPEN_OUT.pack(handle, flags, 0)


def pack_xattr_size(size: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR with room for nothing: how much would be needed."""
    return _XATTR_SIZE_OUT.pack(size, 0)


def pack_statfs(block_count: int, name_bytes_max: int) -> bytes:
    """A full file system of so many blocks of 4 KiB."""
    return _STATFS_OUT.pack(block_count, 0, 0, 0, 0, _BLOCK_BYTES, name_bytes_max, _BLOCK_BYTES, 0)


def pack_name(name: bytes, inode: int, next_offset: int, mode: int, entry: bytes | None) -> bytes:
    """
    One name of a directory's listing.

    Args:
        name: of the entry.
        inode: of it.
        next_offset: where a listing goes on behind it.
        mode: of which the format's bits count.
        entry: None for READDIR; else what pack_entry() made of it, or b"" for a name the kernel need not remember.

    """
    plus = b"" if entry is None else entry or _ENTRY_NONE
    return b"".join((
        plus, _DIRENT.pack(inode, next_offset, len(name), mode >> 12), name, _PADDING[len(name) & 7]
    ))  # fmt: skip


def pack_store(inode: int, size: int) -> bytes:
    """In front of a file's first `size` bytes: put them into the page cache."""
    length = OUT_HEADER.size + _STORE_OUT.size + size
    return OUT_HEADER.pack(length, NOTIFY_STORE, 0) + _STORE_OUT.pack(inode, 0, size, 0)


def pack_resend() -> bytes:
    """Have all that was asked and not answered asked again (Linux 6.9)."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)
