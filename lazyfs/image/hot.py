r"""
The hot part of an image: the blocks that a start touches, as a device of their own.

The *hot device* is those blocks of the layer devices, one behind another in the order in which a start first wants
them, cut into chunks and stored in the hot blob as any device's chunks are. *Hot extents* say which blocks it is made
of. EROFS and the layers' tables do not know of it: whoever reads a layer device may take hot blocks from here, and
finds all of them in the layers' chunks as well.

`lazyfs/hot.bin` of a bootstrap (little-endian; docs/format.md):

    offset size field
         0    8 magic          b"LAZYHOT\0"
         8    2 version        1
        10    2 reserved       0
        12    4 chunk_size     of the hot device, bytes
        16    8 device_size    of the hot device: 4096 times the sum of all counts
        24    4 chunk_count    then as many rows of image.table, which name the hot blob only
        28    4 extent_count   then as many extents, in the order of the hot device
        32   32 device digest  of the hot device, raw SHA-256

    extent: 0 4 first, 4 2 device, 6 2 count - blocks [first, first + count) of layer device `device`

Layer: lazyfs.image, no I/O. Who calls: image.bootstrap, the converter (makes it), fetch and node (read through it).
Invariants: parse_hot() checks everything that does not need the blocks themselves. Nothing here changes once made.
"""

from __future__ import annotations

import bisect
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lazyfs import limits
from lazyfs.errors import BugError, FormatError, UnsupportedError
from lazyfs.image.digest import Digest
from lazyfs.image.table import ROW_BYTES, ChunkTable, parse_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EXTENT = np.dtype([("first", "<u4"), ("device", "<u2"), ("count", "<u2")])
EXTENT_BYTES = 8
EXTENT_BLOCKS_MAX = 0xFFFF       # what its count can say
assert EXTENT.itemsize == EXTENT_BYTES
Extents = npt.NDArray[np.void]
_VERSION = 1
_MAGIC = b"LAZYHOT\0"
_HEAD = struct.Struct("<8sHHIQII32s")
HEAD_BYTES = 64
assert _HEAD.size == HEAD_BYTES
_BLOCK = limits.BLOCK_SIZE_BYTES
_DEVICE_SHIFT = 32               # a key orders blocks by device, then by place: block addresses have 32 bits


@dataclass(frozen=True, slots=True, eq=False)
class HotPart:
    """
    A validated hot part.

    Attributes:
        digest: of the hot device, table.device_digest(); caches name it so, as any device.
        table: its chunks; all rows name the hot blob.
        extents: a read-only or private array of dtype EXTENT, in the order of the hot device; no block twice.

    """

    digest: Digest
    table: ChunkTable
    extents: Extents

    def share(self, tables: Iterable[ChunkTable]) -> float:
        """Its stored bytes against those of the layers' chunks."""
        total = sum(_stored_bytes(table) for table in tables)
        return round(_stored_bytes(self.table) / total, 4) if total else 0.0


class HotMap:
    """Which blocks of the layer devices are where in the hot device. Takes 24 bytes an extent."""

    def __init__(self, extents: Extents) -> None:
        keys = _keys(extents)
        order = np.argsort(keys, kind="stable")
        # memoryviews: their items are int, which costs a lookup a third of what numpy's scalars would
        self._keys = keys[order].data
        self._ends = (keys[order] + extents["count"][order]).data
        self._hot = hot_starts(extents)[order].data

    def find(self, device: int, first: int, count: int) -> list[tuple[int, int]] | None:
        """
        Where blocks [first, first + count) of a layer device are in the hot device.

        Returns: (first block in the hot device, how many) in the order of the layer device, neighbours as one; None:
        not all of these blocks are hot.

        """
        key = (device << _DEVICE_SHIFT) + first
        end = key + count
        at = bisect.bisect_right(self._keys, key) - 1
        found: list[tuple[int, int]] = []
        while key < end:
            if not 0 <= at < len(self._keys) or not self._keys[at] <= key < self._ends[at]:
                return None
            start = self._hot[at] + key - self._keys[at]
            length = min(self._ends[at], end) - key
            if found and sum(found[-1]) == start:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((start, length))
            key += length
            at += 1
        return found


def _keys(extents: Extents) -> npt.NDArray[np.int64]:
    keys: npt.NDArray[np.int64] = (extents["device"].astype(np.int64) << _DEVICE_SHIFT) + extents["first"]
    return keys


def hot_starts(extents: Extents) -> npt.NDArray[np.int64]:
    """The first block in the hot device of each extent."""
    counts = extents["count"].astype(np.int64)
    return np.cumsum(counts) - counts


def _stored_bytes(table: ChunkTable) -> int:
    return int(table.rows["stored_size"].sum(dtype=np.int64))


def pack_hot(part: HotPart) -> bytes:
    """The content of lazyfs/hot.bin. Deterministic."""
    table = part.table
    head = _HEAD.pack(_MAGIC, _VERSION, 0, table.chunk_size, table.device_size, table.chunk_count, len(part.extents),
                      bytes.fromhex(part.digest.hex))
    if part.extents.dtype != EXTENT:
        raise BugError(f"hot extents of dtype {part.extents.dtype}")
    return b"".join((head, table.rows.tobytes(), part.extents.tobytes()))


def parse_hot(
    data: bytes | memoryview, device_sizes: Sequence[int], blob_sizes: Sequence[int], hot_index: int
) -> HotPart:
    """
    Read and check lazyfs/hot.bin. The result's arrays are views of `data`.

    Args:
        data: its content.
        device_sizes: bytes of each layer device.
        blob_sizes: bytes of each blob, by index.
        hot_index: which of them is the hot blob.

    Raises:
        UnsupportedError: another version.
        FormatError: anything else is off.

    """
    view = memoryview(data)
    if len(view) < HEAD_BYTES:
        raise FormatError(f"hot part holds {len(view)} bytes, its head alone has {HEAD_BYTES}")
    magic, version, reserved, chunk_size, device_size, chunks, count, digest = _HEAD.unpack(view[:HEAD_BYTES])
    if magic != _MAGIC:
        raise FormatError("hot part does not begin as one")
    if version != _VERSION or reserved:
        raise UnsupportedError(f"hot part of version {version}: this lazyfs reads version {_VERSION}",
                               hint="convert the image again, or use a newer lazyfs")
    if not 0 < device_size <= limits.HOT_BYTES_MAX:
        raise FormatError(f"hot part of {device_size} bytes, from 1 to {limits.HOT_BYTES_MAX} are allowed")
    extents_at = HEAD_BYTES + chunks * ROW_BYTES
    if len(view) != extents_at + count * EXTENT_BYTES:
        raise FormatError(f"hot part holds {len(view)} bytes, not {chunks} rows and {count} extents")
    table = parse_table(view[HEAD_BYTES:extents_at], chunk_size, device_size, list(blob_sizes))
    if (table.rows["blob_index"] != hot_index).any():
        raise FormatError("hot part: its table names another blob than the hot one")
    stated, found = Digest(f"sha256:{digest.hex()}"), table.device_digest()
    if stated != found:
        raise FormatError(f"hot device should be {stated.short}, its table makes {found.short}")
    extents: Extents = np.frombuffer(view[extents_at:], dtype=EXTENT)
    _check_extents(extents, device_sizes, device_size)
    return HotPart(stated, table, extents)


def _check_extents(extents: Extents, device_sizes: Sequence[int], hot_size: int) -> None:
    if len(extents) == 0 or not extents["count"].all():
        raise FormatError("hot part: an extent without blocks")
    if extents["device"].max() >= len(device_sizes):
        raise FormatError(f"hot part names device {extents['device'].max()} of {len(device_sizes)}")
    counts = extents["count"].astype(np.int64)
    if int(counts.sum()) * _BLOCK != hot_size:
        raise FormatError(f"hot part: its extents have {int(counts.sum())} blocks, its device {hot_size} bytes")
    blocks = np.array([size // _BLOCK for size in device_sizes], dtype=np.int64)
    if (extents["first"] + counts > blocks[extents["device"]]).any():
        raise FormatError("hot part: an extent reaches beyond its layer device")
    keys = _keys(extents)
    order = np.argsort(keys, kind="stable")
    if (keys[order][:-1] + counts[order][:-1] > keys[order][1:]).any():
        raise FormatError("hot part: a block stands in it twice")
