"""
What a file is, from the tar reader through the merge to the EROFS writer and back from its reader.

Pure data. Offsets and sizes are bytes unless a name says otherwise. Paths are bytes without a leading slash; the root
directory is b"". A *layer device* is the uncompressed data of one source layer as one flat address space (see Words
in docs/design.md); a DataMap says where in it a file's bytes are.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FileType(enum.IntEnum):
    """Values are those of an EROFS directory entry (and of FT_* in ext4)."""

    REGULAR = 1
    DIRECTORY = 2
    CHARACTER = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7


class EntryKind(enum.IntEnum):
    """What a layer's entry does to the tree below it (OCI image-spec layer.md)."""

    NODE = 0        # adds or replaces a file of `type`
    HARDLINK = 1    # another name for `target`
    WHITEOUT = 2    # removes `path` of lower layers
    OPAQUE = 3      # hides all children that lower layers gave the directory `path`


@dataclass(frozen=True, slots=True)
class DataMap:
    """
    Where a regular file's bytes are in a layer device.

    The file is cut into units of `1 << unit_shift` bytes (12 <= unit_shift <= 43, EROFS chunk bits + 12). A run
    `(first_unit, unit_count, device_block)` puts `unit_count` consecutive units at byte `device_block * 4096` and
    up; runs are sorted, do not overlap; units in no run are holes (zeros). The last unit may reach beyond the
    file's end, but no byte beyond the end, rounded up to 4096, is read.
    A file without holes is one run of one large unit.
    """

    unit_shift: int
    runs: tuple[tuple[int, int, int], ...]


EMPTY_MAP = DataMap(12, ())


@dataclass(frozen=True, slots=True)
class Attributes:
    """Metadata of an inode. `mode` holds permission bits only (<= 0o7777); xattrs are sorted by full name."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_s: int = 0          # signed 64 bits
    mtime_ns: int = 0         # 0 .. 999,999,999
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """
    One entry of one layer, in archive order, as the layer's blob records it.

    `type`, `attributes`, `size`, `data`, `rdev` are meaningful for NODE only. `target`: a symlink's text, or the
    path (normalised like `path`) that a HARDLINK names. `rdev`: (major, minor) of a device node.
    """

    path: bytes
    kind: EntryKind = EntryKind.NODE
    type: FileType = FileType.REGULAR
    attributes: Attributes = Attributes()
    size: int = 0
    data: DataMap = EMPTY_MAP
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)


@dataclass(slots=True, eq=False)
class Inode:
    """
    A node of a merged tree. Identity is the inode: hard links are one object under several names.

    `device` is the index of the layer device that holds the data (0 = the lowest source layer; EROFS counts them
    from 1). `link_count` counts the names of a non-directory; for a directory it is 2 + its subdirectories.
    `implied`: a parent directory that no layer lists (mode 0755, root, time 0).
    """

    type: FileType
    attributes: Attributes
    size: int = 0
    device: int = 0
    data: DataMap = EMPTY_MAP
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    children: dict[bytes, Inode] = field(default_factory=dict)
    link_count: int = 1
    implied: bool = False
