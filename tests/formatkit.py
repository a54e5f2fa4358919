"""Small blobs, tables and bootstraps for tests of the format: real ones, made by the code under test's own writers."""

from __future__ import annotations

import numpy as np

from lazyfs.image.blob import pack_hot_tail, pack_tail
from lazyfs.image.bootstrap import BlobRef, Bootstrap, Device
from lazyfs.image.codec import Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.entries import pack_entries
from lazyfs.image.erofs import write_image
from lazyfs.image.model import Attributes, DataMap, FileType, Inode, LayerEntry
from lazyfs.image.table import ROW, ChunkTable

CHUNK_SIZE = 1 << 16


def make_blob(device: bytes, entries: list[LayerEntry], codec: Codec = Codec.LZ4) -> tuple[bytes, ChunkTable, bytes]:
    """(blob, its own table, its tail) of a device's bytes; len(device) is a multiple of 4096."""
    data, rows = bytearray(), []
    for start in range(0, len(device), CHUNK_SIZE):
        chunk = device[start : start + CHUNK_SIZE]
        used, stored = compress(chunk, codec, 3)
        rows.append((len(data), len(stored), 0, used, 0, chunk_digest(chunk)))
        data += stored
    table = ChunkTable(CHUNK_SIZE, len(device), np.array(rows, dtype=ROW))
    tail = pack_tail(table, pack_entries(entries), len(entries), len(data))
    return bytes(data) + tail, table, tail


def make_bootstrap(devices: list[bytes], *, hot: list[tuple[int, int]] | None = None) -> Bootstrap:
    """A bootstrap over these devices, each with one file `dN`; `hot`: (device, chunk) pairs that are copied."""
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
    if hot:
        _add_hot(blobs, tables, hot)
    erofs = write_image(root, [table.device_size for table in tables])
    return Bootstrap(tuple(blobs), tuple(Device(table.device_digest(), table) for table in tables), erofs)


def _add_hot(blobs: list[BlobRef], tables: list[ChunkTable], hot: list[tuple[int, int]]) -> None:
    offset = 0
    for device, chunk in hot:
        row = tables[device].rows[chunk]
        row["blob_index"], row["blob_offset"] = len(blobs), offset
        offset += int(row["stored_size"])
    data = bytes(offset) + pack_hot_tail(CHUNK_SIZE, len(hot), offset)
    blobs.append(BlobRef(Digest.of(data), len(data), hot=True))
