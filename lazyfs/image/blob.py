"""
A blob: stored chunks one after another, then its tail.

    layer blob = chunks | metadata (image.entries) | chunk table (image.table, blob_index 0) | footer
    hot blob   = chunks of the hot device (image.hot) | footer

Footer (96 bytes, little-endian, the last bytes of the blob; docs/format.md):

    offset size field
         0    8 magic          b"LAZYBLOB"
         8    2 version        1
        10    2 kind           1 layer, 2 hot
        12    4 chunk_size     bytes, a power of two
        16    8 device_size    bytes of the device
        24    8 data_size      bytes of stored chunks; they begin at 0
        32    8 metadata_offset, 40: 8 metadata_size
        48    8 table_offset,    56: 8 table_size
        64    8 entry_count    entries in the metadata (hot: 0)
        72    8 chunk_count    chunks of the device
        80   16 reserved       zero

The parts follow each other without a gap, so a reader that knows the tail's size and digest (annotations of the layer
descriptor) gets everything but the chunks with one range request, and can trust it.

Layer: lazyfs.image, no I/O. Who calls: the converter (writes; reads to reuse a layer), `lazyfs check`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import BugError, FormatError, UnsupportedError
from lazyfs.image.entries import parse_entries
from lazyfs.image.table import ROW_BYTES, ChunkTable, check_chunk_size, chunk_count, parse_table

if TYPE_CHECKING:
    from lazyfs.image.model import LayerEntry

BLOB_VERSION = 1
FOOTER_BYTES = 96
# The tail of a layer of 20 million entries and a 16 TiB device would not fit; that of any real one does by far.
TAIL_BYTES_MAX = 2 * limits.GIB
_MAGIC = b"LAZYBLOB"
_KIND_LAYER, _KIND_HOT = 1, 2
_FOOTER = struct.Struct("<8sHHI8Q16x")
_RESERVED_BYTES = 16
assert _FOOTER.size == FOOTER_BYTES


@dataclass(frozen=True, slots=True)
class BlobTail:
    """Where the parts of a blob are. `metadata`, `table`: (offset, size) in bytes; (x, 0) where there is none."""

    chunk_size: int
    device_size: int
    data_size: int
    metadata: tuple[int, int]
    table: tuple[int, int]
    entry_count: int
    chunk_count: int
    hot: bool = False

    @property
    def tail_size(self) -> int:
        """Bytes of metadata, table and footer."""
        return self.metadata[1] + self.table[1] + FOOTER_BYTES

    @property
    def blob_size(self) -> int:
        return self.data_size + self.tail_size


def pack_tail(table: ChunkTable, metadata: bytes, entry_count: int, data_size: int) -> bytes:
    """
    Everything of a layer blob that comes after its chunks.

    Args:
        table: the rows' blob_index is 0, their offsets are those of the chunks in this blob.
        metadata: the bytes of image.entries.pack_entries().
        entry_count: how many entries those are.
        data_size: bytes of all stored chunks.

    """
    if table.rows["blob_index"].any():
        raise BugError("a layer blob's own table must name blob 0 only")
    rows = table.rows.tobytes()
    tail = BlobTail(
        table.chunk_size, table.device_size, data_size, (data_size, len(metadata)),
        (data_size + len(metadata), len(rows)), entry_count, table.chunk_count,
    )
    return b"".join((metadata, rows, _pack_footer(tail)))


def pack_hot_tail(table: ChunkTable, data_size: int) -> bytes:
    """What comes after the chunks of a hot blob: its footer. Their table is in the bootstrap (image.hot)."""
    empty = (data_size, 0)
    return _pack_footer(BlobTail(table.chunk_size, table.device_size, data_size, empty, empty, 0, table.chunk_count,
                                 hot=True))


def parse_footer(footer: bytes | memoryview, blob_size: int) -> BlobTail:
    """
    Validate a blob's last FOOTER_BYTES bytes against its size.

    Raises:
        UnsupportedError: another version, kind or chunk size.
        FormatError: no footer, or parts that do not fill the blob exactly.

    """
    if len(footer) != FOOTER_BYTES:
        raise FormatError(f"blob footer holds {len(footer)} bytes, expected {FOOTER_BYTES}")
    magic, version, kind, chunk_size, device_size, data_size, *rest = _FOOTER.unpack(footer)
    if magic != _MAGIC:
        raise FormatError("blob does not end in a lazyfs footer", hint="the blob is truncated, or not a lazyfs blob")
    if version != BLOB_VERSION or kind not in (_KIND_LAYER, _KIND_HOT) or any(footer[-_RESERVED_BYTES:]):
        raise UnsupportedError(
            f"blob footer of version {version}, kind {kind}: this lazyfs reads version {BLOB_VERSION}",
            hint="convert the image again, or use a newer lazyfs",
        )
    check_chunk_size(chunk_size)
    metadata_offset, metadata_size, table_offset, table_size, entry_count, chunks = rest
    tail = BlobTail(
        chunk_size, device_size, data_size, (metadata_offset, metadata_size), (table_offset, table_size),
        entry_count, chunks, hot=kind == _KIND_HOT,
    )
    _check_footer(tail, blob_size)
    return tail


def parse_tail(tail: bytes | memoryview, blob_size: int) -> tuple[ChunkTable, list[LayerEntry]]:
    """
    The table and the entries of a layer blob out of its tail (whose digest the caller has checked).

    Raises:
        FormatError: anything is off.

    """
    footer, table = _parse_table(memoryview(tail), blob_size)
    entries = parse_entries(memoryview(tail)[: footer.metadata[1]], device_size=footer.device_size)
    if len(entries) != footer.entry_count:
        raise FormatError(f"layer metadata holds {len(entries)} entries, expected {footer.entry_count}")
    return table, entries


def parse_tail_table(tail: bytes | memoryview, blob_size: int) -> ChunkTable:
    """The table alone: parse_tail() without the time that millions of entries take. Raises FormatError."""
    return _parse_table(memoryview(tail), blob_size)[1]


def _parse_table(tail: memoryview, blob_size: int) -> tuple[BlobTail, ChunkTable]:
    footer = parse_footer(tail[-FOOTER_BYTES:], blob_size)
    if footer.hot:
        raise FormatError("a hot blob stands where a layer's blob was expected")
    if footer.tail_size != len(tail):
        raise FormatError(f"blob tail holds {len(tail)} bytes, expected {footer.tail_size}")
    metadata_size = footer.metadata[1]
    table = parse_table(
        tail[metadata_size : metadata_size + footer.table[1]],
        footer.chunk_size, footer.device_size, [footer.data_size],
    )
    if table.rows["blob_index"].any():
        raise FormatError("a layer blob's own table names another blob")
    return footer, table


def _pack_footer(tail: BlobTail) -> bytes:
    kind = _KIND_HOT if tail.hot else _KIND_LAYER
    return _FOOTER.pack(
        _MAGIC, BLOB_VERSION, kind, tail.chunk_size, tail.device_size, tail.data_size,
        *tail.metadata, *tail.table, tail.entry_count, tail.chunk_count,
    )


def _check_footer(tail: BlobTail, blob_size: int) -> None:
    if not 0 <= tail.device_size <= limits.DEVICE_BYTES_MAX or tail.device_size % limits.BLOCK_SIZE_BYTES:
        raise FormatError(f"blob footer states a device of {tail.device_size} bytes")
    if tail.metadata[0] != tail.data_size or tail.table[0] != tail.data_size + tail.metadata[1]:
        raise FormatError("blob footer: the parts of the blob do not follow each other")
    if tail.tail_size > TAIL_BYTES_MAX or tail.blob_size != blob_size:
        raise FormatError(f"blob footer describes {tail.blob_size} bytes, the blob holds {blob_size}")
    if tail.chunk_count != chunk_count(tail.device_size, tail.chunk_size):
        raise FormatError(f"blob footer states {tail.chunk_count} chunks for a device of {tail.device_size} bytes")
    if tail.hot:
        if tail.metadata[1] or tail.table[1] or tail.entry_count:
            raise FormatError("blob footer: a hot blob holds chunks only")
        return
    if tail.table[1] != tail.chunk_count * ROW_BYTES or tail.entry_count > limits.ENTRY_COUNT_MAX:
        raise FormatError("blob footer: a size and its count do not agree")
