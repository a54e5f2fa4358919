"""Small blobs, tables and bootstraps for tests of the format: real ones, made by the code under test's own writers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lazyfs import limits
from lazyfs.image.blob import pack_hot_tail, pack_tail
from lazyfs.image.bootstrap import BlobRef, Bootstrap, Device
from lazyfs.image.codec import Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.entries import pack_entries
from lazyfs.image.erofs import write_image
from lazyfs.image.hot import EXTENT, HotPart
from lazyfs.image.model import Attributes, DataMap, FileType, Inode, LayerEntry
from lazyfs.image.table import ROW, ChunkTable

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_SIZE = 1 << 16


def make_blob(device: bytes, entries: list[LayerEntry], codec: Codec = Codec.LZ4) -> tuple[bytes, ChunkTable, bytes]:
    """(blob, its own table, its tail) of a device's bytes; len(device) is a multiple of 4096."""
    table, data = make_table(device, CHUNK_SIZE, codec, 0)
    tail = pack_tail(table, pack_entries(entries), len(entries), len(data))
    return data + tail, table, tail


def make_hot(
    devices: list[bytes], extents: Sequence[tuple[int, int, int]], chunk_size: int, *, hot_index: int
) -> tuple[HotPart, int]:
    """(The hot part of these (first block, device, block count), the size of its blob)."""
    block = limits.BLOCK_SIZE_BYTES
    hot = b"".join(devices[device][first * block : (first + count) * block] for first, device, count in extents)
    table, stored = make_table(hot, chunk_size, Codec.ZSTD, hot_index)
    part = HotPart(table.device_digest(), table, np.array(list(extents), dtype=EXTENT))
    return part, len(stored) + len(pack_hot_tail(table, len(stored)))


def make_table(device: bytes, chunk_size: int, codec: Codec, blob_index: int) -> tuple[ChunkTable, bytes]:
    """(table, stored chunks) of a device's bytes."""
    data, rows = bytearray(), []
    for start in range(0, len(device), chunk_size):
        chunk = device[start : start + chunk_size]
        used, stored = compress(chunk, codec, 3)
        rows.append((len(data), len(stored), blob_index, used, 0, chunk_digest(chunk)))
        data += stored
    return ChunkTable(chunk_size, len(device), np.array(rows, dtype=ROW)), bytes(data)


def make_bootstrap(devices: list[bytes], *, hot: Sequence[tuple[int, int, int]] = ()) -> Bootstrap:
    """A bootstrap over these devices, each with one file `dN`; `hot`: extents (first block, device, block count)."""
    root = Inode(FileType.DIRECTORY, Attributes(), link_count=2)
    blobs, tables = [], []
    for index, device in enumerate(devices):
        blob, table, _ = make_blob(device, [])
        ref = BlobRef(Digest.of(blob), len(blob))
        if ref not in blobs:
            blobs.append(ref)
        rows = table.rows.copy()
        rows["blob_index"] = blobs.index(ref)
        tables.append(ChunkTable(CHUNK_SIZE, len(device), rows))
        if device:
            file_map = DataMap(max((len(device) - 1).bit_length(), 12), ((0, 1, 0),))
            root.children[b"d%d" % index] = Inode(
                FileType.REGULAR, Attributes(0o644), len(device), index, file_map
            )
    part = None
    if hot:
        part, size = make_hot(devices, hot, CHUNK_SIZE, hot_index=len(blobs))
        blobs.append(BlobRef(part.digest, size, hot=True))     # any digest will do: nothing reads the blob
    erofs = write_image(root, [table.device_size for table in tables])
    return Bootstrap(tuple(blobs), tuple(Device(table.device_digest(), table) for table in tables), erofs, part)
